"""Captioned pictures."""

import numpy as np

from base import compose
from base.recipe import Recipe
from base.sprites import Sprites

MANY = range(400)


def test_picture_is_a_pure_function_of_seed_and_index(values: Recipe, drawn: Sprites) -> None:
    first = list(compose.pictures(values, drawn, range(20), 16))
    again = [next(compose.pictures(values, drawn, range(i, i + 1), 16)) for i in reversed(range(20))][::-1]
    for (pixels, caption), (same_pixels, same_caption) in zip(first, again, strict=True):
        assert np.array_equal(pixels, same_pixels)
        assert caption == same_caption


def test_another_seed_gives_other_pictures(values: Recipe, drawn: Sprites) -> None:
    plans = [[compose.plan(values, drawn, seed, i) for i in range(20)] for seed in (0, 1)]
    assert all(a != b for a, b in zip(*plans, strict=True))


def test_picture_does_not_depend_on_its_size(values: Recipe, drawn: Sprites) -> None:
    plan = compose.plan(values, drawn, 0, 3)
    small, large = (compose.paint(drawn, plan, size).astype(float).mean((0, 1)) for size in (32, 128))
    assert np.abs(small - large).max() < 12


def test_caption_names_what_was_drawn(values: Recipe, drawn: Sprites) -> None:
    for index in MANY:
        plan = compose.plan(values, drawn, 0, index)
        shown = {drawn.table[placed.sprite].word for placed in plan.placed}
        assert plan.noun in plan.caption
        assert plan.noun in shown
        assert all(word in plan.caption for word in shown)
        if plan.context in values.scenes:
            assert plan.background.scene in drawn.rows("scene", plan.context)
            assert plan.caption.endswith(plan.context)
        elif plan.context:
            assert plan.context in plan.caption
            assert np.abs(np.subtract(plan.background.colour, values.colours[plan.context])).max() < 50
        for placed in plan.placed:
            if placed.wears is not None:
                assert f"wearing {placed.wears[0]}" in plan.caption


def test_every_kind_of_caption_is_drawn(values: Recipe, drawn: Sprites) -> None:
    captions = " | ".join(compose.plan(values, drawn, 0, index).caption for index in MANY)
    for words in ("a photo of a dog", "in space", "on a blue background", "wearing", "next to", "a red fox", "of fox"):
        assert words in captions, words


def test_weighted_noun_is_drawn_more_often(values: Recipe, drawn: Sprites) -> None:
    nouns = [compose.plan(values, drawn, 0, index).noun for index in MANY]
    assert nouns.count("dog") > 1.4 * nouns.count("fox")


def test_article_fits_the_word() -> None:
    assert compose.article("owl") == "an owl"
    assert compose.article("teddy bear") == "a teddy bear"
    assert compose.article("red sunglasses") == "red sunglasses"


def test_orange_background_has_its_article(values: Recipe) -> None:
    assert compose.phrase(values, "orange") == "on an orange background"
    assert compose.phrase(values, "orange", 0.99) == "in front of an orange wall"
    assert compose.phrase(values, "in space") == "in space"
    assert compose.phrase(values, "") == ""


def test_hat_is_above_the_head_and_glasses_are_on_it(values: Recipe, drawn: Sprites) -> None:
    face = compose.picture(drawn, drawn.rows("noun", "fox")[0])
    item = compose.picture(drawn, drawn.rows("accessory", "a crown")[0])
    hatted = compose.worn(face, "a crown", item)
    grown = (hatted.width - face.width) // 2
    top = hatted.getbbox()
    before = face.getbbox()
    assert top is not None
    assert before is not None
    assert top[1] < before[1] + grown
    assert compose.worn(face, "sunglasses", item).getbbox() == before


def test_tint_keeps_dark_dark_and_shape() -> None:
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[0] = 255
    pixels[1, 0, 3] = 255
    from PIL import Image

    got = np.asarray(compose.tinted(Image.fromarray(pixels), (200, 0, 0)))
    assert got[1, 0, :3].tolist() == [0, 0, 0]
    assert got[0, 0, 0] > got[0, 0, 1]
    assert got[..., 3].tolist() == pixels[..., 3].tolist()
