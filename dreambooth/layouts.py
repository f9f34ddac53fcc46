"""Give the weights of a pipeline the names of the original Stable Diffusion layout, as one state dict.

The two layouts hold the same tensors. The original one numbers the blocks of the UNet in the order in which they run,
keeps an attention of the autoencoder as 1x1 convolutions, and the three projections of an OpenCLIP attention as one.
Sources of the names: configs and modules of CompVis/stable-diffusion (SD1), Stability-AI/stablediffusion (SD2, the
text encoder of mlfoundations/open_clip), Stability-AI/generative-models (SDXL). O out features, I in features.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dreambooth.errors import ModelError

Weights = Mapping[str, Tensor]
_UNET_OUTSIDE = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_BLOCK = re.compile(
    r"(down|mid|up)_blocks?(?:\.(\d+))?\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)"
)
_VAE_BLOCK = re.compile(r"(encoder|decoder)\.(?:down|up)_blocks\.(\d+)\.(resnets|downsamplers|upsamplers)\.(\d+)\.(.+)")
_VAE_MIDDLE = re.compile(r"(encoder|decoder)\.mid_block\.(resnets|attentions)\.(\d+)\.(.+)")
# The second name of each is what the weights on the hub were called before diffusers 0.15.
_VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "query": "q",
    "to_k": "k",
    "key": "k",
    "to_v": "v",
    "value": "v",
    "to_out.0": "proj_out",
    "proj_attn": "proj_out",
}
_CLIP_LAYER = re.compile(r"text_model\.encoder\.layers\.(\d+)\.(.+)")
_OPEN_CLIP_OUTSIDE = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
}
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


@dataclass(frozen=True)
class UNetShape:
    """What of a UNet's configuration decides about the numbers of its blocks."""

    layers_per_block: int
    attending_up_blocks: frozenset[int]

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "UNetShape":
        """Read it from a unet/config.json; raise ModelError where the original layout has no numbers for it."""
        layers = config["layers_per_block"]
        if not isinstance(layers, int):
            raise ModelError(
                f"unet/config.json: layers_per_block is {layers}; the original layout needs one number for all blocks: "
                "leave single_file and kohya out of export.formats"
            )
        attending = {number for number, kind in enumerate(config["up_block_types"]) if "CrossAttn" in kind}
        return cls(layers, frozenset(attending))


def unet_name(name: str, shape: UNetShape) -> str:
    """Return the original name of a weight or a module of a UNet.

    Raises:
        ModelError: it is no part of a UNet of SD1, SD2 or SDXL.
    """
    for ours, theirs in _UNET_OUTSIDE.items():
        if name == ours or name.startswith(f"{ours}."):
            return theirs + name.removeprefix(ours)
    found = _UNET_BLOCK.fullmatch(name)
    if found is None:
        raise ModelError(f"{name} has no place in the original layout; leave single_file out of export.formats")
    side, block, kind, number, inner = found[1], int(found[2] or 0), found[3], int(found[4]), found[5]
    place = _unet_place(side, block, kind, number, shape)
    if kind == "resnets":
        return f"{place}.{_renamed(inner, _RESNET)}"
    return f"{place}.{inner.removeprefix('conv.')}" if kind == "downsamplers" else f"{place}.{inner}"


def _unet_place(side: str, block: int, kind: str, number: int, shape: UNetShape) -> str:
    """Return input_blocks.N.M, middle_block.N or output_blocks.N.M, counted in the order in which they run."""
    in_a_block = shape.layers_per_block + 1
    if side == "mid":
        return "middle_block.1" if kind == "attentions" else f"middle_block.{2 * number}"
    if kind == "downsamplers":
        return f"input_blocks.{(block + 1) * in_a_block}.0.op"
    if kind == "upsamplers":
        return f"output_blocks.{(block + 1) * in_a_block - 1}.{1 + (block in shape.attending_up_blocks)}"
    within = int(kind == "attentions")
    if side == "down":
        return f"input_blocks.{1 + block * in_a_block + number}.{within}"
    return f"output_blocks.{block * in_a_block + number}.{within}"


def vae_name(name: str, num_blocks: int) -> str:
    """Return the original name of a weight of an autoencoder with so many blocks on each side."""
    if found := _VAE_BLOCK.fullmatch(name):
        half, block, kind, number, inner = found[1], int(found[2]), found[3], found[4], found[5]
        side = "down" if half == "encoder" else "up"
        place = f"{half}.{side}.{block if half == 'encoder' else num_blocks - 1 - block}"
        if kind == "resnets":
            return f"{place}.block.{number}.{inner.replace('conv_shortcut', 'nin_shortcut')}"
        return f"{place}.{side}sample.{inner}"
    if found := _VAE_MIDDLE.fullmatch(name):
        half, kind, number, inner = found[1], found[2], int(found[3]), found[4]
        if kind == "resnets":
            return f"{half}.mid.block_{number + 1}.{inner.replace('conv_shortcut', 'nin_shortcut')}"
        return f"{half}.mid.attn_1.{_renamed(inner, _VAE_ATTENTION)}"
    return name.replace(".conv_norm_out.", ".norm_out.")


