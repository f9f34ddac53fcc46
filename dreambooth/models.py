"""Load, identify and save the parts of a Stable Diffusion pipeline; safetensors only, never code from its folder."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from dreambooth.errors import ModelError
from dreambooth.folders import sha256_of, sha256_of_file

transformers_logging.disable_progress_bar()  # bars for milliseconds hide those that matter

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
COMPONENTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
PIPELINE_CLASS = "StableDiffusionPipeline"
_CONTENT_SUFFIXES = (".safetensors", ".json", ".txt")
# What is fetched from the hub: the five parts, not the same weights again as pickles, fp16 or one file.
_HUB_FILES = ["model_index.json", *(f"{part}/*{suffix}" for part in COMPONENTS for suffix in _CONTENT_SUFFIXES)]
_HUB_DUPLICATES = ["*.fp16.*", "*non_ema*", "*.ema.*"]


@dataclass
class Model:
    """The parts of a pipeline, on one device."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler_config: dict[str, Any]
    device: torch.device
    dtype: torch.dtype


def default_device() -> torch.device:
    """Return the GPU when there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def resolve_model(name_or_path: str, revision: str | None, root: Path) -> Path:
    """Return the folder of a model: one of the project, or the local copy of a hub model, fetched when it is missing.

    Args:
        name_or_path: a folder, absolute or in the project, or a hub id.
        revision: commit of a hub model; required for one, because a branch moves.
        root: the project's folder.

    Raises:
        ModelError: neither a folder nor to be had from the hub.
    """
    folder = root / name_or_path
    if folder.is_dir():
        return folder
    if name_or_path.count("/") != 1 or name_or_path.startswith((".", "/")):
        raise ModelError(
            f"base.pretrained_model_name_or_path: {name_or_path} is no folder in {root} and no hub id (owner/name)"
        )
    if revision is None:
        raise ModelError(
            f"base.revision: should be the 40-digit commit of the hub model {name_or_path}; a branch moves"
        )
    return _fetch(name_or_path, revision)


def load_model(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
    trained: str | Path | None = None,
) -> Model:
    """Load the parts of a pipeline folder in evaluation mode.

    Args:
        path: a folder in the layout of diffusers.
        dtype: of the weights.
        device: None is the GPU when there is one.
        trained: a folder with parts that stand in for those of `path` (models/<subject>).

    Raises:
        ModelError: not a folder of a StableDiffusionPipeline, or a part is missing or torn.
    """
    folder = Path(path)
    check_model_folder(folder)
    parts = {part: folder / part for part in COMPONENTS}
    parts |= {part: Path(trained) / part for part in COMPONENTS if trained and (Path(trained) / part).is_dir()}
    place = torch.device(device) if device is not None else default_device()
    try:
        unet = UNet2DConditionModel.from_pretrained(parts["unet"], torch_dtype=dtype, use_safetensors=True)
        vae = AutoencoderKL.from_pretrained(parts["vae"], torch_dtype=dtype, use_safetensors=True)
        text_encoder = CLIPTextModel.from_pretrained(parts["text_encoder"], dtype=dtype, use_safetensors=True)
        tokenizer = CLIPTokenizer.from_pretrained(parts["tokenizer"])
    except Exception as error:  # safetensors, json, OS and value errors alike: a file is missing or torn
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"{folder} cannot be loaded ({first_line}); fetch it again") from error
    for module in (unet, vae, text_encoder):
        module.requires_grad_(False).eval()
    return Model(
        unet=unet.to(place, memory_format=torch.channels_last),
        vae=vae.to(place, memory_format=torch.channels_last),
        text_encoder=text_encoder.to(place),
        tokenizer=tokenizer,
        scheduler_config=_read_json(parts["scheduler"] / "scheduler_config.json"),
        device=place,
        dtype=dtype,
    )


def check_model_folder(folder: Path) -> None:
    """Refuse a folder that is no Stable Diffusion pipeline, lacks a part, or holds code or pickled weights only."""
    index = _read_json(folder / "model_index.json")
    if index.get("_class_name") != PIPELINE_CLASS:
        raise ModelError(
            f"{folder}/model_index.json is of a {index.get('_class_name')}; a {PIPELINE_CLASS} (SD1.x, SD2.x) is needed"
        )
    missing = [part for part in COMPONENTS if not (folder / part).is_dir()]
    if missing:
        raise ModelError(f"{folder} lacks {', '.join(missing)}; fetch the model again")
    code = [path.name for path in folder.rglob("*.py")]
    if code:
        raise ModelError(f"{folder} holds code ({', '.join(code)}), which is never run; use a model without any")
    pickled = [part for part in ("unet", "vae", "text_encoder") if not list((folder / part).glob("*.safetensors"))]
    if pickled:
        raise ModelError(
            f"{folder}: no .safetensors in {', '.join(pickled)}; pickled weights can run code, convert them"
        )


def model_hash(folder: Path, parts: Sequence[str] = COMPONENTS) -> str:
    """Return one sha256 over the weights and configurations of a pipeline's parts, wherever the folder lies."""
    files = [path for part in parts for path in sorted((folder / part).rglob("*")) if path.suffix in _CONTENT_SUFFIXES]
    return sha256_of({path.relative_to(folder).as_posix(): sha256_of_file(path) for path in files})


def save_trained(model: Model, folder: Path, dtype: torch.dtype, text_encoder: bool) -> None:
    """Write the trained parts as safetensors in the layout of diffusers.

    Args:
        model: after training.
        folder: gets unet/ and, if trained, text_encoder/.
        dtype: of the saved weights.
        text_encoder: whether it was trained too.
    """
    model.unet.save_config(folder / "unet")
    _save_weights(model.unet, folder / "unet/diffusion_pytorch_model.safetensors", dtype)
    if text_encoder:
        model.text_encoder.config.save_pretrained(folder / "text_encoder")
        _save_weights(model.text_encoder, folder / "text_encoder/model.safetensors", dtype)


def write_pipeline(base: Path, trained: Path, folder: Path) -> None:
    """Put a whole pipeline together: the trained parts, and copies of the base's other ones.

    The result is what `StableDiffusionPipeline.from_pretrained(folder)` of diffusers loads. No safety checker is
    part of it, also where the base had one: the card says so.
    """
    for part in COMPONENTS:
        source = trained / part if (trained / part).is_dir() else base / part
        for file in sorted(path for path in source.rglob("*") if path.suffix in _CONTENT_SUFFIXES):
            target = folder / part / file.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    index = _read_json(base / "model_index.json")
    kept = {key: value for key, value in index.items() if key.startswith("_") and key != "_name_or_path"}
    kept |= {part: index[part] for part in COMPONENTS}
    kept |= {"feature_extractor": [None, None], "safety_checker": [None, None], "requires_safety_checker": False}
    (folder / "model_index.json").write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


def _save_weights(module: torch.nn.Module, path: Path, dtype: torch.dtype) -> None:
    """Write a state dict, and take the place where the base was loaded from out of the config beside it."""
    tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in module.state_dict().items()}
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    config = _read_json(path.parent / "config.json")
    config.pop("_name_or_path", None)
    (path.parent / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _fetch(repo_id: str, revision: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            repo_id, revision=revision, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_DUPLICATES
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"{repo_id} at {revision} is neither on this machine nor to be had from the hub ({first_line}); "
            f"where there is a network: hf download {repo_id} --revision {revision}"
        ) from error
    return Path(folder)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path} is missing; {path.parent} should be a pipeline in the layout of diffusers") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is not JSON ({error}); fetch the model again") from None
    return content
