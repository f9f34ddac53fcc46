"""Scores over embeddings, by closed forms and by hand."""

import math

import pytest
import torch

from dreambooth.fidelity import Interval, calibrated, ceiling, cosine, diversity, identity, nearest, paired_interval

X, Y, DIAGONAL = [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]
HALF = math.sqrt(0.5)  # cosine of 45 degrees


def test_cosine_by_hand():
    table = cosine(torch.tensor([X, DIAGONAL, [-1.0, 0.0]]), torch.tensor([X, Y]))
    torch.testing.assert_close(table, torch.tensor([[1.0, 0.0], [HALF, HALF], [-1.0, 0.0]]))


def test_cosine_ignores_length_and_stays_in_range():
    rows = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    table = cosine(rows * 1000, rows * 0.001)
    torch.testing.assert_close(table, cosine(rows, rows))
    assert table.abs().max() <= 1


def test_identity_by_hand_averages_over_photos_only():
    generated = torch.tensor([[X, Y], [DIAGONAL, [-1.0, 0.0]]])
    scores = identity(generated, torch.tensor([X, X, Y]))
    torch.testing.assert_close(scores, torch.tensor([[2 / 3, 1 / 3], [HALF, -2 / 3]]))


@pytest.mark.parametrize(("prompts", "seeds", "photos"), [(1, 1, 1), (2, 1, 3), (1, 3, 2), (3, 2, 1)])
def test_identity_has_one_score_an_image(prompts, seeds, photos):
    generator = torch.Generator().manual_seed(1)
    generated, real = torch.randn(prompts, seeds, 5, generator=generator), torch.randn(photos, 5, generator=generator)
    scores = identity(generated, real)
    assert scores.shape == (prompts, seeds)
    for p in range(prompts):
        for s in range(seeds):
            by_hand = sum(torch.dot(generated[p, s], r) / (generated[p, s].norm() * r.norm()) for r in real) / photos
            torch.testing.assert_close(scores[p, s], by_hand)


def test_ceiling_by_hand_at_two_and_three_photos():
    assert ceiling(torch.tensor([X, DIAGONAL])) == pytest.approx(HALF)
    assert ceiling(torch.tensor([X, Y, DIAGONAL])) == pytest.approx(2 * HALF / 3)


def test_ceiling_is_the_mean_of_leaving_one_photo_out():
    real = torch.randn(5, 4, generator=torch.Generator().manual_seed(2))
    rest = [torch.cat([real[:i], real[i + 1 :]]) for i in range(5)]
    left_out = torch.stack([identity(real[i].view(1, 1, 4), rest[i]) for i in range(5)])
    assert ceiling(real) == pytest.approx(left_out.mean().item(), abs=1e-6)


def test_ceiling_of_one_photo_repeated_is_one():
    assert ceiling(torch.tensor([DIAGONAL] * 3)) == pytest.approx(1.0)


def test_calibrated_is_zero_at_the_floor_and_one_at_the_ceiling():
    assert calibrated(0.4, floor=0.4, ceiling=0.8) == 0
    assert calibrated(0.8, floor=0.4, ceiling=0.8) == pytest.approx(1)
    assert calibrated(0.5, floor=0.4, ceiling=0.8) == pytest.approx(0.25)
    assert calibrated(0.9, floor=0.4, ceiling=0.8) == pytest.approx(1.25)


def test_calibrated_refuses_a_ceiling_at_the_floor():
    with pytest.raises(ValueError, match=r"ceiling 0\.400 is not above floor 0\.400"):
        calibrated(0.5, floor=0.4, ceiling=0.4)


def test_diversity_by_hand_one_value_a_prompt():
    values = diversity(torch.tensor([[X, X, X], [X, Y, DIAGONAL], [X, Y, [-1.0, 0.0]]]))
    torch.testing.assert_close(values, torch.tensor([0.0, 1 - 2 * HALF / 3, 4 / 3]))


def test_diversity_of_opposite_seeds_is_two():
    assert diversity(torch.tensor([[X, [-3.0, 0.0]]])).item() == pytest.approx(2)


