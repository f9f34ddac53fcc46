"""What all trainings of the bundled base share: progress, rate, averaged weights, checkpoints that survive a kill."""

import math
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn


def device(processes: int = 1) -> torch.device:
    """Choose a GPU for a training of one process where there is one; several processes share the CPU's cores."""
    return torch.device("cuda" if processes == 1 and torch.cuda.is_available() else "cpu")


def autocast(where: torch.device, mixed_precision: str) -> torch.autocast:
    """Compute matrix products and convolutions in bfloat16, where the recipe says so."""
    return torch.autocast(where.type, dtype=torch.bfloat16, enabled=mixed_precision == "bf16")


class Progress:
    """How much of a training is done, from 0 to 1: by work, or by time where a budget ends it earlier.

    By work alone a training is reproducible; a budget in minutes makes the rate fall to its end in time on a machine
    that is slower than expected.
    """

    def __init__(self, total: float, minutes: float | None = None) -> None:
        self.total = total
        self.minutes = minutes
        self.work = 0.0
        self.elapsed_s = 0.0
        self._mark = time.monotonic()

    def add(self, work: float) -> None:
        """Count the work done by all processes and the time since the last call."""
        now = time.monotonic()
        self.work += work
        self.elapsed_s += now - self._mark
        self._mark = now

    @property
    def share(self) -> float:
        """The share that is done."""
        by_time = 0.0 if self.minutes is None else self.elapsed_s / (60 * self.minutes)
        return min(1.0, max(self.work / self.total, by_time))


def rate_at(share: float, step: int, start: float, end: float, warmup_steps: int) -> float:
    """Give the learning rate: linear warm-up, then half a cosine from `start` to `end`."""
    return min(1.0, (step + 1) / warmup_steps) * (end + (start - end) * (1 + math.cos(math.pi * share)) / 2)


class Average:
    """Exponential moving average of the weights of some modules.

    Early on the decay is lower, (1 + n) / (10 + n) after n updates, so that the start is soon forgotten.
    """

    def __init__(self, modules: dict[str, nn.Module], decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.modules = modules
        self.weights = {
            name: {key: value.detach().clone() for key, value in module.state_dict().items()}
            for name, module in modules.items()
        }

    @torch.no_grad()
    def update(self, steps: int = 1) -> None:
        """Move the average towards the weights of now, by so many steps."""
        decay = min(self.decay**steps, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        for name, module in self.modules.items():
            averages = self.weights[name]
            pairs = [(averages[k], v) for k, v in module.state_dict().items() if v.is_floating_point()]
            torch._foreach_lerp_([a for a, _ in pairs], [v for _, v in pairs], 1 - decay)

    def state_dict(self) -> dict[str, Any]:
        """Give what `load_state_dict` takes."""
        return {"updates": self.updates, "weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.updates, self.weights = state["updates"], state["weights"]


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def load(path: Path) -> dict[str, Any] | None:
    """Read a checkpoint, or None where there is none."""
    if not path.exists():
        return None
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


class Every:
    """Say yes every so many minutes."""

    def __init__(self, minutes: float) -> None:
        self.minutes = minutes
        self.last = time.monotonic()

    def due(self) -> bool:
        """Say whether the time has come, and start it again."""
        if time.monotonic() - self.last < 60 * self.minutes:
            return False
        self.last = time.monotonic()
        return True
