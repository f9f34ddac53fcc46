"""SD2.x in both kinds and SDXL: each goes from photos to an export, and each row keeps its own text and sizes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from test_prior_kinds import taught
from test_stages import run_all
from test_training import make_samples, settings
from tiny_families import write_sd2, write_sdxl
from tiny_project import make_photo, make_project, tiny_values

from dreambooth import trainer as stepping
from dreambooth.dataset import Sample, rows_of_step
from dreambooth.families import condition
from dreambooth.latents import encode_image
from dreambooth.models import load_model
from dreambooth.sampling import SamplerSettings, draw, encode_prompts
from dreambooth.texts import AT_ONCE, TextSource
from dreambooth.training import train

FAMILIES = ("sd2-epsilon", "sd2-v", "sdxl")
INSTANCE, CLASS = "a photo of sks dog", "a photo of a dog"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("families")
    return {
        "sd2-epsilon": write_sd2(folder / "epsilon", tiny_model_folder, "epsilon"),
        "sd2-v": write_sd2(folder / "v", tiny_model_folder, "v_prediction"),
        "sdxl": write_sdxl(folder / "sdxl", tiny_model_folder),
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_many_prompts_are_encoded_a_few_at_a_time(folders: dict[str, Path], family: str) -> None:
    model = load_model(folders[family], device="cpu")
    seen: list[int] = []
    for encoder in model.encoders.values():
        encoder.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    prompts = [f"a photo of {number} dogs" for number in range(AT_ONCE + 3)]
    source = TextSource(model, prompts, trained=False)
    assert seen == [AT_ONCE] * len(model.encoders) + [3] * len(model.encoders)
    some = source.encode(prompts[-2:], ())
    alone = encode_prompts(model, prompts[-2:])
    assert torch.allclose(some.embeds, alone.embeds, atol=1e-6)
    assert (some.pooled is None) == (alone.pooled is None) == (family != "sdxl")
    if some.pooled is not None and alone.pooled is not None:
        assert torch.allclose(some.pooled, alone.pooled, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_draws_what_the_pipeline_of_diffusers_draws(folders: dict[str, Path], family: str) -> None:
    kind = StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline
    pipeline = kind.from_pretrained(folders[family], use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    latents = torch.randn((4, 16, 16), generator=torch.Generator().manual_seed(1))[None]
    for negative in ("", "blurred"):
        expected = pipeline(
            INSTANCE, negative_prompt=negative or None, num_inference_steps=3, guidance_scale=3.0, height=32, width=32,
            latents=latents,
        ).images[0]  # fmt: skip
        sampler = SamplerSettings("ddim", 3, 3.0, 32, negative)
        (image,) = draw(load_model(folders[family], device="cpu"), [INSTANCE], [1], sampler)
        assert np.abs(np.asarray(image).astype(int) - np.asarray(expected).astype(int)).max() <= 1


@pytest.mark.parametrize(("family", "kind"), [("sd2-epsilon", "epsilon"), ("sd2-v", "v_prediction")])
def test_the_target_is_read_from_the_scheduler(folders: dict[str, Path], family: str, kind: str) -> None:
    model = load_model(folders[family], device="cpu")
    trainer = stepping.prepare(model, make_samples(model, 1, "instance", INSTANCE), settings())
    assert trainer.prediction_type == kind
    stepping.release(model)


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_at_fixed_noise_falls(folders: dict[str, Path], family: str, method: str) -> None:
    ends = []
    for rate in (1e-9, {"full": 3e-3, "lora": 3e-2}[method]):
        model = load_model(folders[family], device="cpu")
        instance = make_samples(model, 2, "instance", INSTANCE)
        how = {"max_train_steps": 30, "evaluation_steps": 30, "method": method, "learning_rate": rate}
        ends.append(train(model, instance, [], settings(**how)).evaluations[0].loss_instance)
    assert ends[1] < ends[0]


def sized(model: Any, count: int, role: Any, prompt: str, first: int) -> list[Sample]:
    """Return samples of which each has sizes of its own."""
    return [
        Sample(f"{role}-{i}", encode_image(model, make_photo(first + i, 32)), prompt, role, (first + i, 1, 2, 3, 4, 5))
        for i in range(count)
    ]


@pytest.mark.parametrize("batch", [2, 3])
def test_no_subject_row_of_sdxl_sees_the_class_prompt_and_every_row_keeps_its_sizes(
    folders: dict[str, Path], batch: int
) -> None:
    """What really reaches the UNet is compared, row by row, with the text and the sizes of the row's own sample."""
    model = load_model(folders["sdxl"], device="cpu")
    instance, prior = sized(model, 3, "instance", INSTANCE, 100), sized(model, 4, "prior", CLASS, 200)
    texts = {role: encode_prompts(model, [text]) for role, text in (("instance", INSTANCE), ("prior", CLASS))}
    assert not torch.allclose(texts["instance"].embeds, texts["prior"].embeds, atol=1e-2)
    calls: list[tuple[Any, ...]] = []
    hook = model.unet.register_forward_pre_hook(lambda _, args, named: calls.append((args, named)), with_kwargs=True)
    values = settings(
        train_batch_size=batch, gradient_accumulation_steps=2, max_train_steps=3, train_text_encoder=False
    )
    train(model, instance, prior, values)
    hook.remove()
    expected = []
    for step in range(3):
        rows = rows_of_step(step, 2 * batch, instance, prior, 1.0, values.seed)
        expected += stepping.dataset.micro_batches(rows, 2)
    assert len(calls) == len(expected) == 6
    for (args, named), rows in zip(calls, expected, strict=True):
        assert len(args[0]) == len(rows) == 2 * batch
        for i, row in enumerate(rows):
            text = texts[row.sample.role]
            assert text.pooled is not None
            assert torch.allclose(named["encoder_hidden_states"][i], text.embeds[0], atol=1e-5)
            assert torch.allclose(named["added_cond_kwargs"]["text_embeds"][i], text.pooled[0], atol=1e-5)
            assert named["added_cond_kwargs"]["time_ids"][i].tolist() == list(row.sample.sizes or ())


