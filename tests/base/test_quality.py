"""What the base model is asked to draw, and how two judges count what is right."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from base import card, judge, quality, recipe, scorer
from base.recipe import Recipe
from base.sprites import Sprites
from dreambooth.vocabulary import read_vocabulary

TRAINING = {"rows": 2, "rows_before": 1, "minutes": 1, "share": 1, "parameters": 1}
TRAINING |= {"vae_parameters": 1, "vae_rows": 1, "vae_minutes": 1}


def test_prompts_are_half_on_colours_half_in_scenes_and_all_nouns_are_equally_likely() -> None:
    values = recipe.load()
    asked = quality.prompts(values)
    assert asked == quality.prompts(values)
    half = values.quality.prompts
    assert half == 25
    assert [row.context in values.colours for row in asked] == [True] * half + [False] * half
    assert all(row.context in values.scenes for row in asked[half:])
    assert len({row.noun for row in asked}) == 2 * half
    assert set(Counter(row.context for row in asked[:half]).values()) == {3, 4}
    assert set(Counter(row.context for row in asked[half:]).values()) == {1, 2}


def test_right_noun_stands_against_nineteen_others() -> None:
    for row in quality.prompts(recipe.load()):
        assert row.candidates[0] == row.noun
        assert len(set(row.candidates)) == 20


def test_every_prompt_is_within_the_scorers_vocabulary() -> None:

    vocabulary = read_vocabulary(scorer.as_bytes(scorer.vocabulary(recipe.load())), Path("vocabulary.json"))
    for row in quality.prompts(recipe.load()):
        assert len(vocabulary.bag(row.prompt)) == 2


def asked(values: Recipe) -> list[quality.Asked]:
    return [
        quality.Asked("a photo of a dog in space", "dog", "in space", ("dog", "fox")),
        quality.Asked("a photo of a fox on a red background", "fox", "red", ("fox", "dog")),
        quality.Asked("a photo of an apple on a blue background", "apple", "blue", ("apple", "dog")),
    ]


def test_verdict_counts_the_questions_that_were_asked(values: Recipe) -> None:
    said = {0: "in space", 1: "red", 2: "green"}  # the third background is wrong, the second noun too

    def answer(number: int, kind: str, names: object) -> np.ndarray:
        wanted = said[number] if kind != "noun" else ("dog", "dog", "apple")[number]
        return np.array([float(name == wanted) for name in names])  # type: ignore[attr-defined]

    verdict = quality.judged(values, asked(values), answer)
    assert verdict == quality.Verdict(noun=[True, False, True], colour=[True, False], scene=[True])
    assert quality.shares(verdict) == {"noun": pytest.approx(2 / 3), "colour": 0.5, "scene": 1.0}


def test_judge_chooses_among_the_candidates_only(values: Recipe) -> None:
    net = judge.build(values).eval()
    for head, names in zip(net.heads, judge.answers(values).values(), strict=True):
        torch.nn.init.zeros_(head.weight)
        bias = torch.zeros(len(names))
        bias[[k for k, name in enumerate(names) if name in ("fox", "red", "in space")]] = 1
        bias[[k for k, name in enumerate(names) if name == "apple"]] = 2
        head.bias.data = bias
    images = [Image.new("RGB", (16, 16))] * 3
    verdict = quality.by_judge(net, values, asked(values), images)
    assert verdict == quality.Verdict(noun=[False, True, True], colour=[True, False], scene=[True])


def test_composed_pictures_show_what_was_asked(values: Recipe, drawn: Sprites) -> None:
    rows = asked(values)
    images = quality.composed(values, drawn, rows, [0, 1, 2])
    assert [image.size for image in images] == [(values.resolution,) * 2] * 3
    corner = np.asarray(images[1], float)[0, 0]
    assert np.abs(corner - values.colours["red"]).max() < 50
    assert quality.composed(values, drawn, rows, [0, 1, 2])[0].tobytes() == images[0].tobytes()


def result() -> dict[str, object]:
    right = {"noun": 0.81, "colour": 0.9, "scene": 0.7}
    rows = {name: {"scorer": dict(right), "judge": dict(right)} for name in card.ROWS}
    rows["model"]["judge"]["noun"] = 0.79
    return {
        "on_colours": 25, "in_scenes": 25, "seeds": 4, "candidates": 20, "nouns": 73, "colours": 8, "scenes": 14,
        "steps": 25, "guidance_scale": 4.0, "scorer": "x", "rows": rows, "by_noun": {"dog": 0.5, "cat": 0.9},
        "judge_on_fresh_composed": {"pictures": 9, "noun": 0.95, "colour": 0.99, "scene": 0.98},
    }  # fmt: skip


def test_card_names_every_set_and_licence(values: Recipe, tmp_path: Path) -> None:
    (tmp_path / "training.json").write_text(json.dumps(TRAINING))
    text = card.card(values, tmp_path)
    for name, package in values.packages.items():
        assert name in text
        assert package.attribution in text
    assert "Not measured yet" in text


def test_card_says_which_bars_are_reached_and_who_misses_which(values: Recipe, tmp_path: Path) -> None:
    (tmp_path / "training.json").write_text(json.dumps(TRAINING))
    (tmp_path / quality.FILE).write_text(json.dumps(result()))
    text = card.card(values, tmp_path)
    assert "* noun, bar 0.80: not reached by judge 0.79." in text
    assert "* colour, bar 0.80: reached by both judges." in text
    assert "* scene, bar 0.70: reached by both judges." in text
    assert "dog (50%)" in text
    assert "cat (90%)" not in text
    assert text.count("| this model |") == text.count("| a pipeline with random weights |") == 2
