"""A toy recipe: the real one with few words, few rows, and sprites drawn by hand instead of downloaded ones."""

import numpy as np
import pytest

from base import recipe
from base.recipe import Recipe
from base.sprites import Sprite, Sprites, wanted


@pytest.fixture(scope="session")
def values() -> Recipe:
    """Give the recipe with three nouns, two scenes and trainings of a few steps."""
    full = recipe.load()
    data = full.model_dump()
    data["nouns"] = {noun: data["nouns"][noun] for noun in ("dog", "fox", "apple")}
    data["scenes"] = {phrase: data["scenes"][phrase] for phrase in ("in space", "on a beach")}
    data["extra_icons"] = ["giraffe"]
    data["resolution"], data["sprite_size"] = 16, 24
    data["autoencoder"] |= {
        "block_out_channels": [8, 8, 8],
        "rows": 24,
        "decoder_rows": 8,
        "batch_size": 4,
        "warmup_steps": 2,
    }
    data["text_encoder"] |= {"hidden_size": 16, "layers": 1, "heads": 2, "max_length": 16}
    data["text_encoder"] |= {"captions": 200, "steps": 60, "batch_size": 16, "learning_rate": 1e-2}
    data["denoiser"] |= {
        "block_out_channels": [32, 32],
        "attention_head_dim": 2,
        "pool": 12,
        "phases": [{"resolution": 8, "rows": 16, "batch_size": 4}, {"resolution": 16, "rows": 8, "batch_size": 4}],
        "warmup_steps": 2,
        "round_steps": 2,
    }
    return Recipe.model_validate(data)


@pytest.fixture(scope="session")
def drawn(values: Recipe) -> Sprites:
    """Draw a disc of a colour of its own for every wanted drawing."""
    table = [Sprite("toy", icon, kind, word) for kind, word, icon in wanted(values)]
    rng = np.random.default_rng(0)
    side = values.sprite_size
    y, x = np.mgrid[:side, :side] - side / 2
    pixels = np.zeros((len(table), side, side, 4), np.uint8)
    pixels[..., :3] = rng.integers(0, 256, (len(table), 1, 1, 3))
    pixels[..., 3] = 255 * (x**2 + y**2 < (side / 3) ** 2)
    return Sprites(table, pixels)
