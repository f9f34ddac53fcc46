"""Write a number with its interval, alike wherever people read one."""

from collections.abc import Mapping

from dreambooth.params import MIN_PROMPTS


def in_interval(mean: float, low: float, high: float) -> str:
    """Write a difference with the bounds of its interval: +0.041 [+0.017, +0.065]."""
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"


def over_prompts(gain: Mapping[str, float], prompts: int) -> str:
    """Write the gain of a measure, of metrics/<id>.json; its interval says little over a few prompts and is left out.

    Args:
        gain: gain, low, high.
        prompts: that it is a mean over.
    """
    if prompts < MIN_PROMPTS:
        return f"{gain['gain']:+.3f}"
    return in_interval(gain["gain"], gain["low"], gain["high"])


def name_difference(prompts: int, confidence: float) -> str:
    """Name a line of `over_prompts`."""
    if prompts < MIN_PROMPTS:
        return f"difference over {prompts} prompts, too few for an interval"
    return f"difference, {confidence:.0%} interval over {prompts} prompts"
