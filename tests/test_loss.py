"""The mathematics in closed form, at one, two and three rows: one row alone hides wrong broadcasting."""

import pytest
import torch

from dreambooth.loss import add_noise, dreambooth_loss, min_snr_weights, prediction_target, row_losses

ROWS = pytest.mark.parametrize("B", [1, 2, 3])


def alphas(B: int) -> torch.Tensor:
    return torch.tensor([0.9, 0.5, 0.1])[:B]


def tensors(B: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(B)
    return torch.randn(B, 4, 3, 2, generator=generator), torch.randn(B, 4, 3, 2, generator=generator)


@ROWS
def test_noise_is_added_with_each_rows_own_level(B: int) -> None:
    latents, noise = tensors(B)
    noisy = add_noise(latents, noise, alphas(B))
    for row, a in enumerate(alphas(B).tolist()):
        assert torch.allclose(noisy[row], a**0.5 * latents[row] + (1 - a) ** 0.5 * noise[row])


@ROWS
def test_v_and_noisy_latents_give_back_latents_and_noise(B: int) -> None:
    latents, noise = tensors(B)
    a = alphas(B)[:, None, None, None]
    noisy = add_noise(latents, noise, alphas(B))
    v = prediction_target("v_prediction", latents, noise, alphas(B))
    assert torch.allclose(a.sqrt() * noisy - (1 - a).sqrt() * v, latents, atol=1e-6)
    assert torch.allclose((1 - a).sqrt() * noisy + a.sqrt() * v, noise, atol=1e-6)


@ROWS
def test_the_target_of_epsilon_is_the_noise(B: int) -> None:
    latents, noise = tensors(B)
    assert torch.equal(prediction_target("epsilon", latents, noise, alphas(B)), noise)


def test_noise_levels_stay_distinct_at_the_first_timesteps() -> None:
    alpha_bar = torch.linspace(0.00085**0.5, 0.012**0.5, 1000).square().neg().add(1).cumprod(0)
    latents, noise = torch.zeros(1000, 1, 1, 1), torch.ones(1000, 1, 1, 1)
    sigmas = add_noise(latents.bfloat16(), noise.bfloat16(), alpha_bar).flatten()
    assert sigmas.dtype == torch.float32
    assert len(sigmas.unique()) == 1000
    assert sigmas[0] > 0


def test_min_snr_weights_every_row_by_hand() -> None:
    alpha_bar = torch.tensor([0.5, 0.9, 0.99])  # snr 1, 9, 99
    assert torch.allclose(min_snr_weights("epsilon", alpha_bar, 5.0), torch.tensor([1.0, 5 / 9, 5 / 99]), rtol=1e-4)
    assert torch.allclose(min_snr_weights("v_prediction", alpha_bar, 5.0), torch.tensor([0.5, 0.5, 0.05]), rtol=1e-4)


@ROWS
def test_without_gamma_all_rows_weigh_the_same(B: int) -> None:
    assert torch.equal(min_snr_weights("epsilon", alphas(B), None), torch.ones(B))


@ROWS
def test_a_row_loss_is_the_mean_square_of_its_row(B: int) -> None:
    prediction, target = tensors(B)
    expected = [((prediction[row] - target[row]) ** 2).mean() for row in range(B)]
    assert torch.allclose(row_losses(prediction, target), torch.stack(expected))


@ROWS
def test_the_loss_is_the_sum_of_both_means(B: int) -> None:
    """With B instance and B prior rows it is mean(instance) + lambda mean(prior): equation 2 of the paper."""
    instance, prior = torch.arange(1.0, B + 1), torch.arange(10.0, B + 10)
    losses, weights = torch.cat([instance, prior]), torch.tensor([1.0] * B + [0.3] * B)
    is_instance = torch.tensor([True] * B + [False] * B)
    assert torch.allclose(dreambooth_loss(losses, weights, is_instance.sum()), instance.mean() + 0.3 * prior.mean())
    shuffled = torch.randperm(2 * B, generator=torch.Generator().manual_seed(0))
    again = dreambooth_loss(losses[shuffled], weights[shuffled], is_instance[shuffled].sum())
    assert torch.allclose(again, instance.mean() + 0.3 * prior.mean())
