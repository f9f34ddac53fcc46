"""Load, identify and save the parts of a Stable Diffusion pipeline; safetensors only, never code from its folder.

What decides about the last bits of a result has its names here too: device and libraries.
diffusers and transformers are imported when a part is loaded: a stage that finds its work done does not wait for them.
"""

import json
import platform
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch

from dreambooth import adapters, lora, processes
from dreambooth.adapters import EMBEDDINGS_FILE, LORA_FILE
from dreambooth.bases import LOCAL_MODELS, locate, read_json
from dreambooth.errors import ModelError, first_line, machine_fault, shown
from dreambooth.families import FAMILIES, SD, SDXL, Family
from dreambooth.folders import sha256_of, sha256_of_file
from dreambooth.hub import from_hub

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CONTENT_SUFFIXES = (".safetensors", ".json", ".txt")
_PICKLES = frozenset({".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"})
_READ_BESIDE = "adapter_model.bin"  # by transformers, beside weights that it was told to take from safetensors alone
# What is fetched from the hub: the parts, not the same weights again as pickles, fp16 or one file.
_HUB_FILES = [
    "model_index.json",
    *(f"{part}/*{suffix}" for part in SDXL.components for suffix in _CONTENT_SUFFIXES),
]
_HUB_DUPLICATES = ["*.fp16.*", "*non_ema*", "*.ema.*"]
_HUB_CHOICE = " ".join(
    [
        *(f"--include '{pattern}'" for pattern in _HUB_FILES),
        *(f"--exclude '{pattern}'" for pattern in _HUB_DUPLICATES),
    ]
)


@dataclass
class Model:
    """The parts of a pipeline, on one device."""

    unet: "UNet2DConditionModel"
    vae: "AutoencoderKL"
    text_encoder: "CLIPTextModel"
    tokenizer: "CLIPTokenizer"
    scheduler_config: dict[str, Any]
    device: torch.device
    dtype: torch.dtype
    family: Family = SD
    text_encoder_2: "CLIPTextModelWithProjection | None" = None
    tokenizer_2: "CLIPTokenizer | None" = None
    zero_empty_prompt: bool = False
    """Whether an empty negative prompt is read as zeros (force_zeros_for_empty_prompt of SDXL pipelines)."""
    learned_token: str | None = None
    """The word whose embedding is trained, once the vocabulary has it."""

    @property
    def encoders(self) -> dict[str, Any]:
        """Return the text encoders by name, in order, as far as they are in memory."""
        return {name: part for name in self.family.encoders if (part := getattr(self, name)) is not None}

    @property
    def whole_side(self) -> int:
        """Pixels whose multiples are sides of pictures that have whole sizes at every level of autoencoder and UNet."""
        halvings = sum(len(module.config.block_out_channels) - 1 for module in (self.vae, self.unet))
        return int(2**halvings)

    @property
    def tokenizers(self) -> list[Any]:
        """Return the tokenizer of each text encoder."""
        return [getattr(self, name) for name in self.family.tokenizers]


