"""Tiny pipelines with random weights in the architectures of SD1, SD2 and SDXL: every kind of block is in them."""

import json
from pathlib import Path
from typing import Any

from tiny_project import TINY_RESOLUTION, write_tokenizer


def write_sd(folder: Path, family: str = "sd1", seed: int = 0) -> Path:
    """Write a StableDiffusionPipeline with the parts of SD1 (CLIP, convolutional projections) or SD2 (OpenCLIP)."""
    import torch
    from transformers import CLIPTextModel

    torch.manual_seed(seed)
    write_tokenizer(folder / "tokenizer")
    CLIPTextModel(_text_config(hidden_act="gelu" if family == "sd2" else "quick_gelu")).save_pretrained(
        folder / "text_encoder"
    )
    _write_unet(folder, cross_attention_dim=16, use_linear_projection=family == "sd2")
    _write_vae(folder)
    _write_scheduler(folder, "epsilon" if family == "sd1" else "v_prediction")
    _write_index(folder, "StableDiffusionPipeline", [])
    return folder


def write_sdxl(folder: Path, seed: int = 0) -> Path:
    """Write a StableDiffusionXLPipeline: two text encoders, size conditioning, several transformer layers."""
    import torch
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(seed)
    for part in ("tokenizer", "tokenizer_2"):
        write_tokenizer(folder / part)
    CLIPTextModel(_text_config()).save_pretrained(folder / "text_encoder")
    second = _text_config(hidden_size=32, hidden_act="gelu", projection_dim=32)
    CLIPTextModelWithProjection(second).save_pretrained(folder / "text_encoder_2")
    _write_unet(
        folder, cross_attention_dim=48, use_linear_projection=True, transformer_layers_per_block=[1, 2],
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 32,
    )  # fmt: skip
    _write_vae(folder)
    _write_scheduler(folder, "epsilon")
    _write_index(folder, "StableDiffusionXLPipeline", ["_2"])
    return folder


def _text_config(**changes: Any) -> Any:
    from transformers import CLIPTextConfig

    values = {
        "vocab_size": 514, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "max_position_embeddings": 40, "bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513,
    }  # fmt: skip
    return CLIPTextConfig(**values | changes)


def _write_unet(folder: Path, **changes: Any) -> None:
    from diffusers import UNet2DConditionModel

    UNet2DConditionModel(
        sample_size=TINY_RESOLUTION // 2, block_out_channels=(16, 32), layers_per_block=2, norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8, **changes,
    ).save_pretrained(folder / "unet")  # fmt: skip


def _write_vae(folder: Path) -> None:
    from diffusers import AutoencoderKL

    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16), layers_per_block=2, latent_channels=4, norm_num_groups=4,
        sample_size=TINY_RESOLUTION, force_upcast=False,
    ).save_pretrained(folder / "vae")  # fmt: skip


def _write_scheduler(folder: Path, prediction_type: str) -> None:
    from diffusers import DDIMScheduler

    DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1,
        set_alpha_to_one=False, prediction_type=prediction_type,
    ).save_pretrained(folder / "scheduler")  # fmt: skip


def _write_index(folder: Path, pipeline: str, more: list[str]) -> None:
    index: dict[str, Any] = {
        "_class_name": pipeline,
        "_diffusers_version": "0.42.1",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
    }
    for suffix in more:
        index[f"text_encoder{suffix}"] = ["transformers", "CLIPTextModelWithProjection"]
        index[f"tokenizer{suffix}"] = ["transformers", "CLIPTokenizer"]
    if not more:
        index |= {"feature_extractor": [None, None], "safety_checker": [None, None], "requires_safety_checker": False}
    (folder / "model_index.json").write_text(json.dumps(index))
