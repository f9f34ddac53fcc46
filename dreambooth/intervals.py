"""Write a number with its interval, alike wherever people read one."""


def in_interval(mean: float, low: float, high: float) -> str:
    """Write a difference with the bounds of its interval: +0.041 [+0.017, +0.065]."""
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"
