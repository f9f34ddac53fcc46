"""The rules by which weights move: AdamW, the same with 8-bit moments, and Prodigy, which finds its own rate."""

from importlib import import_module
from typing import Any

import torch

from dreambooth.errors import TrainingError
from dreambooth.params import Train

FLOAT32 = 4  # bytes
MOMENTS = {"adamw": 2 * FLOAT32, "adamw_8bit": 2, "prodigy": 4 * FLOAT32}  # bytes that each keeps of a weight
EXTRAS = {"adamw_8bit": ("bitsandbytes", "adam8bit"), "prodigy": ("prodigyopt", "prodigy")}


def make_optimizer(groups: list[dict[str, Any]], settings: Train) -> torch.optim.Optimizer:
    """Build the optimizer of a training.

    Args:
        groups: of `methods.parameter_groups`.
        settings: of the training.

    Raises:
        TrainingError: its package is not installed.
    """
    betas, decay, epsilon = (
        (settings.adam_beta1, settings.adam_beta2),
        settings.adam_weight_decay,
        settings.adam_epsilon,
    )
    common: dict[str, Any] = {"lr": settings.learning_rate, "betas": betas, "weight_decay": decay, "eps": epsilon}
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, **common, fused=True)
    package = _extra(settings.optimizer)
    if settings.optimizer == "adamw_8bit":  # Dettmers et al. 2022
        made: torch.optim.Optimizer = package.optim.AdamW8bit(groups, **common)
    else:  # Mishchenko & Defazio 2024, with the two options that diffusers' train_dreambooth_lora_sdxl.py has on
        made = package.Prodigy(groups, **common, use_bias_correction=True, safeguard_warmup=True)
    return made


def state_bytes(settings: Train) -> int:
    """Return the bytes of a training's state for each trained weight: itself, its moments, its average."""
    average = FLOAT32 if settings.ema_decay is not None else 0
    return FLOAT32 + MOMENTS[settings.optimizer] + average


def _extra(name: str) -> Any:
    package, extra = EXTRAS[name]
    try:
        return import_module(package)
    except ImportError as error:
        raise TrainingError(
            f'train.optimizer: {name} needs the package {package} ({error}); pip install "dreambooth[{extra}]", or '
            "write adamw"
        ) from None
