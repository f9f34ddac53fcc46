"""Write a pipeline in the architecture of SD1.5 or SDXL with random weights: speed does not depend on what they are.

    python -m benchmarks.architectures sd15 /tmp/sd15
    make bench BENCH="--base /tmp/sd15 --resolution 512 --steps 800 --class-images 200 --mixed-precision bf16 ..."

Values are those of the published configs (stable-diffusion-v1-5, stable-diffusion-xl-base-1.0); the tests hold the
numbers of weights against the published ones. The tokenizer is that of the bundled model: ids are ids.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from benchmarks.recipe import ROOT

TOKENIZER = ROOT / "data/base/emoji64/tokenizer"
LENGTH = 77  # tokens of a prompt
_LEVELS = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")
UNET: dict[str, dict[str, Any]] = {
    "sd15": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "sdxl": {
        "sample_size": 128, "block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048,
        "down_block_types": ("DownBlock2D", _LEVELS[0], _LEVELS[0]),
        "up_block_types": (_LEVELS[1], _LEVELS[1], "UpBlock2D"),
        "transformer_layers_per_block": [1, 2, 10], "attention_head_dim": [5, 10, 20], "use_linear_projection": True,
        "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}  # fmt: skip
_CLIP_L = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "projection_dim": 768, "hidden_act": "quick_gelu",
}  # fmt: skip
_CLIP_G = {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
    "projection_dim": 1280, "hidden_act": "gelu",
}  # fmt: skip
SCALING = {"sd15": 0.18215, "sdxl": 0.13025}


def build(kind: str) -> dict[str, Any]:
    """Return the parts of an architecture by their names, on the current default device."""
    side = UNET[kind]["sample_size"]
    parts: dict[str, Any] = {
        "unet": UNet2DConditionModel(**UNET[kind]),
        "vae": AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, latent_channels=4, sample_size=8 * side,
            scaling_factor=SCALING[kind],
        ),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**_CLIP_L, **_ids())),
    }  # fmt: skip
    if kind == "sdxl":
        parts["text_encoder_2"] = CLIPTextModelWithProjection(CLIPTextConfig(**_CLIP_G, **_ids()))
    return parts


def write(kind: str, folder: Path) -> Path:
    """Write a whole pipeline folder: 4 GB for sd15, 14 GB for sdxl."""
    torch.manual_seed(0)
    for name, module in build(kind).items():
        module.save_pretrained(folder / name)
    names = ["tokenizer", *(["tokenizer_2"] if kind == "sdxl" else [])]
    for name in names:
        shutil.copytree(TOKENIZER, folder / name)
        CLIPTokenizer.from_pretrained(folder / name, model_max_length=LENGTH).save_pretrained(folder / name)
    DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1,
        set_alpha_to_one=False,
    ).save_pretrained(folder / "scheduler")  # fmt: skip
    (folder / "model_index.json").write_text(json.dumps(_index(kind)), encoding="utf-8")
    return folder


def _ids() -> dict[str, int]:
    own = json.loads((ROOT / "data/base/emoji64/text_encoder/config.json").read_text(encoding="utf-8"))
    special = {name: own[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {"vocab_size": 49408, "max_position_embeddings": LENGTH, **special}


def _index(kind: str) -> dict[str, Any]:
    index: dict[str, Any] = {
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
    }
    if kind == "sd15":
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
        return {"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.42.1", **index}
    index |= {"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]}
    index |= {"tokenizer_2": ["transformers", "CLIPTokenizer"], "force_zeros_for_empty_prompt": True}
    return {"_class_name": "StableDiffusionXLPipeline", "_diffusers_version": "0.42.1", **index}


def main() -> None:
    """Write one into a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=list(UNET))
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    write(given.kind, given.folder)


if __name__ == "__main__":
    main()
