"""Rows: each carries its own prompt, role and randomness; the order is a function of the step."""

from collections import Counter

import pytest
import torch

from dreambooth.dataset import Posterior, Role, Sample, collate, micro_batches, rows_of_step


def samples(count: int, role: Role) -> list[Sample]:
    return [
        Sample(f"{role}-{i}", Posterior(torch.full((1, 2, 2), float(i)), torch.zeros(1, 2, 2)), f"a {role}", role)
        for i in range(count)
    ]


INSTANCE, PRIOR = samples(5, "instance"), samples(7, "prior")


def test_every_sample_is_seen_once_before_any_is_seen_again() -> None:
    rows = [row for step in range(35) for row in rows_of_step(step, 2, INSTANCE, PRIOR, 1.0, 0)]
    seen = Counter(row.sample.id for row in rows)
    assert {seen[sample.id] for sample in INSTANCE} == {35 * 2 / 5}
    assert {seen[sample.id] for sample in PRIOR} == {35 * 2 / 7}
    first_epoch = [row.sample.id for row in rows if row.sample.role == "instance"][:5]
    assert len(set(first_epoch)) == 5


def test_the_rows_of_a_step_do_not_depend_on_the_steps_before() -> None:
    straight = [rows_of_step(step, 3, INSTANCE, PRIOR, 1.0, 4) for step in range(10)]
    assert rows_of_step(7, 3, INSTANCE, PRIOR, 1.0, 4) == straight[7]


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_accumulation_deals_out_the_same_rows_and_the_same_randomness(count: int) -> None:
    rows = rows_of_step(3, 6, INSTANCE, PRIOR, 1.0, 0)
    whole = collate(rows, 3, 1000, 0, 0.0, 6)
    parts = [collate(part, 3, 1000, 0, 0.0, 6 // count) for part in micro_batches(rows, count)]
    order = [row.index for part in micro_batches(rows, count) for row in part]
    assert sorted(order) == list(range(12))
    assert torch.equal(torch.cat([part.noise for part in parts]), whole.noise[order])
    assert torch.equal(torch.cat([part.timesteps for part in parts]), whole.timesteps[order])
    assert {int(part.is_instance.sum()) for part in parts} == {6 // count}


def test_a_row_keeps_its_prompt_weight_and_latents_together() -> None:
    rows = rows_of_step(0, 2, INSTANCE, PRIOR, 0.25, 0)
    batch = collate(rows[::-1], 0, 1000, 0, 0.0, 2)
    for i, row in enumerate(rows[::-1]):
        assert batch.prompts[i] == f"a {row.sample.role}"
        assert batch.weights[i] == (1.0 if row.sample.role == "instance" else 0.25)
        assert bool(batch.is_instance[i]) == (row.sample.role == "instance")
        assert torch.equal(batch.latents[i], row.sample.posterior.mean)


def test_a_fresh_latent_is_drawn_from_the_posterior_at_every_step() -> None:
    wide = [Sample("a", Posterior(torch.zeros(1, 32, 32), torch.full((1, 32, 32), 2.0)), "a", "instance")]
    draws = [collate(rows_of_step(step, 1, wide, [], 1.0, 0), step, 1000, 0, 0.0, 1).latents for step in (0, 1)]
    assert not torch.equal(draws[0], draws[1])
    assert abs(draws[0].std().item() - 2) < 0.2


def test_without_class_images_there_are_instance_rows_only() -> None:
    rows = rows_of_step(0, 4, INSTANCE, [], 1.0, 0)
    assert [row.sample.role for row in rows] == ["instance"] * 4
