"""Load, identify and save the parts of a Stable Diffusion pipeline; safetensors only, never code from its folder."""

import errno
import json
import platform
import resource
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from dreambooth import processes
from dreambooth.errors import ModelError
from dreambooth.folders import sha256_of, sha256_of_file

transformers_logging.disable_progress_bar()  # bars for milliseconds hide those that matter

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
COMPONENTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
LOCAL_MODELS = "data/base"  # what the stages depend on, see dvc.yaml
PIPELINE_CLASS = "StableDiffusionPipeline"
_CONTENT_SUFFIXES = (".safetensors", ".json", ".txt")
_PICKLES = frozenset({".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"})
# What is fetched from the hub: the five parts, not the same weights again as pickles, fp16 or one file.
_HUB_FILES = ["model_index.json", *(f"{part}/*{suffix}" for part in COMPONENTS for suffix in _CONTENT_SUFFIXES)]
_HUB_DUPLICATES = ["*.fp16.*", "*non_ema*", "*.ema.*"]
_HUB_INCLUDE = " ".join(f"--include '{pattern}'" for pattern in _HUB_FILES)


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
    """Return the GPU when there is one, this process's own of several, else the CPU."""
    return torch.device("cuda", processes.local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def device_name(device: torch.device) -> str:
    """Name the hardware as far as it decides about the last bits of a result: the GPU, or the CPU's instructions."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def peak_megabytes() -> float:
    """Return the most memory that this process has held so far: of the GPU when there is one, else of the machine."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that compute."""
    return {package: version(package) for package in ("torch", "diffusers", "transformers", "accelerate")}


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
        if not folder.absolute().is_relative_to(root.absolute() / LOCAL_MODELS):
            raise ModelError(
                f"base.pretrained_model_name_or_path: {name_or_path} is not in {LOCAL_MODELS}, where its changes would "
                "be seen; move or copy it there"
            )
        if revision is not None:
            raise ModelError(f"base.revision: {name_or_path} is a folder, which has no revision; write null")
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
    """Refuse a folder that is no Stable Diffusion pipeline, lacks a part, or holds code or pickles."""
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
    lacking = [part for part in ("unet", "vae", "text_encoder") if not list((folder / part).glob("*.safetensors"))]
    if lacking:
        raise ModelError(
            f"{folder}: no .safetensors in {', '.join(lacking)}; pickled weights can run code, convert them"
        )
    pickles = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix in _PICKLES)
    if pickles:
        raise ModelError(
            f"{folder} holds pickles ({', '.join(pickles[:5])}), which can run code; the .safetensors are enough: "
            "delete them"
        )


def model_hash(folder: Path, parts: Sequence[str] = COMPONENTS) -> str:
    """Return one sha256 over the weights and configurations of a pipeline's parts, wherever the folder lies."""
    files = [path for part in parts for path in _content_files(folder, part)]
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
    weights = _cast_weights(model.unet, dtype)
    safetensors.torch.save_file(weights, folder / "unet/diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    _forget_origin(folder / "unet/config.json")
    if text_encoder:  # transformers gives the weights the names they have on the hub, which are not those in memory
        weights = _cast_weights(model.text_encoder, dtype)
        model.text_encoder.save_pretrained(folder / "text_encoder", state_dict=weights)
        _forget_origin(folder / "text_encoder/config.json")


def write_pipeline(base: Path, trained: Path, folder: Path) -> None:
    """Put a whole pipeline together: the trained parts, and copies of the base's other ones.

    The result is what `StableDiffusionPipeline.from_pretrained(folder)` of diffusers loads. No safety checker is
    part of it, also where the base had one: the card says so.
    """
    for part in COMPONENTS:
        source = trained / part if (trained / part).is_dir() else base / part
        for file in _content_files(source.parent, part):
            target = folder / part / file.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    index = _read_json(base / "model_index.json")
    kept = {key: value for key, value in index.items() if key.startswith("_") and key != "_name_or_path"}
    kept |= {part: index[part] for part in COMPONENTS}
    kept |= {"feature_extractor": [None, None], "safety_checker": [None, None], "requires_safety_checker": False}
    (folder / "model_index.json").write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


def _cast_weights(module: torch.nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return a state dict on the CPU, its floating-point tensors in another precision."""
    return {
        name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None).contiguous()
        for name, tensor in module.state_dict().items()
    }


def _forget_origin(path: Path) -> None:
    """Take the folder that the base was loaded from out of a config: equal trainings, equal bytes."""
    config = _read_json(path)
    config.pop("_name_or_path", None)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _content_files(folder: Path, part: str) -> list[Path]:
    """List what counts of one part of a pipeline, without the same weights again in another precision."""
    files = sorted((folder / part).rglob("*"))
    return [
        path
        for path in files
        if path.suffix in _CONTENT_SUFFIXES and not any(path.match(pattern) for pattern in _HUB_DUPLICATES)
    ]


def _fetch(repo_id: str, revision: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            repo_id, revision=revision, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_DUPLICATES
        )
    except Exception as error:  # the hub raises errors of its own, of its HTTP client, and ValueError
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"{repo_id} at {revision} is neither on this machine nor to be had from the hub ({first_line}); "
            f"where there is a network: hf download {repo_id} --revision {revision} {_HUB_INCLUDE}"
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