def original_unet(weights: Weights, shape: UNetShape) -> dict[str, Tensor]:
    """Rename the weights of a UNet; the tensors stay."""
    return {unet_name(name, shape): tensor for name, tensor in weights.items()}


def original_vae(weights: Weights, num_blocks: int) -> dict[str, Tensor]:
    """Rename the weights of an autoencoder; the projections (O, I) of its attention become (O, I, 1, 1)."""
    renamed = {}
    for name, tensor in weights.items():
        linear = ".attentions." in name and tensor.ndim == 2
        renamed[vae_name(name, num_blocks)] = tensor[:, :, None, None] if linear else tensor
    return renamed


def hub_text_encoder(weights: Weights) -> dict[str, Tensor]:
    """Give the weights of a CLIP text encoder the names of the hub, text_model.*; transformers 5.6 left that out."""
    return {
        name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}": tensor
        for name, tensor in weights.items()
        if not name.endswith("position_ids")  # 0, 1, 2, ...
    }


def original_open_clip(weights: Weights) -> dict[str, Tensor]:
    """Rename the weights of an OpenCLIP text encoder; query, key and value (O, I) become one (3 O, I)."""
    named, renamed = hub_text_encoder(weights), {}
    for name, tensor in named.items():
        if name in _OPEN_CLIP_OUTSIDE:
            renamed[_OPEN_CLIP_OUTSIDE[name]] = tensor
        elif name == "text_projection.weight":
            renamed["text_projection"] = tensor.T.contiguous()  # open_clip multiplies from the right
        elif (found := _CLIP_LAYER.fullmatch(name)) is None:
            raise ModelError(
                f"{name} has no place in an OpenCLIP text encoder; leave single_file out of export.formats"
            )
        elif "_proj." not in name or "out_proj." in name:
            renamed[f"transformer.resblocks.{found[1]}.{_renamed(found[2], _OPEN_CLIP_LAYER)}"] = tensor
        elif ".q_proj." in name:
            parts = [named[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"]
            kind = name.rsplit(".", 1)[1]
            renamed[f"transformer.resblocks.{found[1]}.attn.in_proj_{kind}"] = torch.cat(parts)
    return renamed


def single_file(parts: Mapping[str, Weights], configs: Mapping[str, Mapping[str, Any]]) -> dict[str, Tensor]:
    """Return the one state dict of a checkpoint in the original layout of its family.

    Args:
        parts: the weights of unet, vae, text_encoder and, for SDXL, text_encoder_2, by the names of diffusers.
        configs: the config.json of each.

    Raises:
        ModelError: a part has no place in that layout.
    """
    whole = _under("model.diffusion_model.", original_unet(parts["unet"], UNetShape.of(configs["unet"])))
    whole |= _under("first_stage_model.", original_vae(parts["vae"], len(configs["vae"]["down_block_types"])))
    if "text_encoder_2" in parts:
        whole |= _under("conditioner.embedders.0.transformer.", hub_text_encoder(parts["text_encoder"]))
        whole |= _under("conditioner.embedders.1.model.", original_open_clip(parts["text_encoder_2"]))
    elif is_open_clip(configs["text_encoder"]):
        whole |= _under("cond_stage_model.model.", original_open_clip(parts["text_encoder"]))
    else:
        whole |= _under("cond_stage_model.transformer.", hub_text_encoder(parts["text_encoder"]))
    return whole


def prediction_marks(scheduler: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the empty tensors by whose names ComfyUI and A1111 know what an SDXL model predicts, else epsilon.

    Args:
        scheduler: its scheduler_config.json.

    Source: ComfyUI, comfy/supported_models.py (SDXL.model_type); A1111, modules/sd_models.py. SD2 is told by weights.
    """
    if scheduler.get("prediction_type") != "v_prediction":
        return {}
    names = ("v_pred", "ztsnr") if scheduler.get("rescale_betas_zero_snr") else ("v_pred",)
    return {name: torch.empty(0) for name in names}


def is_open_clip(text_encoder: Mapping[str, Any]) -> bool:
    """Tell the text encoder of SD2 (OpenCLIP, gelu) from that of SD1 (OpenAI's CLIP, quick_gelu) by its config.json."""
    return bool(text_encoder.get("hidden_act", "quick_gelu") == "gelu")


def _renamed(inner: str, names: Mapping[str, str]) -> str:
    """Replace the module at the head of a name, the part before .weight or .bias."""
    for ours, theirs in names.items():
        if inner == ours or inner.startswith(f"{ours}."):
            return theirs + inner.removeprefix(ours)
    raise ModelError(f"{inner} has no place in the original layout; leave single_file out of export.formats")


def _under(prefix: str, weights: Weights) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in weights.items()}
