"""Checkpoints of a training that never was."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from dreambooth.checkpoint import Checkpoints, State


def state(step: int, **changes: Any) -> State:
    values = {
        "weights": {"unet.w": torch.full((3,), float(step))},
        "moments": {"unet.w/exp_avg": torch.zeros(2)},
        "plain": {"parts": 1},
        "records": {"steps": [{"step": step}]},
    }
    return State(step, **values | changes)


def open_checkpoints(
    folder: Path,
    inputs: Mapping[str, Any] | None = None,
    say: Callable[[str], object] = lambda line: None,
    resume_from: Path | None = None,
) -> Checkpoints:
    """Open the checkpoints of a training that depends on nothing, of which nobody is told."""
    return Checkpoints(folder, inputs or {}, say, resume_from)


def save(checkpoints: Checkpoints, saved: State, score: float | None = None) -> Path:
    """Write a checkpoint and wait for it, as the end of a training does; return its folder, the newest."""
    checkpoints.begin_save(saved, score)
    checkpoints.finish()
    return max(checkpoints.folder.glob("step-*"))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
