"""The training of the text encoder and the UNet, on a toy."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from transformers import CLIPTextModel, CLIPTokenizer

from base import autoencoder, denoiser, text_encoder, tokenizer
from base.recipe import Recipe
from base.sprites import Sprites


@pytest.fixture(scope="module")
def words(values: Recipe) -> CLIPTokenizer:
    """Give a tokenizer of few captions."""
    return tokenizer.build(["a photo of a dog in space", "a fox"], ["sks"], values.text_encoder)


@pytest.fixture(scope="module")
def encoder(values: Recipe, words: CLIPTokenizer) -> CLIPTextModel:
    """Give an untrained text encoder."""
    return text_encoder.build(values, words)


@pytest.fixture(scope="module")
def vae(values: Recipe) -> AutoencoderKL:
    """Give an untrained autoencoder."""
    torch.manual_seed(0)
    return autoencoder.build(values.autoencoder, values.resolution).eval()


@pytest.fixture(scope="module")
def pools(
    values: Recipe, drawn: Sprites, vae: AutoencoderKL, words: CLIPTokenizer, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, denoiser.Pool]:
    """Encode the pool at both sizes."""
    folder = tmp_path_factory.mktemp("pools")
    return {size: denoiser.encode_pool(values, drawn, vae, words, size, folder) for size in (8, 16)}


def weights(trainer: denoiser.Trainer) -> torch.Tensor:
    """Give all averaged weights in a row."""
    return torch.cat([value.flatten() for part in trainer.average.weights.values() for value in part.values()])


def test_pool_holds_every_picture_at_its_size(values: Recipe, pools: dict[int, denoiser.Pool]) -> None:
    assert pools[8].moments.shape == (12, 2, 4, 2, 2)
    assert pools[16].moments.shape == (12, 2, 4, 4, 4)
    assert torch.equal(pools[8].input_ids, pools[16].input_ids)


def test_training_cut_in_two_gives_the_same_weights(
    values: Recipe,
    words: CLIPTokenizer,
    encoder: CLIPTextModel,
    pools: dict[int, denoiser.Pool],
    tmp_path: Path,
) -> None:
    whole = denoiser.Trainer(values, words, encoder, 4)
    denoiser.train(whole, pools.__getitem__, tmp_path / "whole.pt")
    first = denoiser.Trainer(values, words, encoder, 4)
    first.train_round(pools[8], values.denoiser.phases[0], 0.0)
    first.save(tmp_path / "cut.pt")
    second = denoiser.Trainer(values, words, encoder, 4)
    denoiser.train(second, pools.__getitem__, tmp_path / "cut.pt")
    assert whole.rows == second.rows == 24
    assert torch.equal(weights(whole), weights(second))


def test_min_snr_weights_are_those_of_the_paper() -> None:
    alphas = torch.tensor([0.9, 0.5])
    got = denoiser.min_snr_weights(alphas, torch.tensor([0, 1]), 5.0)
    assert torch.allclose(got, torch.tensor([5 / 10, 1 / 2]))


def test_without_gamma_every_timestep_weighs_the_same() -> None:
    assert denoiser.min_snr_weights(torch.tensor([0.9, 0.5]), torch.tensor([0, 1, 0]), 0.0).tolist() == [1, 1, 1]


def test_phases_follow_each_other_by_work(values: Recipe) -> None:
    small, large = 16 * 8**2, 8 * 16**2
    assert denoiser.phase_at(values.denoiser, 0.0) == 0
    assert denoiser.phase_at(values.denoiser, small / (small + large)) == 1
    assert denoiser.phase_at(values.denoiser, 1.0) == 1


def test_published_pipeline_loads_and_draws(
    values: Recipe, words: CLIPTokenizer, encoder: CLIPTextModel, vae: AutoencoderKL, tmp_path: Path
) -> None:
    trainer = denoiser.Trainer(values, words, encoder, 4)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "README.md").write_text("kept")
    for _ in range(2):
        copy = autoencoder.build(values.autoencoder, values.resolution)
        copy.load_state_dict(vae.state_dict())
        denoiser.publish(denoiser.assemble(values, trainer, copy, words), folder)
    assert (folder / "README.md").read_text() == "kept"
    assert not list(tmp_path.rglob("*.old"))
    assert not list(tmp_path.glob("*.part"))
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    other = denoiser.Trainer(values, words, encoder, 4)
    other.start_from(folder)
    assert torch.allclose(weights(other), weights(trainer), atol=1e-3)
    images = pipeline(["a fox", "zürich in 東京"], num_inference_steps=2, output_type="np").images
    assert images.shape == (2, 16, 16, 3)
