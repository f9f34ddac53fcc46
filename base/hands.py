"""Make further hands out of a few: the same drawings in other colours, proportions and manners.

Six sets are few to learn from what all hands have in common; a judge that shall know a seventh one needs more.
S pixels a side.
"""

from dataclasses import replace

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter
from scipy.ndimage import gaussian_filter, map_coordinates

from base.compose import Pixels
from base.recipe import Recipe
from base.sprites import Sprites

STRETCH = 0.78
"""The shorter side of a squeezed drawing, at least."""
WARP, WARP_SCALE = 0.06, 1 / 8
"""How far a point moves at most, and over what distance its neighbours move with it; in sides of the drawing."""


def another_hand(pixels: Pixels, rng: np.random.Generator) -> Pixels:
    """Draw (S, S, 4) anew: warped, squeezed, with other colours, sometimes flat, sometimes with a dark outline."""
    image = Image.fromarray(warped(pixels, rng.uniform(0, WARP), rng))
    size, squeezed = image.width, round(image.width * rng.uniform(STRETCH, 1))
    sides = (size, squeezed) if rng.random() < 0.5 else (squeezed, size)
    corner = ((size - sides[0]) // 2, (size - sides[1]) // 2)
    alpha = Image.new("L", (size, size))
    alpha.paste(image.getchannel("A").resize(sides, Image.Resampling.BICUBIC), corner)
    colour = Image.new("RGB", (size, size))
    colour.paste(image.convert("RGB").resize(sides, Image.Resampling.BICUBIC), corner)
    for enhance, low, high in (
        (ImageEnhance.Color, 0.3, 1.5),
        (ImageEnhance.Brightness, 0.75, 1.2),
        (ImageEnhance.Contrast, 0.7, 1.3),
    ):
        colour = enhance(colour).enhance(rng.uniform(low, high))
    colour = turned_hue(colour, rng.normal(0, 9))
    if rng.random() < 0.3:
        colour = colour.filter(ImageFilter.ModeFilter(5)).filter(ImageFilter.MedianFilter(3))
    if rng.random() < 0.3:
        colour, alpha = outlined(colour, alpha, int(rng.choice([3, 5])), int(rng.integers(0, 90)))
    return np.dstack([np.asarray(colour), np.asarray(alpha)])


def warped(pixels: Pixels, reach: float, rng: np.random.Generator) -> Pixels:
    """Move every point of (S, S, 4) a little, and its neighbours with it.

    Source: elastic distortions, Simard et al. 2003, section 2.

    Args:
        pixels: of a drawing.
        reach: how far, in sides of the drawing.
        rng: of the displacements.
    """
    side = len(pixels)
    fields = [gaussian_filter(rng.normal(size=(side, side)), side * WARP_SCALE) for _ in range(2)]
    rows, columns = (field / (np.abs(field).max() + 1e-9) * reach * side for field in fields)
    y, x = np.mgrid[:side, :side]
    solid = pixels.astype(float)
    solid[..., :3] *= solid[..., 3:] / 255  # colours under transparent points must not bleed
    moved = np.stack([map_coordinates(solid[..., c], [y + rows, x + columns], order=1) for c in range(4)], axis=-1)
    alpha = moved[..., 3:] / 255
    moved[..., :3] = np.where(alpha > 1e-3, moved[..., :3] / np.maximum(alpha, 1e-3), 0)
    made: Pixels = np.clip(moved, 0, 255).astype(np.uint8)
    return made


def turned_hue(image: Image.Image, degrees: float) -> Image.Image:
    """Turn the hue of an RGB picture."""
    pixels = np.asarray(image.convert("HSV")).copy()
    pixels[..., 0] = (pixels[..., 0].astype(int) + round(degrees * 256 / 360)) % 256
    return Image.fromarray(pixels, "HSV").convert("RGB")


def outlined(colour: Image.Image, alpha: Image.Image, width: int, level: int) -> tuple[Image.Image, Image.Image]:
    """Draw a line of one grey around a drawing."""
    grown = alpha.filter(ImageFilter.MaxFilter(width))
    line = Image.new("RGB", colour.size, (level, level, level))
    line.paste(colour, mask=alpha)
    return line, grown


def noun_of(icon: str, values: Recipe) -> str:
    """Name what an extra drawing shows: "horse-face" is a horse, "unicorn" a noun of its own."""
    words = icon.removesuffix("-face").split("-")
    return words[-1] if words[-1] in values.nouns else " ".join(words)


def more_nouns(values: Recipe, weight: float) -> Recipe:
    """Make nouns of the extra drawings, drawn as often as `weight` says; all other nouns are equally likely."""
    nouns = {noun: list(icons) for noun, icons in values.nouns.items()}
    for icon in values.extra_icons:
        nouns.setdefault(noun_of(icon, values), []).append(icon)
    weights = {noun: weight for noun in nouns if noun not in values.nouns}
    return values.model_copy(update={"nouns": nouns, "noun_weights": weights, "extra_icons": []})


def of_packages(values: Recipe, drawn: Sprites, packages: set[str]) -> tuple[Recipe, Sprites]:
    """Keep the drawings of some packages, the extra ones as nouns, and the nouns that are drawn there."""
    kept = [i for i, sprite in enumerate(drawn.table) if sprite.package in packages]
    table = [
        replace(s, kind="noun", word=noun_of(s.icon, values)) if s.kind == "extra" else s
        for s in (drawn.table[i] for i in kept)
    ]
    there = {sprite.word for sprite in table if sprite.kind == "noun"}
    nouns = {noun: icons for noun, icons in values.nouns.items() if noun in there}
    return values.model_copy(update={"nouns": nouns}), Sprites(table, drawn.pixels[kept])


def with_more_hands(drawn: Sprites, copies: int, seed: int) -> Sprites:
    """Add so many further hands of every noun's drawing."""
    rows = [i for i, sprite in enumerate(drawn.table) if sprite.kind == "noun"]
    table, pixels = list(drawn.table), [drawn.pixels]
    for copy in range(copies):
        table += [drawn.table[i] for i in rows]
        made = [another_hand(drawn.pixels[i], np.random.default_rng([seed, copy, i])) for i in rows]
        pixels.append(np.stack(made))
    return Sprites(table, np.concatenate(pixels))
