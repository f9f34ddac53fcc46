"""Whether a driver of a GPU is on this machine: known without torch, whose import takes seconds."""

import os
from collections.abc import Sequence
from pathlib import Path

NVIDIA = ("/dev/nvidiactl", "/usr/lib/wsl/lib/libcuda.so.1")  # the latter of WSL
DRIVERS = (*NVIDIA, "/dev/dxg", "/dev/kfd")  # of WSL with any card, of AMD


def has_gpu() -> bool:
    """Say whether a stage may find a GPU."""
    return _is_shown(DRIVERS)


def has_nvidia() -> bool:
    """Say whether a stage should find one: the other drivers are there for cards that only show the screen as well."""
    return _is_shown(NVIDIA)


def _is_shown(drivers: Sequence[str]) -> bool:
    """Whether one of the drivers is there, and its cards are not hidden: who hides them means the CPU."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return not hidden and any(Path(driver).exists() for driver in drivers)
