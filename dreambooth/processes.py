"""Which of several processes this is, when a launcher started more than one: ours, torchrun, accelerate launch."""

import os


def rank() -> int:
    """Return the number of this process among all, 0 without a launcher: that one writes what leaves the training."""
    return int(os.environ.get("RANK", "0"))


def count() -> int:
    """Return how many processes there are, 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Return the number of this process on its machine: which of the GPUs is its own."""
    return int(os.environ.get("LOCAL_RANK", "0"))
