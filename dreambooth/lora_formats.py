"""Name LoRA weights as diffusers and as kohya's trainer do.

Names of kohya-ss/sd-scripts, networks/lora.py: SD1 and SD2 by the modules of diffusers, SDXL by the original layout.
"""

import torch
from torch import Tensor

from dreambooth.errors import ExportError
from dreambooth.layouts import UNetShape, unet_name
from dreambooth.lora import ENCODERS, Lora


def to_diffusers(lora: Lora) -> dict[str, Tensor]:
    """Return the weights by the names that every version of diffusers and ComfyUI reads: those of peft.

    They have no place for alpha, which the up weights hold (diffusers reads it in the header, ComfyUI does not).
    """
    weights: dict[str, Tensor] = {}
    for module, layer in lora.items():
        up = layer.up.float() * (layer.alpha / layer.rank)
        weights |= {f"{module}.lora_A.weight": layer.down, f"{module}.lora_B.weight": up}
        if layer.magnitude is not None:  # without .weight diffusers drops that of a text encoder
            weights[f"{module}.lora_magnitude_vector.weight"] = layer.magnitude
    return weights


def to_kohya(lora: Lora, sdxl: UNetShape | None = None) -> dict[str, Tensor]:
    """Return the weights by kohya's names, each layer with its alpha.

    Args:
        lora: by module.
        sdxl: the shape of the UNet of an SDXL model, whose modules kohya names as the original layout does.

    Raises:
        ExportError: it is a DoRA. ComfyUI divides by the lengths of the rows of the base, A1111 by those of columns;
            the training, and `lora.merged`, by those of the rows of the sum.
    """
    if any(layer.magnitude is not None for layer in lora.values()):
        raise ExportError("export.formats: kohya holds no DoRA, and this training made one; take it out")
    weights: dict[str, Tensor] = {}
    for module, layer in lora.items():
        name = kohya_name(module, sdxl)
        weights |= {f"{name}.lora_down.weight": layer.down, f"{name}.lora_up.weight": layer.up}
        weights[f"{name}.alpha"] = torch.tensor(layer.alpha, dtype=layer.down.dtype)
    return weights


def kohya_name(module: str, sdxl: UNetShape | None = None) -> str:
    """Return the name of a module in kohya's files: lora_unet_..., lora_te_..., for SDXL lora_te1_..., lora_te2_..."""
    part, _, inner = module.partition(".")
    if part == "unet":
        return "lora_unet_" + (unet_name(inner, sdxl) if sdxl else inner).replace(".", "_")
    prefix = f"lora_te{1 + ENCODERS.index(part)}_" if sdxl else "lora_te_"
    return prefix + inner.replace(".", "_")
