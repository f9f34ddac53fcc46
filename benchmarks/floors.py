"""What a number could be at best on this machine: its arithmetic, or its bytes, over a measured peak.

FLOP: floating-point operations, two for a multiplication and its addition. The arithmetic is counted by torch, for the
UNet, the text encoder and the decoder of the real model at the real sizes.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.recipe import Recipe
from dreambooth.methods import HALF
from dreambooth.models import Model, default_device, load_model

BYTES_OF_MOMENTS_AND_WEIGHT = 12  # a float32 weight and its two moments of Adam: what a checkpoint holds
BYTES_OF_TRAINING = 16  # the same, and the gradient
TRIES = 5
TRAINING = (
    "import torch, accelerate; from diffusers import UNet2DConditionModel; from transformers import CLIPTextModel"
)
"""The libraries that both sides of the benchmark import."""


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


def count_work(base: Path, train_batch_size: int, resolution: int) -> Work:
    """Count the arithmetic of a training and its class images on a base model.

    Args:
        base: a pipeline.
        train_batch_size: rows of the subject in a step; as many are of its class.
        resolution: side of a picture, in pixels.
    """
    model = load_model(base, device="cpu")
    rows = 2 * train_batch_size
    side = resolution // 2 ** (len(model.vae.config.block_out_channels) - 1)
    modules = {"unet": model.unet, **model.encoders}
    for module in modules.values():
        module.requires_grad_(True)
    step = _flops(lambda: torch.autograd.backward(_forward(model, rows, side).float().pow(2).mean()))
    with torch.no_grad():
        denoising = _flops(lambda: _forward(model, 2, side))
        decoding = _flops(lambda: model.vae.decode(torch.zeros(1, model.vae.config.latent_channels, side, side)))
    trained = sum(weight.numel() for module in modules.values() for weight in module.parameters())
    return Work(step, denoising, decoding, trained)


def measure_peaks(mixed_precision: str, folder: Path, size: int | None = None) -> Peaks:
    """Measure what the floors are divided by.

    Args:
        mixed_precision: no, fp16 or bf16.
        folder: on the disk that is meant.
        size: side of the matrices; None fits the device.
    """
    return Peaks(peak_flops(mixed_precision, size), write_speed(folder), import_seconds(TRAINING))


def peak_flops(mixed_precision: str, size: int | None = None) -> float:
    """Return FLOP a second of a product of large matrices.

    Args:
        mixed_precision: no, fp16 or bf16.
        size: side of the matrices; None fits the device.
    """
    device = default_device()
    side = size or (8192 if device.type == "cuda" else 2048)
    one = torch.randn(side, side, device=device).to(HALF[mixed_precision] or torch.float32)
    return 2 * side**3 / _least_seconds(lambda: (one @ one)[0, 0].item())  # .item() waits for the device


def write_speed(folder: Path) -> float:
    """Return bytes a second to the disk of a folder, synced."""
    content = os.urandom(32 << 20)

    def write() -> None:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    return len(content) / _least_seconds(write)


def import_seconds(program: str) -> float:
    """Return the seconds of a process that only imports; the first of two may read the libraries from the disk."""
    command = [sys.executable, "-c", program]
    return _least_seconds(lambda: subprocess.run(command, check=True, capture_output=True), tries=2)


def decode_seconds(photos: Sequence[Path]) -> float:
    """Return the seconds in which pillow reads so many photos from memory that knows them, one after the other."""

    def decode() -> None:
        for path in photos:
            with Image.open(path) as image:
                image.load()

    return _least_seconds(decode)


def _forward(model: Model, rows: int, side: int) -> torch.Tensor:
    """Run text encoder and UNet on rows of nothing, as a training step does."""
    from dreambooth.families import condition, drawn_sizes, encode_text

    ids = [torch.zeros(rows, tokenizer.model_max_length, dtype=torch.long) for tokenizer in model.tokenizers]
    text = encode_text(model.family, list(model.encoders.values()), ids)
    sizes = torch.tensor([drawn_sizes(8 * side)] * rows)
    latents = torch.zeros(rows, model.unet.config.in_channels, side, side)
    predicted: torch.Tensor = model.unet(latents, torch.zeros(rows), **condition(text, sizes)).sample
    return predicted


def _flops(work: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())


def hash_seconds(files: Sequence[Path]) -> float:
    """Return the seconds in which so many files are read and hashed, one after the other."""
    return _least_seconds(lambda: [hashlib.sha256(path.read_bytes()).digest() for path in files])


def parse_seconds(file: Path) -> float:
    """Return the seconds in which libyaml, the fastest parser at hand, reads a file."""
    content = file.read_bytes()
    return _least_seconds(lambda: yaml.load(content, Loader=yaml.CSafeLoader))


def _least_seconds(work: Callable[[], object], tries: int = TRIES) -> float:
    best = float("inf")
    for _ in range(tries):
        began = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - began)
    return best
