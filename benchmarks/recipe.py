"""The same recipe for both sides: ours by its stages, and diffusers' train_dreambooth.py as it is."""

import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from benchmarks import usage
from benchmarks.usage import NOTHING, Usage
from dreambooth.photos import PHOTO_SUFFIXES
from dreambooth.prompts import class_prompt, instance_prompt
from dreambooth.yaml12 import dump_yaml, load_yaml

ROOT = Path(__file__).resolve().parents[1]
SUBJECT, CLASS, IDENTIFIER = "subject", "class", "sks"
NO_CHECKPOINT = 10**6
# train_dreambooth.py draws class images with the scheduler of the base and the default steps of its pipeline.
REFERENCE_SAMPLER_STEPS = 50
# What the script does unless told, whatever params.yaml says.
AS_THE_REFERENCE: dict[str, Any] = {
    "optimizer": "adamw", "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_weight_decay": 1e-2, "adam_epsilon": 1e-8,
    "max_grad_norm": 1.0, "text_encoder_learning_rate": None, "lr_scheduler": "constant", "lr_warmup_steps": 0,
    "snr_gamma": None, "huber_c": None, "noise_offset": 0.0, "random_flip": False, "random_crops": 0, "ema_decay": None,
    "early_stopping_patience": None, "load_best_model_at_end": False, "gradient_checkpointing": False,
    "allow_tf32": False, "aspect_buckets": False, "num_processes": 1,
}  # fmt: skip
Variant = Literal["cold", "warm", "short", "checkpoint"]
"""Class images to draw; class images there; the same with few steps; the same with one checkpoint."""


