"""LoRA weights by module: read from a file, and added to the weights of a model.

One layer changes a weight W (O, I) by alpha / R * up @ down (Hu et al. 2021, section 4.1), where down is (R, I) and up
(O, R); with a magnitude m (O) the result is scaled to rows of that length (DoRA, Liu et al. 2024, equation 5).
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dreambooth.adapters import METADATA
from dreambooth.errors import ModelError

# peft; diffusers; diffusers for a text encoder
_DOWN = re.compile(r"(.+)\.(?:lora_A|lora\.down|lora_linear_layer\.down)\.weight")
_UP = re.compile(r"(.+)\.(?:lora_B|lora\.up|lora_linear_layer\.up)\.weight")
_MAGNITUDE = re.compile(r"(.+)\.lora_magnitude_vector(?:\.weight)?")
ENCODERS = ("text_encoder", "text_encoder_2")


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


def parts_of_lora(path: Path) -> list[str]:
    """Name the parts that a file changes."""
    return sorted({module.partition(".")[0] for module in read_lora(path)[0]})


@torch.no_grad()
def merge_lora(path: Path, modules: Mapping[str, torch.nn.Module]) -> None:
    """Add the layers of a file to the weights of several parts, which stay plain modules, and as fast.

    Args:
        path: of the file.
        modules: by part, in float32.

    Raises:
        ModelError: the file is torn, or of another base.
    """
    for name, layer in read_lora(path)[0].items():
        part, _, inner = name.partition(".")
        try:
            module = modules[part]
            inner = inner if hasattr(module, "text_model") else inner.removeprefix("text_model.")  # see `_module`
            weight = module.get_submodule(inner).weight
            weight.copy_(merged(weight, layer))  # type: ignore[operator, arg-type]
        except (KeyError, AttributeError, RuntimeError) as error:
            why = f"{name}: {str(error).splitlines()[-1]}"
            raise ModelError(f"{path} does not fit the {part} of this base ({why}); train again") from error


def merged(weight: Tensor, layer: LoraLayer) -> Tensor:
    """Return W + alpha / R up @ down, (O, I), with a magnitude m (W + ...) / |row|."""
    total = weight + layer.up.to(weight) @ layer.down.to(weight) * (layer.alpha / layer.rank)
    if layer.magnitude is None:
        return total
    lengths: Tensor = torch.linalg.vector_norm(total, dim=1)
    return (layer.magnitude.to(weight) / lengths)[:, None] * total


def _module(name: str) -> str:
    """Return a module by its name on the hub: transformers 5.6 left text_model out of those of a text encoder."""
    part, _, inner = name.partition(".")
    if part not in ("unet", *ENCODERS) or not inner:
        raise ModelError(f"{name}: LoRA of an unknown part; it should begin with unet, text_encoder or text_encoder_2")
    if part in ENCODERS and not inner.startswith(("text_model.", "text_projection")):
        inner = f"text_model.{inner}"
    return f"{part}.{inner}"


def _alpha(module: str, down: Tensor, adapter: Mapping[str, Any]) -> float:
    return float(adapter.get(f"{module.partition('.')[0]}.lora_alpha", down.shape[0]))
