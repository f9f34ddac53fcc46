"""Randomness is a function of (seed, purpose, step, row)."""

import torch

from dreambooth import rng


def test_a_row_draws_the_same_alone_and_in_any_company() -> None:
    together = rng.normal((2, 3), 7, "noise", 5, [0, 1, 2, 3])
    alone = [rng.normal((2, 3), 7, "noise", 5, [row]) for row in range(4)]
    assert torch.equal(together, torch.cat(alone))


def test_drawing_does_not_touch_the_global_generator() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    rng.normal((8,), 0, "noise", 0, [0, 1])
    assert torch.equal(torch.rand(3), expected)


def test_no_two_places_share_a_seed() -> None:
    seeds = {
        rng.derive_seed(seed, purpose, step, row)
        for seed in range(4)
        for purpose in ("noise", "timestep", "posterior")
        for step in range(20)
        for row in range(20)
    }
    assert len(seeds) == 4 * 3 * 20 * 20
    assert rng.derive_seed(1, "noise", 11, 1) != rng.derive_seed(1, "noise", 1, 11)


def test_noise_is_standard_normal() -> None:
    noise = rng.normal((4, 16, 16), 0, "noise", 0, range(64))
    assert abs(noise.mean().item()) < 0.01
    assert abs(noise.std().item() - 1) < 0.01


def test_integers_cover_their_range() -> None:
    draws = rng.integers(10, 0, "timestep", 0, range(400))
    assert sorted(draws.unique().tolist()) == list(range(10))


def test_a_permutation_holds_each_number_once_and_changes_with_the_epoch() -> None:
    first, second = rng.permutation(20, 3, "order", 0), rng.permutation(20, 3, "order", 1)
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second
