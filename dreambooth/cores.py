"""The cores of this machine: how many there are, whether a GPU does the work, and threads that stay where they are."""

import os
import sys
from pathlib import Path

import psutil

DRIVERS = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")  # of NVIDIA, of WSL, of AMD
# Whoever sets one of these has decided himself.
DECIDED = ("OMP_NUM_THREADS", "OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")
_usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None


def count() -> int:
    """Count the cores this process may use; two threads of one core share its arithmetic."""
    usable = len(_usable) if _usable is not None else os.cpu_count() or 1
    return min(usable, psutil.cpu_count(logical=False) or usable)


def has_gpu() -> bool:
    """Say whether a stage may find a GPU; to ask torch would take seconds."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return not hidden and any(Path(driver).exists() for driver in DRIVERS)


def bind_threads() -> None:
    """Keep each thread of OpenMP on a core of its own, where one process computes with all: docs/decisions/0100.

    Must be called before torch is loaded, which reads the environment then.
    """
    if "torch" not in sys.modules and not has_gpu() and not any(name in os.environ for name in DECIDED):
        os.environ |= {"OMP_PROC_BIND": "close", "OMP_PLACES": "cores"}


def unbind() -> None:
    """Let this thread, and the processes that it starts, run on every core again."""
    if _usable is not None:
        os.sched_setaffinity(0, _usable)
