"""What a number could be at best on this machine: its arithmetic, or its bytes, over a measured peak.

FLOP: floating-point operations, two for a multiplication and its addition. The arithmetic is counted by torch, for the
UNet, the text encoder and the decoder of the real model at the real sizes.
"""

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.recipe import Recipe
from dreambooth.models import DTYPES, Model, default_device, load_model

BYTES_OF_MOMENTS_AND_WEIGHT = 12  # a float32 weight and its two moments of Adam: what a checkpoint holds
BYTES_OF_TRAINING = 16  # the same, and the gradient
TRIES = 5


@dataclass(frozen=True)
class Work:
    """The arithmetic of a recipe, in FLOP, and its bytes."""

    step: float
    """Of an optimizer step: UNet and text encoder, forward and backward, subject and class rows."""
    denoising: float
    """Of one step of the sampler for one picture, both halves of the guidance."""
    decoding: float
    """Of one picture."""
    trained_weights: int

    def image(self, sampler_steps: int) -> float:
        """FLOP of a class image."""
        return sampler_steps * self.denoising + self.decoding

    def recipe(self, recipe: Recipe, class_images: int, sampler_steps: int) -> float:
        """FLOP of a whole run that draws so many class images."""
        return class_images * self.image(sampler_steps) + recipe.steps * self.step


@dataclass(frozen=True)
class Peaks:
    """What this machine reaches."""

    flops: float
    """FLOP a second of a large product of matrices in the precision of the training."""
    write: float
    """Bytes a second to the disk, synced."""
    imports: float
    """Seconds to import the libraries that both sides import."""


def count_work(recipe: Recipe) -> Work:
    """Count the arithmetic of a recipe on its own base model."""
    model = load_model(recipe.base, device="cpu")
    rows = 2 * recipe.train_batch_size
    side = recipe.resolution // 2 ** (len(model.vae.config.block_out_channels) - 1)
    modules = {"unet": model.unet, **model.encoders}
    for module in modules.values():
        module.requires_grad_(True)
    step = _flops(lambda: torch.autograd.backward(_forward(model, rows, side).float().pow(2).mean()))
    with torch.no_grad():
        denoising = _flops(lambda: _forward(model, 2, side))
        decoding = _flops(lambda: model.vae.decode(torch.zeros(1, model.vae.config.latent_channels, side, side)))
    trained = sum(weight.numel() for module in modules.values() for weight in module.parameters())
    return Work(step, denoising, decoding, trained)


def measure_peaks(recipe: Recipe, folder: Path, size: int | None = None) -> Peaks:
    """Measure what the floors are divided by.

    Args:
        recipe: says the precision.
        folder: on the disk that is meant.
        size: side of the matrices; None fits the device.
    """
    return Peaks(_peak_flops(recipe, size), _write_speed(folder), _import_seconds())


def _forward(model: Model, rows: int, side: int) -> torch.Tensor:
    """Run text encoder and UNet on rows of nothing, as a training step does."""
    from dreambooth.families import condition, drawn_sizes, encode_text

    ids = [torch.zeros(rows, tokenizer.model_max_length, dtype=torch.long) for tokenizer in model.tokenizers]
    text = encode_text(model.family, list(model.encoders.values()), ids)
    sizes = torch.tensor([drawn_sizes(8 * side)] * rows)
    latents = torch.zeros(rows, model.unet.config.in_channels, side, side)
    predicted: torch.Tensor = model.unet(latents, torch.zeros(rows), **condition(text, sizes)).sample
    return predicted


def _flops(work: object) -> float:
    assert callable(work)
    with FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())


def _peak_flops(recipe: Recipe, size: int | None) -> float:
    device = default_device()
    side = size or (8192 if device.type == "cuda" else 2048)
    dtype = DTYPES[{"no": "float32", "fp16": "float16", "bf16": "bfloat16"}[recipe.mixed_precision]]
    one = torch.randn(side, side, device=device).to(dtype)
    best = float("inf")
    for _ in range(TRIES):
        began = time.perf_counter()
        (one @ one)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best


def _write_speed(folder: Path) -> float:
    content = os.urandom(32 << 20)
    best = float("inf")
    for _ in range(TRIES):
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            began = time.perf_counter()
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            best = min(best, time.perf_counter() - began)
    return len(content) / best


def _import_seconds() -> float:
    program = (
        "import torch, accelerate; from diffusers import UNet2DConditionModel; from transformers import CLIPTextModel"
    )
    best = float("inf")
    for _ in range(2):  # the first one may read them from the disk
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
        best = min(best, time.perf_counter() - began)
    return best
