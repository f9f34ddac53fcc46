"""The original layout, with diffusers' own reader of it as the referee."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from tiny_pipelines import write_sd, write_sdxl
from tiny_project import TINY_RESOLUTION

from dreambooth.errors import ModelError
from dreambooth.layouts import UNetShape, original_open_clip, single_file, unet_name, vae_name

PIPELINES = {"sd1": StableDiffusionPipeline, "sd2": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")


@pytest.fixture(scope="module", params=list(PIPELINES))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("family") / request.param
    return request.param, write_sdxl(folder) if request.param == "sdxl" else write_sd(folder, request.param)


def read(folder: Path) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
    parts = [part for part in PARTS if (folder / part).is_dir()]
    weights = {part: safetensors.torch.load_file(next((folder / part).glob("*.safetensors"))) for part in parts}
    return weights, {part: json.loads((folder / part / "config.json").read_text()) for part in parts}


def picture(pipeline: Any, prompt: str = "a photo of sks dog") -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    side = TINY_RESOLUTION
    drawn = pipeline(
        prompt, num_inference_steps=3, height=side, width=side,
        generator=torch.Generator().manual_seed(1), output_type="np",
    )  # fmt: skip
    return np.asarray(drawn.images[0])


def test_a_single_file_draws_the_picture_of_its_folder(family: tuple[str, Path], tmp_path: Path) -> None:
    name, folder = family
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(single_file(*read(folder)), path)
    kind = PIPELINES[name]
    loaded = kind.from_single_file(path, config=str(folder), local_files_only=True)
    expected = kind.from_pretrained(folder, use_safetensors=True)
    for part in PARTS[: 4 if name == "sdxl" else 3]:
        one, other = getattr(loaded, part).state_dict(), getattr(expected, part).state_dict()
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), part
    assert np.abs(picture(loaded) - picture(expected)).max() < 1e-5  # the order of summation follows the memory layout


def test_no_weight_is_lost_and_none_takes_the_name_of_another(family: tuple[str, Path]) -> None:
    weights, configs = read(family[1])
    whole = single_file(weights, configs)
    count = sum(tensor.numel() for part in weights.values() for tensor in part.values())
    assert sum(tensor.numel() for tensor in whole.values()) == count


SD1 = UNetShape(2, frozenset({1, 2, 3}))  # CompVis/stable-diffusion, configs/stable-diffusion/v1-inference.yaml


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("conv_in.weight", "input_blocks.0.0.weight"),
        ("time_embedding.linear_2.bias", "time_embed.2.bias"),
        ("down_blocks.0.resnets.1.conv2.weight", "input_blocks.2.0.out_layers.3.weight"),
        ("down_blocks.0.downsamplers.0.conv.weight", "input_blocks.3.0.op.weight"),
        ("down_blocks.3.resnets.1.norm1.bias", "input_blocks.11.0.in_layers.0.bias"),
        ("mid_block.attentions.0.proj_in.weight", "middle_block.1.proj_in.weight"),
        ("mid_block.resnets.1.time_emb_proj.weight", "middle_block.2.emb_layers.1.weight"),
        ("up_blocks.0.upsamplers.0.conv.weight", "output_blocks.2.1.conv.weight"),
        ("up_blocks.1.upsamplers.0.conv.weight", "output_blocks.5.2.conv.weight"),
        ("up_blocks.3.resnets.2.conv_shortcut.weight", "output_blocks.11.0.skip_connection.weight"),
        (
            "up_blocks.3.attentions.2.transformer_blocks.0.attn2.to_out.0.weight",
            "output_blocks.11.1.transformer_blocks.0.attn2.to_out.0.weight",
        ),
        ("conv_norm_out.weight", "out.0.weight"),
    ],
)
def test_names_of_sd1_are_those_of_its_published_checkpoint(ours: str, theirs: str) -> None:
    assert unet_name(ours, SD1) == theirs


def test_the_decoder_counts_its_blocks_from_the_other_end() -> None:
    assert (
        vae_name("decoder.up_blocks.0.resnets.2.conv_shortcut.weight", 4) == "decoder.up.3.block.2.nin_shortcut.weight"
    )
    assert vae_name("decoder.up_blocks.2.upsamplers.0.conv.bias", 4) == "decoder.up.1.upsample.conv.bias"
    assert vae_name("encoder.down_blocks.1.downsamplers.0.conv.bias", 4) == "encoder.down.1.downsample.conv.bias"


def test_old_names_of_the_attention_on_the_hub_are_known() -> None:
    for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
        names = [f"encoder.mid_block.attentions.0.{one}.weight" for one in (old, new)]
        assert vae_name(names[0], 4) == vae_name(names[1], 4)


def test_open_clip_holds_query_key_and_value_in_this_order() -> None:
    place = "text_model.encoder.layers.0.self_attn"
    weights = {
        f"{place}.{part}_proj.bias": torch.full((2,), value) for part, value in (("k", 2.0), ("v", 3.0), ("q", 1.0))
    }
    joined = original_open_clip(weights)
    assert list(joined) == ["transformer.resblocks.0.attn.in_proj_bias"]
    assert joined["transformer.resblocks.0.attn.in_proj_bias"].tolist() == [1, 1, 2, 2, 3, 3]


def test_a_part_of_another_architecture_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match=r"transformer_blocks\.0\.norm has no place in the original layout"):
        unet_name("transformer_blocks.0.norm", SD1)
    with pytest.raises(ModelError, match=r"layers_per_block is \[1, 2\]"):
        UNetShape.of({"layers_per_block": [1, 2], "up_block_types": []})