def default_device() -> torch.device:
    """Return the GPU when there is one, this process's own of several, else the CPU."""
    return torch.device("cuda", processes.local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def device_name(device: torch.device) -> str:
    """Name the hardware as far as it decides about the last bits of a result: the GPU, or the CPU's instructions."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that compute."""
    return {package: version(package) for package in ("torch", "diffusers", "transformers", "accelerate")}


def resolve_model(name_or_path: str, revision: str | None, root: Path) -> Path:
    """Return the folder of a model: one of the project, or the local copy of a hub model, fetched when it is missing.

    Arguments as of `bases.locate`.

    Raises:
        ModelError: neither a folder nor to be had from the hub.
    """
    if (folder := locate(name_or_path, revision, root)) is not None:
        return folder
    assert revision is not None  # else it could not be located
    return _fetch(name_or_path, revision)


def load_model(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
    trained: str | Path | None = None,
    unet_dtype: torch.dtype | None = None,
    parts: Sequence[str] | None = None,
) -> Model:
    """Load the parts of a pipeline folder in evaluation mode.

    Args:
        path: a folder in the layout of diffusers.
        dtype: of the weights.
        device: None is the GPU when there is one.
        trained: a folder of a training (models/<subject>): parts that stand in for those of `path`, or a LoRA that
            is merged into them and an embedding that extends the vocabulary.
        unet_dtype: of the weights of the UNet, before they are moved to the device; None: the same.
        parts: names of those that are loaded, the others are None; None: all of them.

    Raises:
        ModelError: not a folder of a Stable Diffusion pipeline, or a part is missing or torn.
    """
    folder = Path(path)
    family = check_model_folder(folder)
    places = {part: folder / part for part in family.components}
    places |= {part: Path(trained) / part for part in family.components if trained and (Path(trained) / part).is_dir()}
    place = torch.device(device) if device is not None else default_device()
    try:
        loaded = {
            name: _load_part(name, places[name], dtype) if parts is None or name in parts else None
            for name in family.components
            if name != "scheduler"
        }
    except Exception as error:  # safetensors, json, OS and value errors alike: a file is missing or torn
        if machine_fault(error):  # to fetch it again would not help
            raise
        raise ModelError(f"{folder} cannot be loaded ({first_line(error)}); fetch it again") from error
    model = Model(
        **loaded,
        scheduler_config=read_json(places["scheduler"] / "scheduler_config.json"),
        device=place,
        dtype=dtype,
        family=family,
        zero_empty_prompt=read_json(folder / "model_index.json").get("force_zeros_for_empty_prompt", family is SDXL),
    )
    if trained is not None:
        load_trained(model, Path(trained))
    if unet_dtype is not None:
        cast_module(model.unet, unet_dtype)
    for name in family.weighted:
        if (module := getattr(model, name)) is None:
            continue
        module.requires_grad_(False).eval()
        module.to(place, memory_format=_memory_format(name, place, family))
    return model


def _memory_format(part: str, device: torch.device, family: Family) -> torch.memory_format:
    """Return the order of a part's weights in memory that it computes fastest with: docs/log.md, 2026-11-29."""
    if part in family.encoders or (part == "unet" and device.type == "cpu"):
        return torch.preserve_format
    return torch.channels_last


def load_trained(model: Model, trained: Path) -> None:
    """Put the embedding and the LoRA of a training, if it made any, into a model.

    The sum is formed in float32, whatever the precision of the model.

    Raises:
        ModelError: a file is torn, or of another base.
    """
    if (trained / EMBEDDINGS_FILE).is_file():
        token, vectors = adapters.load_embeddings(trained / EMBEDDINGS_FILE)
        for tokenizer, encoder, vector in zip(model.tokenizers, model.encoders.values(), vectors, strict=True):
            adapters.set_embedding(encoder, adapters.add_token(tokenizer, encoder, token), vector)
        model.learned_token = token
    if (trained / LORA_FILE).is_file():
        modules = {"unet": model.unet, **model.encoders}
        for module in modules.values():
            module.float()
        lora.merge_lora(trained / LORA_FILE, modules)
        for module in modules.values():
            cast_module(module, model.dtype)


def cast_module(module: torch.nn.Module, dtype: torch.dtype) -> None:
    """Change the precision of a module in place, without the warning of diffusers where nothing has to stay in float32.

    Its own `to` warns of an empty list as well.
    """
    if getattr(module, "_keep_in_fp32_modules", None):
        module.to(dtype)
    else:
        torch.nn.Module.to(module, dtype)


def changed_parts(model: Model, trained: Path) -> list[str]:
    """Name the parts of a model that differ from the base once `load_trained` was called."""
    parts = []
    if (trained / EMBEDDINGS_FILE).is_file():
        parts += [*model.family.encoders, *model.family.tokenizers]
    if (trained / LORA_FILE).is_file():
        parts += lora.parts_of_lora(trained / LORA_FILE)
    return sorted(set(parts))


def _load_part(name: str, folder: Path, dtype: torch.dtype) -> Any:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # bars for milliseconds hide those that matter
    if name.startswith("tokenizer"):
        return CLIPTokenizer.from_pretrained(folder)
    if name == "unet":
        return UNet2DConditionModel.from_pretrained(folder, torch_dtype=dtype, use_safetensors=True)
    if name == "vae":  # that of SDXL overflows in float16, and says so; diffusers takes that of SD1.5 for such a one
        upcast = read_json(folder / "config.json").get("force_upcast", False)
        kept = torch.float32 if upcast else dtype
        return AutoencoderKL.from_pretrained(folder, torch_dtype=kept, use_safetensors=True)
    kind = CLIPTextModel if name == "text_encoder" else CLIPTextModelWithProjection
    return kind.from_pretrained(folder, dtype=dtype, use_safetensors=True)


def check_model_folder(folder: Path) -> Family:
    """Return the family of a pipeline; refuse a folder of another, without a part, or with code or pickles.

    In the cache of the hub other programs leave files as well, which are not read here: docs/decisions/0073.
    """
    index = read_json(folder / "model_index.json")
    family = FAMILIES.get(str(index.get("_class_name")))
    if family is None:
        raise ModelError(
            f"{folder}/model_index.json is of a {index.get('_class_name')}; a {' or a '.join(FAMILIES)} (SD1.x, SD2.x, "
            "SDXL) is needed"
        )
    missing = [part for part in family.components if not (folder / part).is_dir()]
    if missing:
        raise ModelError(f"{folder} lacks {', '.join(missing)}; fetch the model again")
    files = sorted(path.relative_to(folder) for path in folder.rglob("*"))
    if _is_of_hub(folder):
        files = [path for path in files if path.name == _READ_BESIDE]
    code = [path.name for path in files if path.suffix == ".py"]
    if code:
        raise ModelError(f"{folder} holds code ({', '.join(code)}), which is never run; use a model without any")
    if lacking := [part for part in family.weighted if not any(map(_is_weights, (folder / part).iterdir()))]:
        raise ModelError(_without_weights(folder, lacking))
    for part in family.weighted:
        _require_own_shards(folder / part)
    pickles = [path.as_posix() for path in files if path.suffix in _PICKLES]
    if pickles:
        raise ModelError(
            f"{folder} holds pickles ({', '.join(pickles[:5])}), which can run code; the .safetensors are enough: "
            "delete them"
        )
    return family


def _without_weights(folder: Path, parts: Sequence[str]) -> str:
    """Say what lies in parts of a pipeline in place of weights that can be read, and what makes them readable."""
    kinds = _PICKLES | {".safetensors"}
    there = sorted({path.name for part in parts for path in (folder / part).iterdir() if path.suffix in kinds})
    none = "none; of the hub neither other precisions nor pickles are fetched" if _is_of_hub(folder) else "none"
    return (
        f"{folder}: no plain .safetensors in {', '.join(parts)} (weights there: {', '.join(there) or none}); "
        f"take a base that has them, or mend a copy in {LOCAL_MODELS}: rename x.fp16.safetensors to x.safetensors, and "
        "convert pickles, which can run code"
    )


def _require_own_shards(part: Path) -> None:
    """Refuse an index of shards that leads to anything but weights beside it: no hash covers it, pickles run code."""
    for index in sorted(path for path in part.glob("*.safetensors.index.json") if not _is_duplicate(path)):
        shards = read_json(index).get("weight_map")
        names = list(shards.values()) if isinstance(shards, dict) else [shards]
        if foreign := sorted({str(name) for name in names if not _is_shard(part, name)}):
            raise ModelError(
                f"{index} names {', '.join(map(shown, foreign[:5]))}, which should be .safetensors beside it, in no "
                "other precision; fetch the model again"
            )


def _is_shard(part: Path, name: object) -> bool:
    return isinstance(name, str) and Path(name).name == name and _is_weights(part / name) and (part / name).is_file()


def _is_of_hub(folder: Path) -> bool:
    """Whether a folder lies in the cache of the hub, which all programs of its user share."""
    from huggingface_hub import constants

    return folder.absolute().is_relative_to(Path(constants.HF_HUB_CACHE).absolute())


def _is_weights(path: Path) -> bool:
    return path.suffix == ".safetensors" and not _is_duplicate(path)


def _is_duplicate(path: Path) -> bool:
    """Whether a file has the same weights again, in another precision."""
    return any(path.match(pattern) for pattern in _HUB_DUPLICATES)


def model_hash(folder: Path, parts: Sequence[str] = SDXL.components) -> str:
    """Return one sha256 over the weights and configurations of a pipeline's parts, wherever the folder lies."""
    files = [path for part in parts for path in _content_files(folder, part)]
    return sha256_of({path.relative_to(folder).as_posix(): sha256_of_file(path) for path in files})


def save_parts(model: Model, folder: Path, dtype: torch.dtype, parts: Sequence[str]) -> None:
    """Write parts of a model as safetensors in the layout of diffusers.

    Args:
        model: after training.
        folder: gets a folder for each part.
        dtype: of the saved weights.
        parts: names of the UNet, text encoders or tokenizers.
    """
    for part in parts:
        module = getattr(model, part)
        if part.startswith("tokenizer"):
            module.save_pretrained(folder / part)
        elif part == "unet":
            module.save_config(folder / part)
            weights = _cast_weights(module, dtype)
            file = folder / part / "diffusion_pytorch_model.safetensors"
            safetensors.torch.save_file(weights, file, metadata={"format": "pt"})
            _forget_origin(folder / part / "config.json")
        else:  # transformers gives the weights the names they have on the hub, which are not those in memory
            module.save_pretrained(folder / part, state_dict=_cast_weights(module, dtype))
            _forget_origin(folder / part / "config.json")


def write_pipeline(base: Path, trained: Path, folder: Path, dtype: torch.dtype) -> None:
    """Put a whole pipeline together: the trained parts, and copies of the base's other ones.

    The result is what `from_pretrained(folder)` of the family's pipeline in diffusers loads. No safety checker is
    part of it, also where the base had one: the card says so.

    Args:
        base: the untouched pipeline.
        trained: folder of a training; whole parts are copied, a LoRA or an embedding is merged into those of the base.
        folder: is filled.
        dtype: of the weights of merged parts.
    """
    family = check_model_folder(base)
    merged: list[str] = []
    if (trained / LORA_FILE).is_file() or (trained / EMBEDDINGS_FILE).is_file():
        model = load_model(base, device="cpu", trained=trained)
        merged = changed_parts(model, trained)
        save_parts(model, folder, dtype, merged)
    for part in family.components:
        if part in merged:
            continue
        source = trained / part if (trained / part).is_dir() else base / part
        for file in _content_files(source.parent, part):
            target = folder / part / file.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    index = read_json(base / "model_index.json")
    kept = {key: value for key, value in index.items() if key.startswith(("_", "force_")) and key != "_name_or_path"}
    kept |= {part: index[part] for part in family.components}
    if family is SD:
        kept |= {"feature_extractor": [None, None], "safety_checker": [None, None], "requires_safety_checker": False}
    else:
        kept |= {"feature_extractor": [None, None], "image_encoder": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


def _cast_weights(module: torch.nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return a state dict on the CPU, its floating-point tensors in another precision."""
    return {
        name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None).contiguous()
        for name, tensor in module.state_dict().items()
    }


def _forget_origin(path: Path) -> None:
    """Take the folder that the base was loaded from out of a config: equal trainings, equal bytes."""
    config = read_json(path)
    config.pop("_name_or_path", None)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _content_files(folder: Path, part: str) -> list[Path]:
    """List what counts of one part of a pipeline, without the same weights again in another precision."""
    files = sorted((folder / part).rglob("*"))
    return [path for path in files if path.suffix in _CONTENT_SUFFIXES and not _is_duplicate(path)]


def _fetch(repo_id: str, revision: str) -> Path:
    from huggingface_hub import snapshot_download

    remedy = f"where there is a network: hf download {repo_id} --revision {revision} {_HUB_CHOICE}"
    with from_hub(repo_id, revision, f"{repo_id} at {revision}", remedy):
        return Path(
            snapshot_download(repo_id, revision=revision, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_DUPLICATES)
        )