def test_the_teacher_of_sdxl_reads_the_sizes_of_its_rows(folders: dict[str, Path]) -> None:
    model = load_model(folders["sdxl"], device="cpu")
    instance = sized(model, 2, "instance", INSTANCE, 100)
    history = train(model, instance, taught(instance), settings(method="lora", learning_rate=1e-2))
    assert history.steps[0].loss_prior < 1e-9 < history.steps[-1].loss_prior


def test_sizes_are_required_by_sdxl_alone(folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="SDXL needs the sizes"):
        condition(encode_prompts(load_model(folders["sdxl"], device="cpu"), [CLASS]), None)
    assert set(condition(encode_prompts(load_model(folders["sd2-v"], device="cpu"), [CLASS]), None)) == {
        "encoder_hidden_states"
    }


@pytest.mark.parametrize(("family", "method"), [("sdxl", "full"), ("sdxl", "pivotal"), ("sd2-v", "lora")])
def test_it_goes_from_photos_to_an_export_that_diffusers_loads(
    folders: dict[str, Path], tmp_path: Path, family: str, method: str
) -> None:
    values = tiny_values()
    values["train"] |= {"method": method, "rank": 2, "preview_steps": 2}
    root = make_project(tmp_path / "project", folders[family], values)
    run_all(root)
    kind = StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline
    pipeline = kind.from_pretrained(root / "export/biscuit", use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(INSTANCE, num_inference_steps=2, height=32, width=32).images[0]
    assert image.size == (32, 32)
    assert json.loads((root / "models/biscuit/manifest.json").read_text())["method"] == method
    assert json.loads((root / "metrics/biscuit.json").read_text())["prompts"] == 3
