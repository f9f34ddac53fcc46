"""Read LoRA weights by module, and name them as kohya's trainer does.

One layer changes a weight W (O, I) by alpha / R * up @ down (Hu et al. 2021, section 4.1), where down is (R, I) and up
(O, R); with a magnitude m (O) the result is scaled to rows of that length (DoRA, Liu et al. 2024, equation 5).
Names of kohya-ss/sd-scripts, networks/lora.py: SD1 and SD2 by the modules of diffusers, SDXL by the original layout.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dreambooth.adapters import METADATA
from dreambooth.errors import ModelError
from dreambooth.layouts import UNetShape, unet_name

# peft; diffusers; diffusers for a text encoder
_DOWN = re.compile(r"(.+)\.(?:lora_A|lora\.down|lora_linear_layer\.down)\.weight")
_UP = re.compile(r"(.+)\.(?:lora_B|lora\.up|lora_linear_layer\.up)\.weight")
_MAGNITUDE = re.compile(r"(.+)\.lora_magnitude_vector(?:\.weight)?")
_ENCODERS = ("text_encoder", "text_encoder_2")


@dataclass(frozen=True)
class LoraLayer:
    """What one module learned: down (R, I, ...), up (O, R, ...), and a magnitude of O numbers with DoRA."""

    down: Tensor
    up: Tensor
    alpha: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        """R."""
        return self.down.shape[0]


Lora = dict[str, LoraLayer]  # by module: unet.mid_block...to_q, text_encoder.text_model.encoder...q_proj


def read_lora(path: Path) -> tuple[Lora, dict[str, Any]]:
    """Read a file of diffusers or peft: its layers, and the configuration of peft in its header.

    Raises:
        ModelError: it is missing, torn, or holds something else than LoRA weights.
    """
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} cannot be read ({error}); train the subject again") from error
    adapter: dict[str, Any] = json.loads(header.get(METADATA, "{}"))
    return layers_of(weights, adapter), adapter


def layers_of(weights: Mapping[str, Tensor], adapter: Mapping[str, Any] | None = None) -> Lora:
    """Gather the weights of a file by the module that they adapt.

    Args:
        weights: by the names of peft or diffusers, each with its part (unet, text_encoder) in front.
        adapter: <part>.lora_alpha; where it is not said, alpha is the rank, as diffusers reads it.

    Raises:
        ModelError: a name belongs to no layer, or a layer is not whole.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in weights.items():
        for part, pattern in (("down", _DOWN), ("up", _UP), ("magnitude", _MAGNITUDE)):
            if match := pattern.fullmatch(name):
                found.setdefault(_module(match[1]), {})[part] = tensor
                break
        else:
            raise ModelError(f"{name} is no weight of a LoRA; train the subject again")
    torn = [module for module, parts in found.items() if not {"down", "up"} <= set(parts)]
    if torn:
        raise ModelError(f"LoRA of {torn[0]} lacks lora_A or lora_B; train the subject again")
    return {
        module: LoraLayer(**parts, alpha=_alpha(module, parts["down"], adapter or {}))
        for module, parts in found.items()
    }


def to_diffusers(lora: Lora) -> dict[str, Tensor]:
    """Return the weights by the names that every version of diffusers and ComfyUI reads: those of peft."""
    weights: dict[str, Tensor] = {}
    for module, layer in lora.items():
        weights |= {f"{module}.lora_A.weight": layer.down, f"{module}.lora_B.weight": layer.up}
        if layer.magnitude is not None:
            weights[f"{module}.lora_magnitude_vector"] = layer.magnitude
    return weights


def to_kohya(lora: Lora, sdxl: UNetShape | None = None) -> dict[str, Tensor]:
    """Return the weights by kohya's names, each layer with its alpha.

    Args:
        lora: by module.
        sdxl: the shape of the UNet of an SDXL model, whose modules kohya names as the original layout does.
    """
    weights: dict[str, Tensor] = {}
    for module, layer in lora.items():
        name = kohya_name(module, sdxl)
        weights |= {f"{name}.lora_down.weight": layer.down, f"{name}.lora_up.weight": layer.up}
        weights[f"{name}.alpha"] = torch.tensor(layer.alpha, dtype=layer.down.dtype)
        if layer.magnitude is not None:  # a column, as LyCORIS and ComfyUI have it
            weights[f"{name}.dora_scale"] = layer.magnitude.reshape(-1, *[1] * (layer.down.ndim - 1))
    return weights


def kohya_name(module: str, sdxl: UNetShape | None = None) -> str:
    """Return the name of a module in kohya's files: lora_unet_..., lora_te_..., for SDXL lora_te1_..., lora_te2_..."""
    part, _, inner = module.partition(".")
    if part == "unet":
        return "lora_unet_" + (unet_name(inner, sdxl) if sdxl else inner).replace(".", "_")
    prefix = f"lora_te{1 + _ENCODERS.index(part)}_" if sdxl else "lora_te_"
    return prefix + inner.replace(".", "_")


def cast(lora: Lora, dtype: torch.dtype) -> Lora:
    """Return the layers in another precision."""
    return {
        module: replace(
            layer,
            down=layer.down.to(dtype).contiguous(),
            up=layer.up.to(dtype).contiguous(),
            magnitude=None if layer.magnitude is None else layer.magnitude.to(dtype),
        )
        for module, layer in lora.items()
    }


def _module(name: str) -> str:
    """Return a module by its name on the hub: transformers 5.6 left text_model out of those of a text encoder."""
    part, _, inner = name.partition(".")
    if part not in ("unet", *_ENCODERS) or not inner:
        raise ModelError(f"{name}: LoRA of an unknown part; it should begin with unet, text_encoder or text_encoder_2")
    if part in _ENCODERS and not inner.startswith(("text_model.", "text_projection")):
        inner = f"text_model.{inner}"
    return f"{part}.{inner}"


def _alpha(module: str, down: Tensor, adapter: Mapping[str, Any]) -> float:
    return float(adapter.get(f"{module.partition('.')[0]}.lora_alpha", down.shape[0]))
