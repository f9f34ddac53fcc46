"""Say what this machine computes with, and what is amiss with it: for people, nothing here changes a result.

Whether a driver of a GPU is there is known without torch, whose import takes seconds: the other functions import it.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

NVIDIA = ("/dev/nvidiactl", "/usr/lib/wsl/lib/libcuda.so.1")  # the latter of WSL
DRIVERS = (*NVIDIA, "/dev/dxg", "/dev/kfd")  # of WSL with any card, of AMD


def has_gpu() -> bool:
    """Say whether a stage may find a GPU."""
    return _is_shown(DRIVERS)


def has_nvidia() -> bool:
    """Say whether a stage should find one: the other drivers are there for cards that only show the screen as well."""
    return _is_shown(NVIDIA)


def gpu_in_words() -> str | None:
    """Return name and memory of the GPU; None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    about = torch.cuda.get_device_properties(0)
    return f"{about.name}, {about.total_memory / 1e9:.0f} GB"


def unused_gpu() -> str | None:
    """Say of a GPU that is here and that torch cannot use what helps; None without such a one."""
    import torch

    if torch.cuda.is_available() or not has_nvidia():
        return None
    made_for = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    return (
        f"the driver of a GPU is here, but torch {torch.__version__}, built {made_for}, cannot use it: all is computed "
        "on the CPU; nvidia-smi says which CUDA the driver knows, https://pytorch.org/get-started/locally/ which torch "
        "to install for it"
    )


def computes_on(device: "torch.device") -> list[str]:
    """Say what computes, and what is amiss with it: on the wrong device that takes hours."""
    told = unused_gpu()
    return [f"computes on {device}", *([f"warning: {told}"] if told else [])]


def gpu_lacks_bfloat16() -> bool:
    """Whether there is a GPU that only emulates bfloat16 (before Ampere): many times slower than float16."""
    import torch

    return torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False)


def cpu_has_tiles() -> bool:
    """Whether the CPU multiplies matrices of bfloat16 in tiles (AMX): twice as fast as float32."""
    import torch

    return bool(torch.cpu.get_capabilities().get("amx_bf16"))


def _is_shown(drivers: Sequence[str]) -> bool:
    """Whether one of the drivers is there, and its cards are not hidden: who hides them means the CPU."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return not hidden and any(Path(driver).exists() for driver in drivers)
