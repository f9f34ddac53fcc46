"""Full, LoRA, a new word, and both: what moves, what is kept, and what plain diffusers makes of the files."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors import safe_open
from safetensors.torch import load_file
from test_training import make_samples, settings, weights
from tiny_families import write_sdxl

from dreambooth import methods
from dreambooth.adapters import LORA_FILE, save_lora
from dreambooth.checkpoint import named_weights
from dreambooth.errors import ModelError, TrainingError
from dreambooth.families import drawn_sizes
from dreambooth.lora import merge_lora
from dreambooth.models import Model, load_model, write_pipeline
from dreambooth.sampling import SamplerSettings, draw
from dreambooth.training import History, train

METHODS = ("full", "lora", "textual_inversion", "pivotal")


@pytest.fixture(scope="module")
def sdxl_folder(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Path:
    return write_sdxl(tmp_path_factory.mktemp("sdxl") / "tiny", tiny_model_folder)


def run(model: Model, folder: Path | None = None, **changes: Any) -> History:
    values = settings(**{"learning_rate": 1e-2, "rank": 2, "lora_alpha": 2.0, "save_dtype": "float32"} | changes)
    instance = make_samples(model, 3, "instance", "a photo of sks dog")
    prior = make_samples(model, 3, "prior", "a photo of a dog")
    methods.add_token(model, values, "sks", "dog")
    history = train(model, instance, prior if values.reads_class_rows else [], values)
    if folder is not None:
        folder.mkdir()
        methods.save_trained(model, folder, values)
    return history


def picture(model: Model, prompt: str = "a photo of sks dog") -> np.ndarray[Any, Any]:
    (image,) = draw(model, [prompt], [1], SamplerSettings("ddim", 3, 3.0, 32))
    return np.asarray(image).astype(int)


def changed_weights(model: Model, before: dict[str, torch.Tensor]) -> set[str]:
    after = weights(model)
    return {name for name in before if name not in after or not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("train_text_encoder", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_a_method_moves_what_it_says_and_nothing_else(
    tiny_model_folder: Path, method: str, train_text_encoder: bool
) -> None:
    model = load_model(tiny_model_folder, device="cpu")
    values = settings(method=method, train_text_encoder=train_text_encoder, rank=2)
    methods.add_token(model, values, "sks", "dog")
    count = methods.count_weights(model, values)
    trained = methods.make_trainable(model, values)
    names = [name for name, _ in named_weights(trained)]
    assert sum(weight.numel() for _, weight in named_weights(trained)) == count
    kinds = {"token" if name.endswith(".learned") else "lora" if ".lora_" in name else "weight" for name in names}
    assert kinds == {
        "full": {"weight"}, "lora": {"lora"}, "textual_inversion": {"token"}, "pivotal": {"lora", "token"},
    }[method]  # fmt: skip
    parts = {name.split(".")[0] for name in names if not name.endswith(".learned")}
    unet = {"unet"} if method != "textual_inversion" else set()
    assert parts == unet | ({"text_encoder"} if train_text_encoder and unet else set())


@pytest.mark.parametrize("method", ["lora", "textual_inversion", "pivotal"])
def test_the_base_stays_bit_identical(tiny_model_folder: Path, method: str) -> None:
    base, model = (load_model(tiny_model_folder, device="cpu") for _ in range(2))
    run(model, method=method, train_text_encoder=True)
    for part in ("unet", "text_encoder", "vae"):
        after = {
            name.replace(".base_layer.", "."): weight
            for name, weight in getattr(model, part).state_dict().items()
            if ".lora_" not in name
        }
        for name, weight in getattr(base, part).state_dict().items():
            assert torch.equal(after[name][: len(weight)] if weight.ndim else after[name], weight), name


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_falls(tiny_model_folder: Path, method: str) -> None:
    model = load_model(tiny_model_folder, device="cpu")
    rate = {"full": 3e-3, "lora": 3e-2, "textual_inversion": 0.03, "pivotal": 3e-2}[method]
    how = {"method": method, "rank": 8, "lora_alpha": 8.0, "max_train_steps": 40, "evaluation_steps": 40}
    ends = []
    for learning_rate in (1e-9, rate):
        model = load_model(tiny_model_folder, device="cpu")
        ends.append(run(model, **how, learning_rate=learning_rate).evaluations[0].loss_instance)
    assert ends[1] < ends[0]


def test_the_first_lora_is_the_base_and_follows_from_the_seed(tiny_model_folder: Path) -> None:
    firsts = []
    for seed in (0, 0, 1):
        model = load_model(tiny_model_folder, device="cpu")
        before = picture(model)
        torch.manual_seed(len(firsts))  # the global generator has no say
        trained = methods.make_trainable(model, settings(method="lora", seed=seed))
        firsts.append({name: weight.detach().clone() for name, weight in named_weights(trained)})
        assert np.array_equal(picture(model), before)
    assert all(torch.equal(firsts[0][name], firsts[1][name]) for name in firsts[0])
    assert any(not torch.equal(firsts[0][name], firsts[2][name]) for name in firsts[0])


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_step_of_1e_4_changes_nearly_all_lora_weights(tiny_model_folder: Path, precision: str) -> None:
    """Masters are float32: in bfloat16 such a step rounds nine of ten weights of A away."""
    model = load_model(tiny_model_folder, device="cpu")
    how = {"method": "lora", "rank": 8, "lora_alpha": 8.0, "mixed_precision": precision, "train_text_encoder": True}
    run(model, **how, max_train_steps=1, learning_rate=1e-4)  # B is 0 before, so A has no gradient yet
    one = {name: weight.clone() for name, weight in model.unet.state_dict().items() if ".lora_" in name}
    model = load_model(tiny_model_folder, device="cpu")
    run(model, **how, max_train_steps=2, learning_rate=1e-4)
    two = {name: weight for name, weight in model.unet.state_dict().items() if ".lora_" in name}
    assert {weight.dtype for weight in two.values()} == {torch.float32}
    moved = sum((one[name] != two[name]).sum().item() for name in one)
    assert moved > 0.99 * sum(weight.numel() for weight in one.values())


def test_a_frozen_unet_is_kept_in_half_precision(tiny_model_folder: Path) -> None:
    model = load_model(tiny_model_folder, device="cpu")
    run(model, method="lora", mixed_precision="bf16")
    assert model.unet.conv_in.weight.dtype == torch.bfloat16


def test_the_parts_have_rates_of_their_own(tiny_model_folder: Path) -> None:
    model = load_model(tiny_model_folder, device="cpu")
    values = settings(
        method="pivotal", train_text_encoder=True, learning_rate=1e-4, text_encoder_learning_rate=1e-5,
        embedding_learning_rate=1e-2,
    )  # fmt: skip
    methods.add_token(model, values, "sks", "dog")
    trained = methods.make_trainable(model, values)
    names = {id(weight): name for name, weight in named_weights(trained)}
    factors = {
        names[id(weight)]: group["factor"]
        for group in methods.parameter_groups(trained, values)
        for weight in group["params"]
    }
    assert set(factors) == set(names.values())
    for name, factor in factors.items():
        expected = 1 if name.startswith("unet.") else 100 if name.endswith(".learned") else 0.1
        assert factor == pytest.approx(expected)


def test_a_rate_of_its_own_moves_the_text_encoder_less(tiny_model_folder: Path) -> None:
    ends = []
    for rate in (None, 1e-8):
        model = load_model(tiny_model_folder, device="cpu")
        before = model.text_encoder.get_input_embeddings().weight.clone()
        run(model, method="full", text_encoder_learning_rate=rate)
        ends.append((model.text_encoder.get_input_embeddings().weight - before).abs().max().item())
    assert ends[1] < 1e-5 < ends[0]


def test_the_new_word_begins_as_the_class_noun_and_stands_alone(tiny_model_folder: Path) -> None:
    model = load_model(tiny_model_folder, device="cpu")
    noun = model.tokenizer("dog", add_special_tokens=False).input_ids
    expected = model.text_encoder.get_input_embeddings().weight[noun].mean(0)
    methods.add_token(model, settings(method="pivotal"), "sks", "dog")
    number = model.tokenizer.convert_tokens_to_ids("sks")
    assert torch.allclose(model.text_encoder.get_input_embeddings().weight[number], expected)
    assert model.tokenizer("a photo of sks dog").input_ids.count(number) == 1
    assert model.tokenizer("two desks").input_ids.count(number) == 0


def test_a_prompt_is_pooled_at_its_end_though_the_config_of_the_base_says_2_and_the_word_has_the_largest_number(
    sdxl_folder: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(sdxl_folder, base)
    path = base / "text_encoder_2/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": 2}))
    run(load_model(base, device="cpu"), tmp_path / "trained", method="textual_inversion")
    (tmp_path / "pipeline").mkdir()
    write_pipeline(base, tmp_path / "trained", tmp_path / "pipeline", torch.float32)
    again = StableDiffusionXLPipeline.from_pretrained(tmp_path / "pipeline", use_safetensors=True)
    for model in (load_model(base, device="cpu", trained=tmp_path / "trained"), again):
        prompts = ["a sks dog", "a sks cat"]
        numbers = model.tokenizer_2(prompts, padding=True, return_tensors="pt").input_ids
        one, other = model.text_encoder_2(numbers).text_embeds
        assert not torch.allclose(one, other)


def test_a_word_that_is_a_token_already_is_refused(tiny_model_folder: Path) -> None:
    model = load_model(tiny_model_folder, device="cpu")
    with pytest.raises(TrainingError, match=r"subjects\.identifier: 'a' is a token of the base already"):
        methods.add_token(model, settings(method="textual_inversion"), "a", "dog")


@pytest.mark.parametrize("family", ["sd", "sdxl"])
@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("lora", {"train_text_encoder": True}),
        ("lora", {"train_text_encoder": True, "use_dora": True}),
        ("textual_inversion", {"learning_rate": 1.0}),
        ("pivotal", {"train_text_encoder": True, "embedding_learning_rate": 1.0}),
    ],
)
def test_loaded_again_here_and_in_plain_diffusers_it_draws_the_same_picture(
    tiny_model_folder: Path, sdxl_folder: Path, tmp_path: Path, family: str, method: str, changes: dict[str, Any]
) -> None:
    base = sdxl_folder if family == "sdxl" else tiny_model_folder
    model = load_model(base, device="cpu")
    untouched = picture(model)
    run(model, tmp_path / "trained", method=method, max_train_steps=6, **{"learning_rate": 0.1} | changes)
    trained = picture(model)
    assert np.abs(trained - untouched).max() > 5  # else nothing would be shown
    loaded = load_model(base, device="cpu", trained=tmp_path / "trained")
    assert np.abs(picture(loaded) - trained).max() <= 1
    kind = StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline
    (tmp_path / "pipeline").mkdir()
    write_pipeline(base, tmp_path / "trained", tmp_path / "pipeline", torch.float32)
    pipelines = [kind.from_pretrained(tmp_path / "pipeline", use_safetensors=True)]
    pipelines.append(with_files(kind.from_pretrained(base, use_safetensors=True), tmp_path / "trained"))
    for pipeline in pipelines:
        assert np.abs(drawn_by(pipeline) - trained).max() <= 1


def with_files(pipeline: Any, folder: Path) -> Any:
    if (folder / "learned_embeds.safetensors").exists():
        rows = load_file(folder / "learned_embeds.safetensors")
        if "clip_g" in rows:
            pipeline.load_textual_inversion(
                rows["clip_l"], token="sks", text_encoder=pipeline.text_encoder, tokenizer=pipeline.tokenizer
            )
            pipeline.load_textual_inversion(
                rows["clip_g"], token="sks", text_encoder=pipeline.text_encoder_2, tokenizer=pipeline.tokenizer_2
            )
        else:
            pipeline.load_textual_inversion(folder / "learned_embeds.safetensors")
    if (folder / "pytorch_lora_weights.safetensors").exists():
        pipeline.load_lora_weights(folder)
    return pipeline


def drawn_by(pipeline: Any) -> np.ndarray[Any, Any]:
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    latents = torch.randn((4, 16, 16), generator=torch.Generator().manual_seed(1))[None]
    image = pipeline(
        "a photo of sks dog", num_inference_steps=3, guidance_scale=3.0, height=32, width=32, latents=latents
    ).images[0]
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_dora_that_has_learned_nothing_leaves_the_weights_of_the_base_as_they_are(
    tiny_model_folder: Path, tmp_path: Path, precision: str
) -> None:
    base = weights(load_model(tiny_model_folder, device="cpu"))
    values = settings(method="lora", use_dora=True, mixed_precision=precision)
    model = load_model(tiny_model_folder, device="cpu", unet_dtype=methods.frozen_dtype(values))
    trained = methods.make_trainable(model, values)
    save_lora(tmp_path / LORA_FILE, trained, torch.float32)
    plain = load_model(tiny_model_folder, device="cpu")
    merge_lora(tmp_path / LORA_FILE, {"unet": plain.unet, **plain.encoders})
    for name, weight in weights(plain).items():
        torch.testing.assert_close(weight, base[name], rtol=1e-5, atol=1e-6)


def test_the_files_say_rank_alpha_and_token(tiny_model_folder: Path, tmp_path: Path) -> None:
    run(load_model(tiny_model_folder, device="cpu"), tmp_path / "trained", method="pivotal", rank=3, lora_alpha=6.0)
    with safe_open(tmp_path / "trained/pytorch_lora_weights.safetensors", "pt") as file:
        about = json.loads(file.metadata()["lora_adapter_metadata"])
        assert {name.split(".")[0] for name in file.keys()} == {"unet", "text_encoder"}  # noqa: SIM118
    assert (about["unet.r"], about["unet.lora_alpha"], about["text_encoder.r"]) == (3, 6.0, 3)
    with safe_open(tmp_path / "trained/learned_embeds.safetensors", "pt") as file:
        assert file.metadata() == {"token": "sks"}
        assert list(file.keys()) == ["sks"]
        assert file.get_tensor("sks").shape == (1, 16)


def test_the_same_training_gives_the_same_bytes(tiny_model_folder: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        run(load_model(tiny_model_folder, device="cpu"), tmp_path / name, method="pivotal")
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_a_torn_file_and_one_of_another_base_are_refused(
    tiny_model_folder: Path, sdxl_folder: Path, tmp_path: Path
) -> None:
    run(load_model(tiny_model_folder, device="cpu"), tmp_path / "trained", method="lora", max_train_steps=1)
    with pytest.raises(ModelError, match=r"pytorch_lora_weights\.safetensors does not fit the unet of this base"):
        load_model(sdxl_folder, device="cpu", trained=tmp_path / "trained")
    path = tmp_path / "trained/pytorch_lora_weights.safetensors"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ModelError, match="cannot be read"):
        load_model(tiny_model_folder, device="cpu", trained=tmp_path / "trained")


def test_sizes_of_drawn_pictures_are_those_of_the_pipeline_of_diffusers() -> None:
    assert drawn_sizes(64) == (64, 64, 0, 0, 64, 64)
