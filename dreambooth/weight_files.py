"""Write weights as safetensors with a header for other programs: the same content gives the same bytes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from dreambooth.errors import ModelError
from dreambooth.params import Params
from dreambooth.schedule import max_train_steps

# Stability-AI/ModelSpec 1.0.0, "Architecture"; ComfyUI and the web UIs show it, and choose a loader by it.
# By family and prediction; kohya-ss/sd-scripts, library/sai_model_spec.py has the same ones.
_ARCHITECTURE = {
    "sd1": "stable-diffusion-v1",
    "sd2": "stable-diffusion-v2-512",
    "sd2_v": "stable-diffusion-v2-768-v",
    "sdxl": "stable-diffusion-xl-v1-base",
}
_KOHYA_BASE = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}  # kohya-ss/sd-scripts, library/train_util.py
_OPTIMIZERS = {  # kohya-ss/sd-scripts names the class
    "adamw": "torch.optim.adamw.AdamW",
    "adamw_8bit": "bitsandbytes.optim.adamw.AdamW8bit",
    "prodigy": "prodigyopt.prodigy.Prodigy",
}
_KINDS = {"single_file": "", "kohya": "/lora", "lora": "/lora", "embedding": "/textual-inversion"}


def write_weights(path: Path, weights: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    """Write a safetensors file whose header is in the order of its names.

    safetensors writes the entries of a header in any order; here equal content has to give equal bytes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path, dict(header))
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        content = json.loads(file.read(length))
        content["__metadata__"] = dict(sorted(content["__metadata__"].items()))
        ordered = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(ordered) <= length, "the same entries take no more room"
        file.seek(8)
        file.write(ordered.ljust(length))


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a file of weights, or those of one part of a pipeline: one file or several.

    Raises:
        ModelError: there are none, or one is torn.
    """
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise ModelError(f"{path} has no weights (.safetensors); run the stage that makes them again")
    try:
        return {name: tensor for file in files for name, tensor in safetensors.torch.load_file(file).items()}
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} cannot be read ({error}); run the stage that makes it again") from error


def cast_weights(weights: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the weights, those that are floating-point in another precision."""
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in weights.items()}


def modelspec(kind: str, family: str, title: str, params: Params, about: Mapping[str, str]) -> dict[str, str]:
    """Return the header of Stability-AI/ModelSpec 1.0.0, without a date: equal work, equal bytes.

    Args:
        kind: single_file, lora, kohya or embedding.
        family: sd1, sd2 or sdxl.
        title: of the model.
        params: of the project.
        about: more entries, without their prefix: description, trigger_phrase, prediction_type (epsilon or v).
    """
    side = params.base.resolution
    entries = {
        "sai_model_spec": "1.0.0",
        "architecture": _ARCHITECTURE.get(family + _v(about), _ARCHITECTURE[family]) + _KINDS[kind],
        "implementation": "https://github.com/Stability-AI/generative-models" if kind == "single_file" else "diffusers",
        "title": title,
        "resolution": f"{side}x{side}",
        "tags": "dreambooth",
    }
    if params.export.license is not None:
        entries["license"] = params.export.license
    return {f"modelspec.{name}": value for name, value in (entries | dict(about)).items()}


def kohya_header(
    family: str,
    rank: int,
    alpha: float,
    name: str,
    params: Params,
    photos: int,
    class_images: int,
    about: Mapping[str, str],
) -> dict[str, str]:
    """Return the ss_ entries that kohya's trainer writes (kohya-ss/sd-scripts, train_network.py), as far as they hold.

    Args:
        family: sd1, sd2 or sdxl.
        rank: of the layers.
        alpha: of the layers.
        name: of the file.
        params: of the project.
        photos: how many the subject has.
        class_images: how many were trained on.
        about: as of `modelspec`; prediction_type.
    """
    train, base = params.train, params.base
    values: dict[str, Any] = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": rank,
        "ss_network_alpha": alpha,
        "ss_base_model_version": _KOHYA_BASE[family] + (_v(about) if family != "sdxl" else ""),
        "ss_v2": family == "sd2",
        "ss_sd_model_name": base.pretrained_model_name_or_path,
        "ss_output_name": name,
        "ss_resolution": f"({base.resolution}, {base.resolution})",
        "ss_num_train_images": photos,
        "ss_num_reg_images": class_images,
        "ss_prior_loss_weight": train.prior_loss_weight if class_images else 0.0,
        "ss_batch_size_per_device": train.train_batch_size,
        "ss_gradient_accumulation_steps": train.gradient_accumulation_steps,
        "ss_optimizer": _OPTIMIZERS[train.optimizer],
        "ss_learning_rate": train.learning_rate,
        "ss_unet_lr": train.learning_rate,
        "ss_text_encoder_lr": (train.text_encoder_learning_rate or train.learning_rate) * train.train_text_encoder,
        "ss_lr_scheduler": train.lr_scheduler,
        "ss_lr_warmup_steps": train.lr_warmup_steps,
        "ss_max_train_steps": max_train_steps(train, photos),
        "ss_max_grad_norm": train.max_grad_norm,
        "ss_min_snr_gamma": train.snr_gamma,
        "ss_noise_offset": train.noise_offset or None,
        "ss_mixed_precision": train.mixed_precision,
        "ss_seed": train.seed,
        "ss_gradient_checkpointing": train.gradient_checkpointing,
    }
    return {key: str(value) for key, value in values.items()}


def _v(about: Mapping[str, str]) -> str:
    """Return what the names of models with v-prediction (Salimans & Ho 2022) end with."""
    return "_v" if about.get("prediction_type") == "v" else ""
