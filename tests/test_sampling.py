"""A seed is a picture: whatever stands beside it, and by whichever program."""

import inspect
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from dreambooth.errors import ModelError
from dreambooth.models import Model, load_model
from dreambooth.params import WITHOUT_ZERO_SNR
from dreambooth.sampling import (
    SCHEDULERS,
    SamplerSettings,
    decode,
    draw,
    draw_batch,
    encode_prompts,
    first_latents,
    guide,
    make_scheduler,
)


@pytest.fixture(scope="module")
def model(tiny_model_folder: Path) -> Model:
    return load_model(tiny_model_folder, device="cpu")


def settings(**changes: object) -> SamplerSettings:
    values = {"scheduler": "dpmsolver++", "num_inference_steps": 4, "guidance_scale": 3.0, "resolution": 32}
    return SamplerSettings(**values | changes)  # type: ignore[arg-type]


def pixels(images: list[object]) -> np.ndarray:
    return np.stack([np.asarray(image, dtype=int) for image in images])


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_solver_draws_on_the_noise_schedule_of_the_base_to_its_last_step_or_is_refused(scheduler: str) -> None:
    trained = DDIMScheduler(
        beta_schedule="scaled_linear", prediction_type="v_prediction", rescale_betas_zero_snr=True
    ).config
    if scheduler in WITHOUT_ZERO_SNR:
        with pytest.raises(ModelError, match=r"scheduler pndm would draw .*; take one of dpmsolver\+\+, ddim, euler"):
            make_scheduler(scheduler, trained)
    else:
        assert make_scheduler(scheduler, trained).alphas_cumprod[-1] < 1e-6
    own = getattr(diffusers, SCHEDULERS[scheduler][0])
    assert ("rescale_betas_zero_snr" in inspect.signature(own).parameters) == (scheduler not in WITHOUT_ZERO_SNR)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_the_pictures_are_those_of_the_pipeline_of_diffusers(
    model: Model, tiny_model_folder: Path, scheduler: str
) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_model_folder, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = make_scheduler(scheduler, model.scheduler_config)
    prompts, seeds = ["a photo of a dog", "a cat in space"], [3, 4]
    theirs = pipeline(
        prompts, latents=first_latents(model, seeds, 32), num_inference_steps=4, guidance_scale=3.0,
        negative_prompt=["bad"] * 2, height=32, width=32,
    ).images  # fmt: skip
    ours = draw(model, prompts, seeds, settings(scheduler=scheduler, negative_prompt="bad"))
    assert abs(pixels(ours) - pixels(theirs)).max() <= 1


def test_an_image_does_not_depend_on_its_company_or_its_batch(model: Model) -> None:
    prompts, seeds = ["a", "b", "c", "d", "e"], [1, 2, 3, 4, 5]
    together = pixels(draw(model, prompts, seeds, settings(batch_size=5)))
    for size in (1, 2, 3):
        assert abs(pixels(draw(model, prompts, seeds, settings(batch_size=size))) - together).max() <= 1


def test_equal_seeds_give_equal_pictures_and_others_do_not(model: Model) -> None:
    one, two, other = pixels(draw(model, ["a"] * 3, [7, 7, 8], settings()))
    assert np.array_equal(one, two)
    assert not np.array_equal(one, other)


def test_the_prompt_the_negative_prompt_and_the_guidance_change_the_picture(model: Model) -> None:
    plain = pixels(draw(model, ["a dog"], [1], settings()))
    for prompt, changes in (
        ("a cat", {}),
        ("a dog", {"negative_prompt": "red"}),
        ("a dog", {"guidance_scale": 9.0}),
        ("a dog", {"guidance_scale": 1.0}),
    ):
        assert not np.array_equal(plain, pixels(draw(model, [prompt], [1], settings(**changes))))


def test_drawing_does_not_touch_the_global_generator(model: Model) -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    draw(model, ["a"], [1], settings())
    assert torch.equal(torch.rand(3), expected)


def test_guidance_by_hand() -> None:
    u, c = torch.tensor([1.0, 2.0]), torch.tensor([2.0, 0.0])
    assert torch.equal(guide(u, c, 1.0), c)
    assert torch.equal(guide(u, c, 0.0), u)
    assert torch.equal(guide(u, c, 3.0), torch.tensor([4.0, -4.0]))


def test_a_prompt_that_stands_twice_is_encoded_once(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    forward = model.text_encoder.forward
    monkeypatch.setattr(
        model.text_encoder, "forward", lambda ids, **more: (sizes.append(len(ids)), forward(ids, **more))[1]
    )
    embeds = encode_prompts(model, ["a", "b", "a", "a"]).embeds
    assert sizes == [2]
    assert torch.equal(embeds[0], embeds[3])
    assert not torch.equal(embeds[0], embeds[1])


def test_latents_that_are_not_finite_decode_to_black(model: Model) -> None:
    image = decode(model, torch.full((1, 4, 16, 16), float("nan")))[0]
    assert not np.asarray(image).any()


def test_a_picture_decoded_alone_is_the_one_of_the_whole_batch(model: Model) -> None:
    prompts, seeds = ["a dog", "a cat", "a bird"], [1, 2, 3]
    whole = list(draw_batch(model, prompts, seeds, settings()))
    (alone,) = draw_batch(model, prompts, seeds, settings(), wanted=[1])
    assert np.array_equal(np.asarray(alone.image), np.asarray(whole[1].image))
    assert torch.equal(alone.latents, whole[1].latents)
