"""How long a training is, and how its rate falls; without torch, so that a plan can ask."""

import math

from dreambooth.params import MAX_AUTOMATIC_STEPS, Train


def max_train_steps(settings: Train, num_photos: int) -> int:
    """Return the optimizer steps: as set, or 100 a photo between 400 and 1200."""
    if settings.max_train_steps is not None:
        return settings.max_train_steps
    return min(max(100 * num_photos, 400), MAX_AUTOMATIC_STEPS)


def learning_rate_at(step: int, settings: Train, steps: int) -> float:
    """Return the rate of optimizer step `step`, from 0: linear warm-up, then constant, or falling to 0 at the end."""
    warmup = settings.lr_warmup_steps
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(steps - warmup, 1)
    shape = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    return settings.learning_rate * shape[settings.lr_scheduler]
