"""The judge: what it is asked, what it learns, and that it continues after a kill."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from base import compose, judge
from base.recipe import Recipe
from base.sprites import Sprites


def test_only_what_the_caption_says_is_asked(values: Recipe, drawn: Sprites) -> None:
    plans = [compose.plan(values, drawn, 0, index) for index in range(60)]
    noun, colour, scene = judge.targets(values, plans)
    assert [list(values.nouns)[k] for k in noun.tolist()] == [plan.noun for plan in plans]
    for plan, c, s in zip(plans, colour.tolist(), scene.tolist(), strict=True):
        assert (c != judge.UNKNOWN) == (plan.context in values.colours)
        assert (s != judge.UNKNOWN) == (plan.context in values.scenes)


def test_loss_of_equal_logits_is_the_sum_of_the_logarithms() -> None:
    logits = [torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2, 5)]
    right = torch.tensor([[0, 1], [2, judge.UNKNOWN], [judge.UNKNOWN, judge.UNKNOWN]])
    assert judge.loss(logits, right).item() == pytest.approx(np.log(3) + np.log(4))


def test_batch_is_a_function_of_seed_and_step_and_mirrors_half() -> None:
    pixels = torch.arange(8 * 4 * 4 * 3, dtype=torch.uint8).view(8, 4, 4, 3)
    right = torch.arange(8).repeat(3, 1)
    first, again = judge.batch(pixels, right, 1, 0, 64), judge.batch(pixels, right, 1, 0, 64)
    assert torch.equal(first[0], again[0])
    rows = first[1][0]
    plain = (first[0] == judge.to_tensor(pixels[rows].numpy())).flatten(1).all(1)
    mirrored = (first[0] == judge.to_tensor(pixels[rows].flip(2).numpy())).flatten(1).all(1)
    assert bool((plain | mirrored).all())
    assert 16 < int(mirrored.sum()) < 48


def test_judge_learns_and_continues_where_it_was(values: Recipe, drawn: Sprites, tmp_path: Path) -> None:
    once = judge.train(values, drawn, tmp_path / "once.pt")
    half = values.model_copy(update={"judge": values.judge.model_copy(update={"rows": 32})})
    judge.train(half, drawn, tmp_path / "twice.pt")
    twice = judge.train(values, drawn, tmp_path / "twice.pt")
    assert all(value.shape == twice.state_dict()[name].shape for name, value in once.state_dict().items())
    state = torch.load(tmp_path / "twice.pt", weights_only=True)
    assert state["step"] == 8


def test_trained_judge_beats_chance_on_fresh_pictures(values: Recipe, drawn: Sprites, tmp_path: Path) -> None:
    section = values.judge.model_copy(update={"pool": 200, "rows": 4000, "batch_size": 16, "fresh_rows": 60})
    values = values.model_copy(update={"judge": section})
    net = judge.train(values, drawn, tmp_path / "checkpoint.pt")
    shares = judge.measure(values, drawn, net)
    assert shares["pictures"] == 60
    assert shares["noun"] > 0.6
    assert shares["colour"] > 0.3


def test_logits_of_a_picture_do_not_depend_on_its_neighbours(values: Recipe) -> None:
    net = judge.build(values).eval()
    images = [Image.new("RGB", (16, 16), colour) for colour in ("red", "green", "blue")]
    together = judge.logits(net, images, batch_size=2)
    for k, image in enumerate(images):
        alone = judge.logits(net, [image])
        for kind in judge.KINDS:
            torch.testing.assert_close(alone[kind][0], together[kind][k], atol=1e-5, rtol=0)
