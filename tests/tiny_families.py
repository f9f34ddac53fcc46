"""Tiny random pipelines of the other families, every part real: SD2.x in both kinds, and SDXL."""

import json
import shutil
from pathlib import Path
from typing import Any

from tiny_project import TINY_RESOLUTION, write_tokenizer

TEXT = {
    "vocab_size": 514, "intermediate_size": 32, "num_attention_heads": 2, "max_position_embeddings": 40,
    "bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513,
}  # fmt: skip


def write_sd2(folder: Path, tiny: Path, prediction_type: str) -> Path:
    """Write a pipeline like SD2.x: heads of one width a level, linear projections, epsilon or v-prediction."""
    import torch
    from diffusers import DDIMScheduler, UNet2DConditionModel

    shutil.copytree(tiny, folder)
    torch.manual_seed(1)
    unet(UNet2DConditionModel, attention_head_dim=(2, 4), use_linear_projection=True).save_pretrained(folder / "unet")
    config = DDIMScheduler.load_config(folder / "scheduler")
    DDIMScheduler.from_config(config, prediction_type=prediction_type).save_pretrained(folder / "scheduler")
    return folder


def write_sdxl(folder: Path, tiny: Path) -> Path:
    """Write a pipeline like SDXL: two text encoders, a pooled embedding, and sizes."""
    import torch
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    shutil.copytree(tiny, folder)
    torch.manual_seed(2)
    shutil.rmtree(folder / "text_encoder")
    small = CLIPTextConfig(**TEXT, hidden_size=16, num_hidden_layers=2)
    large = CLIPTextConfig(**TEXT, hidden_size=24, num_hidden_layers=2, projection_dim=12, hidden_act="gelu")
    CLIPTextModel(small).save_pretrained(folder / "text_encoder")
    CLIPTextModelWithProjection(large).save_pretrained(folder / "text_encoder_2")
    write_tokenizer(folder / "tokenizer_2")
    unet(
        UNet2DConditionModel, cross_attention_dim=40, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=12 + 6 * 8, use_linear_projection=True,
    ).save_pretrained(folder / "unet")  # fmt: skip
    index = json.loads((folder / "model_index.json").read_text())
    for name in ("safety_checker", "requires_safety_checker"):
        del index[name]
    index |= {
        "_class_name": "StableDiffusionXLPipeline",
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "image_encoder": [None, None],
        "force_zeros_for_empty_prompt": True,
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def unet(kind: Any, **changes: Any) -> Any:
    """Build a UNet of two levels."""
    values: dict[str, Any] = {
        "sample_size": TINY_RESOLUTION // 2, "block_out_channels": (16, 32), "layers_per_block": 1,
        "norm_num_groups": 8, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "cross_attention_dim": 16, "attention_head_dim": 8,
    }  # fmt: skip
    return kind(**values | changes)
