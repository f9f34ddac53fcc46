"""A toy recipe: the real one with few words, few rows, and sprites drawn by hand instead of downloaded ones."""

import numpy as np
import pytest
from toy_recipe import HANDS, toy

from base import recipe
from base.recipe import Recipe
from base.sprites import Sprite, Sprites, wanted


@pytest.fixture(scope="session")
def values() -> Recipe:
    """Give the recipe with three nouns, two scenes and trainings of a few steps."""
    return Recipe.model_validate(toy(recipe.load().model_dump()))


@pytest.fixture(scope="session")
def drawn(values: Recipe) -> Sprites:
    """Draw a disc of a colour of its own for every wanted drawing."""
    return discs(values, ["toy"])


@pytest.fixture(scope="session")
def by_three_hands(values: Recipe) -> tuple[Recipe, Sprites]:
    """Give drawings by several hands, and a recipe that knows them."""
    pins = {hand: next(iter(values.packages.values())) for hand in HANDS}
    return values.model_copy(update={"packages": pins}), discs(values, list(HANDS))


def discs(values: Recipe, packages: list[str]) -> Sprites:
    """Draw a disc for every wanted drawing of every package."""
    table = [Sprite(package, icon, kind, word) for package in packages for kind, word, icon in wanted(values)]
    rng = np.random.default_rng(0)
    side = values.sprite_size
    y, x = np.mgrid[:side, :side] - side / 2
    pixels = np.zeros((len(table), side, side, 4), np.uint8)
    pixels[..., :3] = rng.integers(0, 256, (len(table), 1, 1, 3))
    pixels[..., 3] = 255 * (x**2 + y**2 < (side / 3) ** 2)
    return Sprites(table, pixels)
