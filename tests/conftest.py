"""A tiny real pipeline with random weights, a project around it, and photos to train it on."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # a test says what it runs on; those marked gpu set this themselves
os.environ.setdefault("DREAMBOOTH_TRACKING", "off")  # a new database takes seconds; who tests tracking takes this away
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models lose more to the threads' meetings than they win

REPOSITORY = Path(__file__).resolve().parents[1]
TINY_RESOLUTION = 32


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep every test out of the user's caches and settings."""
    monkeypatch.setenv("DREAMBOOTH_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("DREAMBOOTH_SCRATCH", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A StableDiffusionPipeline in the layout of diffusers: every part is real, its weights are random."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    folder = tmp_path_factory.mktemp("base") / "tiny"
    torch.manual_seed(0)
    write_tokenizer(folder / "tokenizer")
    text = CLIPTextConfig(
        vocab_size=514, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=40, bos_token_id=512, eos_token_id=513, pad_token_id=513,
    )  # fmt: skip
    CLIPTextModel(text).save_pretrained(folder / "text_encoder")
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16), latent_channels=4, norm_num_groups=4, sample_size=TINY_RESOLUTION,
    ).save_pretrained(folder / "vae")  # fmt: skip
    UNet2DConditionModel(
        sample_size=TINY_RESOLUTION // 2, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16, attention_head_dim=8,
    ).save_pretrained(folder / "unet")  # fmt: skip
    DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1,
        set_alpha_to_one=False,
    ).save_pretrained(folder / "scheduler")  # fmt: skip
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.42.1",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "feature_extractor": [None, None],
        "safety_checker": [None, None],
        "requires_safety_checker": False,
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


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


@pytest.fixture
def photo() -> Callable[[int, int], Image.Image]:
    """Return a maker of photos: number i shows a disc on a slope, elsewhere and in other colours each time."""
    return make_photo


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


@pytest.fixture
def params_values() -> dict[str, Any]:
    """Return the values of `tiny_values`, to be changed."""
    return tiny_values()


@pytest.fixture
def project(tmp_path: Path, tiny_model_folder: Path, params_values: dict[str, Any]) -> Path:
    """Return a project with the tiny pipeline as its base model and one subject of five photos."""
    return make_project(tmp_path / "project", tiny_model_folder, params_values)


def tiny_values() -> dict[str, Any]:
    """Return params.yaml of this repository as plain values, cut down to what a tiny pipeline does in seconds."""
    values: dict[str, Any] = yaml.safe_load((REPOSITORY / "params.yaml").read_text())
    values["base"] |= {"pretrained_model_name_or_path": "data/base/tiny", "resolution": TINY_RESOLUTION}
    values["classes"] = {"dog": {"class_noun": "dog"}}
    values["subjects"] = {"biscuit": {"class_id": "dog", "identifier": "sks", "kind": "live"}}
    values["prior"] |= {"num_class_images": 5, "num_inference_steps": 2, "batch_size": 2}
    values["train"] |= {"max_train_steps": 4, "train_batch_size": 2, "save_dtype": "float32"}
    values["evaluate"] |= {"seeds": [1, 2], "num_inference_steps": 2}
    return values


def make_project(root: Path, base: Path, values: dict[str, Any]) -> Path:
    """Make a project around a base model."""
    shutil.copytree(base, root / "data/base/tiny")
    (root / "data/prompts").mkdir()
    for kind in ("live", "object"):
        lines = [f"recontextualisation,a photo of {{}} {place}" for place in ("in space", "on a beach", "at home")]
        (root / f"data/prompts/{kind}.csv").write_text("\n".join(["kind,prompt", *lines]) + "\n")
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