@dataclass(frozen=True)
class Recipe:
    """What both sides are told."""

    base: Path
    photos: Path
    class_noun: str
    resolution: int
    steps: int
    class_images: int
    train_batch_size: int
    sample_batch_size: int
    learning_rate: float
    mixed_precision: str
    sampler_steps: int
    """Of our class images; the reference takes REFERENCE_SAMPLER_STEPS."""
    guidance_scale: float = 7.5
    seed: int = 0

    @property
    def short_steps(self) -> int:
        """Steps of the short run, from which the time of a step and the start-up follow."""
        return max(1, self.steps // 10)

    def steps_of(self, variant: Variant) -> int:
        """Return how many steps a variant takes."""
        return self.short_steps if variant == "short" else self.steps

    def checkpointing_steps(self, variant: Variant) -> int | None:
        """Return the distance of checkpoints: exactly one is written, after the first half, or none."""
        return self.steps // 2 + 1 if variant == "checkpoint" else None


class Side(Protocol):
    """A program under measurement."""

    name: str

    def run(self, variant: Variant) -> Usage:
        """Personalise the base, from photos to a pipeline folder; return what it cost."""


class Ours:
    """validate, prior, train, each a process, and the pipeline put together: what `dvc repro` runs."""

    name = "ours"

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self._recipe, self._folder, self._project = recipe, folder, folder / "project"
        base = self._project / "data/base/bench"
        shutil.rmtree(base, ignore_errors=True)
        shutil.copytree(recipe.base, base)  # a link to a folder is refused
        copy_photos(recipe.photos, self._project / "data/subjects" / SUBJECT)

    def run(self, variant: Variant) -> Usage:
        """See `Side`."""
        for name in ("build", "models", ".scratch", "pipeline"):
            shutil.rmtree(self._project / name, ignore_errors=True)
        if variant == "cold":
            shutil.rmtree(self._folder / "cache", ignore_errors=True)
        (self._project / "params.yaml").write_text(dump_yaml(self.parameters(variant)), encoding="utf-8")
        cost = NOTHING
        for command in (
            ("stages.validate", SUBJECT),
            ("stages.prior", CLASS),
            ("stages.train", SUBJECT),
            ("benchmarks.recipe", "data/base/bench", f"models/{SUBJECT}", "pipeline"),
        ):
            cost += usage.run(
                [sys.executable, "-m", *command], self._project, self._environment(), self._folder / "log"
            )
        return cost

    def parameters(self, variant: Variant) -> dict[str, Any]:
        """Return params.yaml of the repository with the values of the recipe."""
        recipe = self._recipe
        values: dict[str, Any] = load_yaml((ROOT / "params.yaml").read_text(encoding="utf-8"))
        values["base"] = {
            "pretrained_model_name_or_path": "data/base/bench",
            "revision": None,
            "resolution": recipe.resolution,
            "inference_dtype": "float16" if recipe.mixed_precision == "fp16" else _dtype(recipe),
        }
        values["classes"] = {CLASS: {"class_noun": recipe.class_noun}}
        values["subjects"] = {SUBJECT: {"class_id": CLASS, "identifier": IDENTIFIER, "kind": "object"}}
        values["prior"] |= {
            "kind": "images",
            "prompts": ["a photo of {}"],
            "num_class_images": recipe.class_images,
            "scheduler": "dpmsolver++",
            "negative_prompt": "",
            "num_inference_steps": recipe.sampler_steps,
            "guidance_scale": recipe.guidance_scale,
            "batch_size": recipe.sample_batch_size,
        }
        values["train"] |= {
            "method": "full",
            "max_train_steps": recipe.steps_of(variant),
            "train_batch_size": recipe.train_batch_size,
            "gradient_accumulation_steps": 1,
            "train_text_encoder": True,
            **AS_THE_REFERENCE,
            "learning_rate": recipe.learning_rate,
            "prior_loss_weight": 1.0,
            "mixed_precision": recipe.mixed_precision,
            "checkpointing_steps": recipe.checkpointing_steps(variant),
            "evaluation_steps": None,
            "preview_steps": None,
            "save_dtype": "float32",
            "seed": recipe.seed,
        }
        return values

    def _environment(self) -> dict[str, str]:
        own = {"DREAMBOOTH_CACHE": str(self._folder / "cache"), "DREAMBOOTH_TRACKING": "off", "PYTHONPATH": str(ROOT)}
        return {**os.environ, **own, "HF_HUB_OFFLINE": "1"}


class Reference:
    """diffusers' train_dreambooth.py, given by its path, run as it is and stored nowhere.

    Args:
        recipe: what it is told.
        script: its path.
        folder: for all that it writes.
        path: PYTHONPATH of the script alone: where a torchvision for it lies, for example.
    """

    name = "reference"

    def __init__(self, recipe: Recipe, script: Path, folder: Path, path: Sequence[Path] = ()) -> None:
        self._recipe, self._script, self._folder = recipe, script.absolute(), folder
        self.more: list[str] = []
        """Options besides."""
        self._path = os.pathsep.join(str(one.absolute()) for one in path)
        copy_photos(recipe.photos, folder / "photos")

    def run(self, variant: Variant) -> Usage:
        """See `Side`."""
        shutil.rmtree(self._folder / "out", ignore_errors=True)
        if variant == "cold":
            shutil.rmtree(self._folder / "class", ignore_errors=True)
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": self._path}
        return usage.run(self.command(variant), self._folder, environment, self._folder / "log")

    def command(self, variant: Variant) -> list[str]:
        """Return the command line of the script for this recipe."""
        recipe = self._recipe
        precision = {"no": "fp32", "fp16": "fp16", "bf16": "bf16"}[recipe.mixed_precision]
        options: dict[str, Any] = {
            "pretrained_model_name_or_path": recipe.base.absolute(),
            "instance_data_dir": "photos",
            "class_data_dir": "class",
            "output_dir": "out",
            "instance_prompt": instance_prompt(IDENTIFIER, recipe.class_noun),
            "class_prompt": class_prompt(recipe.class_noun),
            "num_class_images": recipe.class_images,
            "sample_batch_size": recipe.sample_batch_size,
            "prior_generation_precision": precision,
            "prior_loss_weight": 1.0,
            "resolution": recipe.resolution,
            "train_batch_size": recipe.train_batch_size,
            "gradient_accumulation_steps": 1,
            "max_train_steps": recipe.steps_of(variant),
            "learning_rate": recipe.learning_rate,
            "lr_scheduler": "constant",
            "lr_warmup_steps": 0,
            "mixed_precision": recipe.mixed_precision,
            "checkpointing_steps": recipe.checkpointing_steps(variant) or NO_CHECKPOINT,
            "seed": recipe.seed,
        }
        told = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        return [
            sys.executable,
            str(self._script),
            *told,
            *self.more,
            "--with_prior_preservation",
            "--train_text_encoder",
        ]


def copy_photos(source: Path, target: Path) -> None:
    """Copy the pictures and nothing else: other files stop the reference, and it cannot read captions."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for path in source.iterdir():
        if path.suffix.lower() in PHOTO_SUFFIXES:
            shutil.copyfile(path, target / path.name)


def find_script(given: Path) -> Path:
    """Return the script: the path itself, or its place in a checkout of diffusers.

    Raises:
        FileNotFoundError: it is in neither.
    """
    for path in (given, given / "examples/dreambooth/train_dreambooth.py", given / "train_dreambooth.py"):
        if path.is_file():
            return path
    raise FileNotFoundError(f"--reference: {given} is neither train_dreambooth.py nor a checkout of diffusers with it")


def _dtype(recipe: Recipe) -> str:
    return "bfloat16" if recipe.mixed_precision == "bf16" else "float32"


def main(arguments: Sequence[str]) -> None:
    """Put a pipeline together: the last step of our recipe, as a process of its own."""
    import torch

    from dreambooth.models import write_pipeline

    base, trained, folder = map(Path, arguments)
    folder.mkdir()
    write_pipeline(base, trained, folder, torch.float16)


if __name__ == "__main__":
    main(sys.argv[1:])
