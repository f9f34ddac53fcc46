"""Drawings redrawn, extra drawings named, pictures spoiled."""

import numpy as np

from base import hands, recipe
from base.recipe import Recipe
from base.soften import soften
from base.sprites import Sprites


def drawing() -> np.ndarray:
    pixels = np.zeros((96, 96, 4), np.uint8)
    pixels[20:76, 20:76] = (200, 80, 40, 255)
    return pixels


def test_another_hand_changes_the_drawing_a_little_and_is_a_function_of_its_seed() -> None:
    made = [hands.another_hand(drawing(), np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert np.array_equal(made[0], made[1])
    assert not np.array_equal(made[0], made[2])
    for pixels in made:
        assert pixels.shape == (96, 96, 4)
        covered = (pixels[..., 3] > 0).sum() / (drawing()[..., 3] > 0).sum()
        assert hands.STRETCH - 0.1 < covered < 1.3


def test_a_warp_of_no_reach_changes_nothing_and_a_wider_one_moves_edges_but_no_colour() -> None:
    assert np.array_equal(hands.warped(drawing(), 0.0, np.random.default_rng(0)), drawing())
    moved = hands.warped(drawing(), 0.06, np.random.default_rng(0))
    solid = moved[moved[..., 3] == 255][:, :3]
    assert not np.array_equal(moved[..., 3], drawing()[..., 3])
    assert np.abs(solid.astype(int) - (200, 80, 40)).max() <= 1


def test_extra_drawings_of_a_noun_are_that_noun() -> None:
    values = recipe.load()
    assert hands.noun_of("service-dog", values) == "dog"
    assert hands.noun_of("horse-face", values) == "horse"
    assert hands.noun_of("polar-bear", values) == "bear"
    assert hands.noun_of("palm-tree", values) == "palm tree"


def test_more_nouns_are_drawn_at_their_weight(by_three_hands: tuple[Recipe, Sprites]) -> None:
    wide = hands.more_nouns(by_three_hands[0], 0.5)
    assert wide.nouns["giraffe"] == ["giraffe"]
    assert wide.noun_weights == {"giraffe": 0.5}


def test_copies_show_what_the_drawings_show(by_three_hands: tuple[Recipe, Sprites]) -> None:
    values, drawn = by_three_hands
    more = hands.with_more_hands(drawn, 2, 0)
    for noun in values.nouns:
        assert len(more.rows("noun", noun)) == 3 * len(drawn.rows("noun", noun))
    assert len(more.table) == len(more.pixels)
    assert more.rows("scene", "in space") == drawn.rows("scene", "in space")


def test_soft_pictures_keep_their_mean_and_some_stay_sharp() -> None:
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[16:48, 16:48] = (40, 160, 220)
    made = [soften(pixels, np.random.default_rng(seed)) for seed in range(40)]
    assert all(one.shape == pixels.shape for one in made)
    assert all(one.dtype == np.uint8 for one in made)
    assert all(abs(one.mean() - pixels.mean()) < 6 for one in made)
    unchanged = sum(np.array_equal(one, pixels) for one in made)
    assert 1 <= unchanged <= 25
