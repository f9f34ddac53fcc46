"""LoRA files, with diffusers' reader of its own and of kohya's format as the referee."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from peft import LoraConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from test_layouts import picture
from tiny_pipelines import write_sd, write_sdxl

from dreambooth.adapters import LORA_FILE
from dreambooth.errors import ModelError
from dreambooth.layouts import UNetShape
from dreambooth.lora import LoraLayer, layers_of, merged, read_lora
from dreambooth.lora_formats import kohya_name, to_diffusers, to_kohya
from dreambooth.weight_files import cast_weights

RANK, ALPHA = 4, 10  # alpha / rank is not 1, so that a lost alpha shows
UNET_MODULES = ["to_k", "to_q", "to_v", "to_out.0"]
# all four: by out_proj the reader of diffusers knows the names of kohya for a text encoder
TEXT_MODULES = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1"]
SHAPE = UNetShape(2, frozenset({0}))
KINDS: dict[str, Any] = {"sd1": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}


def adapt(module: Any, targets: list[str], dora: bool = False) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Put a LoRA of random weights on a module; return its weights and its configuration as peft tells them."""
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, use_dora=dora)
    module.add_adapter(config)
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
        if "magnitude" in name:
            parameter.data *= 1.1
    about = {"r": RANK, "lora_alpha": ALPHA, "use_dora": dora, "target_modules": targets}
    return get_peft_model_state_dict(module, adapter_name="default"), about


@pytest.fixture(scope="module", params=list(KINDS))
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path, Any]:
    """A base, a folder with a LoRA of all its trainable parts as diffusers saves it, and the picture of both."""
    name, place = request.param, tmp_path_factory.mktemp("lora")
    folder = write_sdxl(place / "base") if name == "sdxl" else write_sd(place / "base")
    pipeline = KINDS[name].from_pretrained(folder)
    torch.manual_seed(1)
    weights, about = {}, {}
    for part in ("unet", "text_encoder", "text_encoder_2")[: 3 if name == "sdxl" else 2]:
        weights[part], about[part] = adapt(getattr(pipeline, part), UNET_MODULES if part == "unet" else TEXT_MODULES)
    more = {f"{part}_lora_layers": layers for part, layers in weights.items()}
    more |= {f"{part}_lora_adapter_metadata": config for part, config in about.items()}
    KINDS[name].save_lora_weights(place / "trained", **more)
    return name, folder, place / "trained" / LORA_FILE, picture(pipeline)


def test_the_kohya_file_draws_the_trained_picture(trained: tuple[str, Path, Path, Any], tmp_path: Path) -> None:
    name, folder, file, expected = trained
    lora, _ = read_lora(file)
    safetensors.torch.save_file(to_kohya(lora, SHAPE if name == "sdxl" else None), tmp_path / "kohya.safetensors")
    pipeline = KINDS[name].from_pretrained(folder)
    untouched = picture(pipeline)
    pipeline.load_lora_weights(tmp_path, weight_name="kohya.safetensors")
    assert np.abs(picture(pipeline) - expected).max() < 1e-4
    assert np.abs(untouched - expected).max() > 1 / 255


def test_the_file_of_diffusers_draws_the_trained_picture_for_who_reads_no_alpha(
    trained: tuple[str, Path, Path, Any], tmp_path: Path
) -> None:
    name, folder, file, expected = trained
    lora, adapter = read_lora(file)
    pipeline = KINDS[name].from_pretrained(folder)
    assert adapter["unet.lora_alpha"] == ALPHA
    safetensors.torch.save_file(to_diffusers(lora), tmp_path / LORA_FILE)
    pipeline.load_lora_weights(tmp_path)
    assert np.abs(picture(pipeline) - expected).max() < 1e-4


@pytest.mark.parametrize("dora", [False, True])
def test_a_layer_is_added_to_its_weight_as_peft_does(dora: bool) -> None:
    torch.manual_seed(0)
    module = torch.nn.ModuleDict({"to_q": torch.nn.Linear(6, 5, bias=False)})
    weight = module["to_q"].weight.detach().clone()
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["to_q"], use_dora=dora)
    adapted: Any = inject_adapter_in_model(config, module)["to_q"]
    torch.nn.init.normal_(adapted.lora_B["default"].weight)
    magnitude = adapted.lora_magnitude_vector["default"].weight.detach() * 1.5 if dora else None
    if dora:
        adapted.lora_magnitude_vector["default"].weight.data *= 1.5
    layer = LoraLayer(adapted.lora_A["default"].weight, adapted.lora_B["default"].weight, ALPHA, magnitude)
    adapted.merge()
    assert torch.allclose(merged(weight, layer), adapted.base_layer.weight, rtol=0, atol=0 if not dora else 1e-6)


def test_modules_have_the_names_that_kohya_gives_them() -> None:
    query = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    assert kohya_name(query) == "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    assert kohya_name(query, SHAPE) == "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    encoder = "text_model.encoder.layers.3.mlp.fc1"
    assert kohya_name(f"text_encoder.{encoder}") == "lora_te_text_model_encoder_layers_3_mlp_fc1"
    assert kohya_name(f"text_encoder_2.{encoder}", SHAPE) == "lora_te2_text_model_encoder_layers_3_mlp_fc1"


def test_every_layer_has_its_alpha_in_the_precision_of_the_file() -> None:
    layer = LoraLayer(torch.zeros(4, 6), torch.zeros(8, 4), alpha=3.0)
    weights = cast_weights(to_kohya({"unet.mid_block.to_q": layer}), torch.bfloat16)
    assert {name.split(".", 1)[1] for name in weights} == {"lora_down.weight", "lora_up.weight", "alpha"}
    assert weights["lora_unet_mid_block_to_q.alpha"].item() == 3
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}


def test_names_of_all_three_conventions_are_one_layer() -> None:
    module = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    down, up = torch.zeros(2, 4), torch.zeros(4, 2)
    for kind in (("lora_A", "lora_B"), ("lora.down", "lora.up"), ("lora_linear_layer.down", "lora_linear_layer.up")):
        for name in (module, module.replace("text_model.", "")):
            assert list(layers_of({f"{name}.{kind[0]}.weight": down, f"{name}.{kind[1]}.weight": up})) == [module]


def test_a_magnitude_keeps_its_value_through_the_names_of_diffusers() -> None:
    for module in ("unet.mid_block.to_q", "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"):
        layer = LoraLayer(torch.zeros(2, 4), torch.zeros(3, 2), 2.0, torch.arange(3.0))
        weights = to_diffusers({module: layer})
        assert f"{module}.lora_magnitude_vector.weight" in weights
        again = layers_of(weights)[module].magnitude
        assert again is not None
        assert torch.equal(again, torch.arange(3.0))


def test_what_is_no_whole_layer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"unet\.x\.weight is no weight of a LoRA"):
        layers_of({"unet.x.weight": torch.zeros(1)})
    with pytest.raises(ModelError, match=r"LoRA of unet\.x lacks"):
        layers_of({"unet.x.lora_A.weight": torch.zeros(1, 1)})
    with pytest.raises(ModelError, match="unknown part"):
        layers_of({"transformer.x.lora_A.weight": torch.zeros(1, 1)})
    with pytest.raises(ModelError, match="cannot be read"):
        read_lora(tmp_path / LORA_FILE)