def test_nearest_names_the_photo_and_its_cosine():
    found = nearest(torch.tensor([[X, [0.1, 2.0]], [DIAGONAL, Y]]), torch.tensor([Y, X, DIAGONAL]))
    assert found.photo.tolist() == [[1, 0], [2, 0]]
    torch.testing.assert_close(found.cosine, torch.tensor([[1.0, 2 / math.hypot(0.1, 2)], [1.0, 1.0]]))


def test_paired_interval_by_hand_at_two_and_three_prompts():
    two = paired_interval(torch.tensor([0.01, 0.03]))  # s / sqrt(2) = .01, t[1] = 12.7062
    assert two == pytest.approx(Interval(0.02, 0.02 - 0.127062, 0.02 + 0.127062, 2), abs=1e-6)
    three = paired_interval(torch.tensor([0.0, 0.03, 0.06]))  # s / sqrt(3) = .0173205, t[2] = 4.302653
    assert three == pytest.approx(Interval(0.03, 0.03 - 0.0745241, 0.03 + 0.0745241, 3), abs=1e-6)


def test_paired_interval_of_equal_differences_has_no_width():
    assert paired_interval(torch.full((4,), 0.25)) == Interval(0.25, 0.25, 0.25, 4)


def test_paired_interval_covers_the_true_mean_as_often_as_it_says():
    samples = torch.randn(1000, 6, generator=torch.Generator().manual_seed(3)) * 0.05 + 0.02
    hits = sum(low <= 0.02 <= high for _, low, high, _ in (paired_interval(row, confidence=0.9) for row in samples))
    assert hits / 1000 == pytest.approx(0.9, abs=0.03)  # 3 standard errors


@pytest.mark.parametrize(
    ("differences", "message"),
    [
        (torch.tensor([]), "at least 2 prompts, got 0"),
        (torch.tensor([0.1]), "at least 2 prompts, got 1"),
        (torch.tensor([0.1, math.nan, 0.2]), "NaN or infinity at prompts 1"),
        (torch.tensor([math.inf, 0.1]), "NaN or infinity at prompts 0"),
        (torch.zeros(3, 2), "average over seeds first"),
    ],
)
def test_paired_interval_refuses(differences, message):
    with pytest.raises(ValueError, match=message):
        paired_interval(differences)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95.0, math.nan])
def test_paired_interval_refuses_a_confidence_outside_0_to_1(confidence):
    with pytest.raises(ValueError, match="not between 0 and 1"):
        paired_interval(torch.tensor([0.1, 0.2]), confidence)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0])
def test_rows_without_a_direction_are_refused_by_every_score(bad):
    good = torch.ones(2, 2, 3)
    broken = good.clone()
    broken[1, 0] = bad
    scores = [
        lambda: identity(broken, good[0]),
        lambda: identity(good, broken[1]),
        lambda: ceiling(broken[1]),
        lambda: diversity(broken),
        lambda: nearest(broken, good[0]),
    ]
    for score in scores:
        with pytest.raises(ValueError, match="NaN, infinity or only zeros in rows"):
            score()


def test_refusal_names_the_rows():
    rows = torch.ones(2, 2, 3)
    rows[1, 0, 2] = math.nan
    with pytest.raises(ValueError, match=r"in rows \(1, 0\)$"):
        diversity(rows)


@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_calibrated_refuses_what_is_no_number(score):
    with pytest.raises(ValueError, match="expected finite numbers"):
        calibrated(score, floor=0.4, ceiling=0.8)


def test_too_few_rows_are_refused():
    with pytest.raises(ValueError, match="at least 2 photos, got 1"):
        ceiling(torch.ones(1, 3))
    with pytest.raises(ValueError, match="at least 2 seeds of a prompt, got 1"):
        diversity(torch.ones(4, 1, 3))
    with pytest.raises(ValueError, match=r"shape \(0, 3\) are empty"):
        identity(torch.ones(1, 1, 3), torch.ones(0, 3))
