"""Scores over embeddings, by closed forms and by hand."""

import math

import numpy as np
import pytest
import torch

from dreambooth.fidelity import (
    COPY_DISTANCE,
    Interval,
    calibrated,
    ceiling,
    copies,
    copy_cosine,
    cosine,
    discrepancy,
    diversity,
    identity,
    paired_interval,
    prompt_fidelity,
    widened,
)

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
        lambda: cosine(broken, good[0]),
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


def test_prompt_fidelity_compares_each_image_with_its_own_prompt():
    images = torch.tensor([[X, DIAGONAL], [X, [0.0, 5.0]]])
    torch.testing.assert_close(prompt_fidelity(images, torch.tensor([X, Y])), torch.tensor([[1.0, HALF], [0.0, 1.0]]))
    torch.testing.assert_close(prompt_fidelity(images[:1, :1], torch.tensor([X])), torch.tensor([[1.0]]))


def test_prompt_fidelity_refuses_another_number_of_prompts():
    with pytest.raises(ValueError, match="images of 2 prompts but 1 prompts"):
        prompt_fidelity(torch.ones(2, 1, 3), torch.ones(1, 3))


def test_a_copy_is_above_the_cosine_or_within_the_bits():
    near = torch.tensor([0.93, 0.92, 0.1, 0.1])
    bits = np.array([63, COPY_DISTANCE + 1, COPY_DISTANCE, COPY_DISTANCE + 1])
    assert copies(near, bits, 0.92).tolist() == [True, False, True, False]


def test_a_cosine_that_is_no_number_is_no_verdict_on_copying():
    with pytest.raises(ValueError, match="NaN or infinity at 1"):
        copies(torch.tensor([0.1, math.nan]), np.array([63, 63]), 0.92)


def test_photos_of_one_thing_are_no_copies_of_each_other():
    assert copy_cosine(torch.tensor([X, Y, DIAGONAL]), None) == pytest.approx(1 - (1 - HALF) / 2.5)
    assert copy_cosine(torch.tensor([X, X]), None) == 1
    with pytest.raises(ValueError, match="at least 2 photos, got 1"):
        copy_cosine(torch.tensor([X]), None)


@pytest.mark.parametrize("photos", [3, 5])
@pytest.mark.parametrize("spread", [0.1, 0.5, 1.0])
def test_one_more_photo_of_the_subject_is_no_copy_where_nothing_was_measured_but_a_saved_one_is(
    photos: int, spread: float
) -> None:
    chance = torch.Generator().manual_seed(0)
    subject = torch.nn.functional.normalize(torch.randn(400, 1, 64, generator=chance), dim=-1)
    away = torch.nn.functional.normalize(torch.randn(400, photos + 1, 64, generator=chance), dim=-1)
    saved = torch.nn.functional.normalize(torch.randn(400, 1, 64, generator=chance), dim=-1)
    rows = subject + spread * away
    others, again = 0, 0
    for known, new, noise in zip(rows[:, 1:], rows[:, :1], saved, strict=True):
        threshold = copy_cosine(known, None)
        others += bool(cosine(new, known).max() > threshold)
        again += bool(cosine(known[:1] + spread / 3 * noise, known).max() > threshold)
    assert others / 400 < 0.05
    assert again == 400


def test_two_photos_that_are_nearly_one_still_leave_room_for_a_copy() -> None:
    nearly = torch.tensor([X, [0.99, math.sqrt(1 - 0.99**2)]])
    assert copy_cosine(nearly, None) == pytest.approx(0.996)


def test_a_measured_copy_cosine_is_raised_a_little_by_photos_that_are_alike_and_never_lowered():
    assert copy_cosine(torch.tensor([X, Y]), 0.92) == 0.92
    assert copy_cosine(torch.tensor([X, X]), 0.92) == pytest.approx(0.95)
    nearly = torch.tensor([X, [0.91, math.sqrt(1 - 0.91**2)]])
    assert copy_cosine(nearly, 0.92) == pytest.approx(0.93)


def test_discrepancy_by_hand_at_two_pairs():
    # rows X X against Y Y: squared distances 0 within, 2 between; the median of those above 0 is 2, so k is 1 or 1/e
    found = discrepancy(torch.tensor([X, X]), torch.tensor([Y, Y]))
    assert found.mmd2 == pytest.approx(2 - 2 / math.e)
    assert found.p_value == pytest.approx(
        0.5, abs=0.06
    )  # of four signs two give as much: nothing is shown by two pairs


def test_equal_models_have_no_discrepancy():
    rows = torch.randn(8, 5, generator=torch.Generator().manual_seed(4))
    assert discrepancy(rows, rows * 3) == pytest.approx((0, 1))


def test_discrepancy_sees_a_shift_and_its_p_value_is_small():
    generator = torch.Generator().manual_seed(5)
    base = torch.randn(24, 6, generator=generator)
    found = discrepancy(base, base + torch.tensor([1.5, 0, 0, 0, 0, 0]))
    assert found.mmd2 > 0.05
    assert found.p_value == pytest.approx(1 / 1000)


def test_under_chance_a_p_value_below_a_tenth_comes_once_in_ten_times():
    generator = torch.Generator().manual_seed(6)
    draws = [torch.randn(2, 12, 4, generator=generator) for _ in range(400)]
    p_values = torch.tensor([discrepancy(base, tuned, permutations=99).p_value for base, tuned in draws])
    assert (p_values <= 0.1).float().mean().item() == pytest.approx(0.1, abs=0.045)  # 3 standard errors


def test_discrepancy_is_unbiased():
    generator = torch.Generator().manual_seed(7)
    values = torch.tensor(
        [discrepancy(*torch.randn(2, 8, 4, generator=generator), permutations=1).mmd2 for _ in range(500)]
    )
    assert abs(values.mean().item()) < 3 * values.std().item() / 500**0.5


def test_discrepancy_refuses_rows_that_are_no_pairs():
    with pytest.raises(ValueError, match="expected the same"):
        discrepancy(torch.ones(3, 2), torch.ones(2, 2))
    with pytest.raises(ValueError, match="2 rows or more"):
        discrepancy(torch.ones(1, 2), torch.ones(1, 2))


def test_an_interval_that_holds_for_several_comparisons_is_wider_as_the_quantiles_of_t_say() -> None:
    assert widened(0.1, 6, 0.95, 1) == pytest.approx(0.1)
    assert widened(0.1, 6, 0.95, 5) == pytest.approx(0.1 * 4.0321 / 2.5706, rel=1e-4)  # t of 5: 99 % beside 95 %
