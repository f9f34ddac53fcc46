"""Train the image-text scorer: a head on frozen Lite0 features that puts pictures and prompts into one space.

B rows, N pictures, F features, T words, D width of the space, S pixels a side.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from base import compose, hands, loop, recipe
from base.compose import Plan
from base.recipe import Precision, Recipe
from base.soften import soften
from base.sprites import Sprites
from dreambooth.encoders import lite0_pooled

CACHE = recipe.SCRATCH / "scorer"
CHUNK = 500
"""Pictures of one file of features: a killed run loses one of them."""


def training_hands(values: Recipe, drawn: Sprites) -> tuple[Recipe, Sprites]:
    """Give the recipe and the drawings that it learns from: all hands but the held-out one, and redrawn ones."""
    section = values.scorer
    wide = hands.more_nouns(values, section.extra_weight)
    wide, drawn = hands.of_packages(wide, drawn, set(values.packages) - {section.held_out_package})
    return wide, hands.with_more_hands(drawn, section.more_hands, section.seed)


def plans(values: Recipe, drawn: Sprites, count: int) -> list[Plan]:
    """Plan the pictures of the scorer."""
    pictures = values.scorer.pictures
    values = values.model_copy(update={"pictures": pictures})
    return [compose.plan(values, drawn, pictures.seed, index) for index in range(count)]


def painted(drawn: Sprites, todo: list[Plan], size: int, seed: int, soft: bool = True) -> Iterator[Image.Image]:
    """Paint plans, most of them a little spoiled."""
    for index, plan in enumerate(todo):
        pixels = compose.paint(drawn, plan, size)
        yield Image.fromarray(soften(pixels, np.random.default_rng([seed, 1, index])) if soft else pixels)


def features_of(images: list[Image.Image], folder: Path, mixed_precision: Precision) -> NDArray[np.float16]:
    """Give the Lite0 features of pictures, (N, F), from the file of an earlier call with the same pictures."""
    digest = hashlib.sha256(b"".join(image.tobytes() for image in images)).hexdigest()[:12]
    path = folder / f"features-{digest}-{mixed_precision}.npy"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part.npy")
        with loop.autocast(torch.device("cpu"), mixed_precision):
            pooled = lite0_pooled(images)
        np.save(part, torch.cat(pooled, dim=1).half().numpy())
        part.replace(path)
    features: NDArray[np.float16] = np.load(path)
    return features


def features(
    images: Iterator[Image.Image], count: int, folder: Path = CACHE, mixed_precision: Precision = "no"
) -> Tensor:
    """Give the Lite0 features of many pictures: (N, F), float32."""
    rows = []
    bar = tqdm(desc="features", total=count, unit="pictures", mininterval=10)
    for first in range(0, count, CHUNK):
        chunk = [next(images) for _ in range(min(CHUNK, count - first))]
        rows.append(features_of(chunk, folder, mixed_precision))
        bar.update(len(chunk))
    bar.close()
    return torch.from_numpy(np.concatenate(rows)).float()


def held_out(values: Recipe, drawn: Sprites) -> tuple[Sprites, list[Plan]]:
    """Plan the pictures of the held-out hand, as the base model's own are composed."""
    section = values.scorer
    own, theirs = hands.of_packages(values, drawn, {section.held_out_package})
    own = own.model_copy(update={"noun_weights": {}})
    return theirs, [compose.plan(own, theirs, section.seed, index) for index in range(section.held_out_rows)]
