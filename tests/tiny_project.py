"""Parts of a project that trains in seconds: photos, parameters, folders, and the tokenizer of a tiny pipeline."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[1]
TINY_RESOLUTION = 32


def write_tokenizer(folder: Path) -> None:
    """Write a CLIPTokenizer over the bare byte alphabet: no merges, so that any prompt can be tokenised."""
    from transformers import CLIPTokenizer

    letters = byte_alphabet()
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer.from_pretrained(folder, model_max_length=40).save_pretrained(folder)


def byte_alphabet() -> list[str]:
    """Return the 256 printable stand-ins of bytes of byte-level BPE (Radford et al. 2019)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def make_photo(number: int, side: int = 96) -> Image.Image:
    """Draw photo `number`: pixels that a hash tells apart from those of any other number."""
    rng = np.random.default_rng(number)
    y, x = np.mgrid[0:side, 0:side] / side
    centre, slope, colours = rng.uniform(0.3, 0.7, 2), rng.uniform(-1, 1, 2), rng.uniform(0, 255, (2, 3))
    disc = ((x - centre[0]) ** 2 + (y - centre[1]) ** 2 < rng.uniform(0.03, 0.1))[..., None]
    shade = (slope[0] * x + slope[1] * y)[..., None] * 80
    noise = rng.normal(0, 12, (side // 8, side // 8, 1)).repeat(8, 0).repeat(8, 1)
    pixels = np.where(disc, colours[0], colours[1] + shade) + noise
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def tiny_values() -> dict[str, Any]:
    """Return params.yaml of this repository as plain values, cut down to what a tiny pipeline does in seconds."""
    values: dict[str, Any] = yaml.safe_load((REPOSITORY / "params.yaml").read_text())
    values["base"] |= {"pretrained_model_name_or_path": "data/base/tiny", "resolution": TINY_RESOLUTION}
    values["classes"] = {"dog": {"class_noun": "dog"}}
    values["subjects"] = {"biscuit": {"class_id": "dog", "identifier": "sks", "kind": "live"}}
    values["prior"] |= {"num_class_images": 5, "num_inference_steps": 2, "batch_size": 2}
    values["train"] |= {"max_train_steps": 4, "train_batch_size": 2, "save_dtype": "float32"}
    values["train"] |= {"lr_scheduler": "constant", "snr_gamma": 5.0, "evaluation_steps": None, "preview_steps": None}
    values["evaluate"] |= {"seeds": [1, 2], "num_inference_steps": 2, "num_class_images": 4}
    return values


def make_project(root: Path, base: Path, values: dict[str, Any]) -> Path:
    """Make a project around a base model."""
    shutil.copytree(base, root / "data/base/tiny")
    (root / "data/classes").mkdir()
    folder = root / values["evaluate"]["prompts"]
    folder.mkdir(parents=True)
    for kind in ("live", "object"):
        lines = [f"recontextualisation,a photo of {{}} {place}" for place in ("in space", "on a beach", "at home")]
        (folder / f"{kind}.csv").write_text("\n".join(["kind,prompt", *lines]) + "\n")
    add_photos(root / "data/subjects/biscuit", 5)
    write_params(root, values)
    return root


def add_photos(folder: Path, count: int, first: int = 0) -> None:
    """Write `count` photos."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        make_photo(number).save(folder / f"{number:02d}.png")


def write_params(root: Path, values: dict[str, Any]) -> None:
    """Write params.yaml of a project."""
    (root / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
