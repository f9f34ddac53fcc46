"""The judge of the base model, on features made by hand."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from base import card, quality
from base.recipe import Recipe


def test_judge_looks_past_what_varies_within_the_classes() -> None:
    rng = np.random.default_rng(0)
    labels = ["cat", "dog"] * 200
    features = np.zeros((400, 3))
    features[:, 0] = rng.normal(0, 3, 400)
    features[:, 1] = [1.0 if label == "dog" else -1.0 for label in labels] + rng.normal(0, 0.1, 400)
    judge = quality.fit(features[:300], labels[:300])
    assert quality.share(judge(features[300:]), labels[300:]) > 0.95


@pytest.mark.parametrize("noise", [0, 10])
def test_background_colour_is_read_from_the_corners(values: Recipe, noise: int) -> None:
    rng = np.random.default_rng(0)
    for name, colour in values.colours.items():
        pixels = np.clip(colour + rng.normal(0, noise, (64, 64, 3)), 0, 255).astype(np.uint8)
        pixels[12:52, 12:52] = 0
        assert quality.nearest_colour(Image.fromarray(pixels), values.colours) == name


def test_every_noun_is_asked_for_on_a_colour_and_in_a_scene(values: Recipe) -> None:
    rows = quality.prompts(values)
    assert len(rows) == 2 * len(values.nouns)
    assert {(noun, context in values.scenes) for _, noun, context in rows} == {
        (noun, scene) for noun in values.nouns for scene in (True, False)
    }
    assert rows[0][0] == f"a photo of a dog on a {rows[0][2]} background"


def test_card_names_every_set_and_licence(values: Recipe, tmp_path: Path) -> None:
    training = (
        '{"rows": 2, "rows_before": 1, "minutes": 1, "share": 1, "parameters": 1, '
        '"vae_parameters": 1, "vae_rows": 1, "vae_minutes": 1}'
    )
    (tmp_path / "training.json").write_text(training)
    text = card.card(values, tmp_path)
    for name, package in values.packages.items():
        assert name in text
        assert package.attribution in text
    assert "Not measured yet" in text
