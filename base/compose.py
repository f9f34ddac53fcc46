"""Compose captioned pictures from sprites: picture `index` is a pure function of the seed and the index.

S pixels a side; a position, a size or a crop is a share of the side.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from base.recipe import IDENTIFIERS, RGB, Recipe
from base.sprites import Sprites

Pixels = NDArray[np.uint8]

TEMPLATES = ("a photo of {}", "a picture of {}", "a drawing of {}", "{}")
TEMPLATE_SHARES = (0.55, 0.15, 0.1, 0.2)
PLAIN_PHRASES = ("on a {} background", "in front of a {} wall")
PLAIN_SHARES = (0.85, 0.15)
CONSONANTS = "bcdfghjklmnpqrstvwxz"
SMALL, LARGE = (0.4, 0.52), (0.92, 1.0)
"""Sizes of "a small dog" and "a large dog"."""
BARE_SHARE = 0.1
"""Captions without the article, "a photo of dog", as in the usual instance prompt "a photo of sks dog"."""
MARGIN = 0.12
"""Cut off each side of a scene: some have round corners and an empty border."""


@dataclass(frozen=True)
class Background:
    """A plain colour, or a scene cropped from a sprite."""

    colour: RGB
    scene: int | None = None
    crop: tuple[float, float, float, float] = (MARGIN, MARGIN, 1 - MARGIN, 1 - MARGIN)
    mirror: bool = False


@dataclass(frozen=True)
class Placed:
    """One sprite on the picture: its centre, its size, its turn in degrees."""

    sprite: int
    x: float
    y: float
    size: float
    angle: float = 0.0
    mirror: bool = False
    tint: RGB | None = None
    wears: tuple[str, int] | None = None


@dataclass(frozen=True)
class Plan:
    """Everything that is on one picture, in the order in which it is painted, and its caption."""

    background: Background
    placed: tuple[Placed, ...]
    noun: str
    context: str
    """The colour, the phrase of the scene, or nothing."""
    caption: str


def article(words: str) -> str:
    """Put "a" or "an" before the words; "sunglasses" are more than one."""
    if words.split()[-1] == "sunglasses":
        return words
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def phrase(values: Recipe, context: str, pick: float = 0.0) -> str:
    """Say the context: "on a blue background", "in space", or nothing. `pick` in [0, 1) chooses the wording."""
    if context in values.colours:
        plain = PLAIN_PHRASES[int(np.searchsorted(np.cumsum(PLAIN_SHARES), pick, side="right"))]
        return plain.format(context).replace("a orange", "an orange")
    return context


def background(values: Recipe, sprites: Sprites, context: str, rng: np.random.Generator) -> Background:
    """Draw the background of a context: a shade near the colour, or a crop of one of the scene's drawings."""
    if context in values.scenes:
        left, top = rng.uniform(MARGIN, MARGIN + 0.12, 2)
        right, bottom = 1 - rng.uniform(MARGIN, MARGIN + 0.12, 2)
        scene = int(rng.choice(sprites.rows("scene", context)))
        sky = values.scenes[context].sky
        return Background(sky, scene, (left, top, right, bottom), bool(rng.random() < 0.5))
    if context == "white":
        return Background(values.colours["white"])
    red, green, blue = np.clip(values.colours[context] + rng.normal(0, 8, 3), 0, 255).astype(int).tolist()
    return Background((red, green, blue))


def choose(values: Recipe, rng: np.random.Generator) -> tuple[str, bool]:
    """Choose a context, and whether the caption names it."""
    kind = rng.random()
    colours, scenes = list(values.colours), list(values.scenes)
    if kind < values.pictures.colour_share:
        return str(rng.choice(colours)), True
    if kind < values.pictures.colour_share + values.pictures.scene_share:
        return str(rng.choice(scenes)), True
    return ("white" if rng.random() < 0.6 else str(rng.choice(colours))), False


def place(sprite: int, rng: np.random.Generator, low: float = 0.65, high: float = 0.95) -> Placed:
    """Put a sprite anywhere that keeps nearly all of it on the picture."""
    size = rng.uniform(low, high)
    slack = abs(1 - size) / 2
    x, y = 0.5 + rng.uniform(-slack, slack, 2)
    return Placed(sprite, x, y, size, float(np.clip(rng.normal(0, 4), -10, 10)), bool(rng.random() < 0.5))


def plan(values: Recipe, sprites: Sprites, seed: int, index: int) -> Plan:
    """Plan picture `index`: what is on it, where, and what the caption says of it."""
    rng = np.random.default_rng([seed, index])
    nouns = list(values.nouns)
    weights = np.array([values.noun_weights.get(noun, 1.0) for noun in nouns])
    noun = str(rng.choice(nouns, p=weights / weights.sum()))
    main = place(int(rng.choice(sprites.rows("noun", noun))), rng)
    context, named = choose(values, rng)
    words, placed = dress(values, sprites, noun, main, rng)
    said = phrase(values, context, rng.random()) if named else ""
    template = str(rng.choice(TEMPLATES, p=TEMPLATE_SHARES))
    if rng.random() < BARE_SHARE:
        words = words.removeprefix("a ").removeprefix("an ")
    caption = f"{template.format(words)} {said}".strip()
    return Plan(background(values, sprites, context, rng), placed, noun, context if named else "", caption)


def dress(
    values: Recipe, sprites: Sprites, noun: str, main: Placed, rng: np.random.Generator
) -> tuple[str, tuple[Placed, ...]]:
    """Add, seldom, a colour, something to wear, a neighbour or another word; give the words and what is painted."""
    kinds = {
        tint: values.pictures.tint_share,
        dress_up: values.pictures.accessory_share,
        add_neighbour: values.pictures.neighbour_share,
        resize: values.pictures.size_share,
        name_style: values.pictures.style_share,
        add_rare_word: values.pictures.rare_share,
    }
    ends = np.cumsum(list(kinds.values()))
    number = int(np.searchsorted(ends, rng.random(), side="right"))
    found = list(kinds)[number](values, sprites, noun, main, rng) if number < len(kinds) else None
    return found or (article(noun), (main,))


Dressed = tuple[str, tuple[Placed, ...]] | None
"""The words and what is painted, or nothing where the kind does not fit the drawing."""


def tint(values: Recipe, sprites: Sprites, noun: str, main: Placed, rng: np.random.Generator) -> Dressed:
    """Paint "a red dog"."""
    colour = str(rng.choice([name for name in values.colours if name != "white"]))
    return article(f"{colour} {noun}"), (replace(main, tint=values.colours[colour]),)


def dress_up(values: Recipe, sprites: Sprites, noun: str, main: Placed, rng: np.random.Generator) -> Dressed:
    """Paint "a dog wearing a crown", where the drawing is a face."""
    if sprites.table[main.sprite].icon not in values.faces:
        return None
    worn = str(rng.choice(list(values.accessories)))
    item = int(rng.choice(sprites.rows("accessory", worn)))
    main = replace(main, size=min(main.size, 0.75), y=0.6, angle=main.angle / 3, wears=(worn, item))
    return f"{article(noun)} wearing {worn}", (main,)


def add_neighbour(values: Recipe, sprites: Sprites, noun: str, main: Placed, rng: np.random.Generator) -> Dressed:
    """Paint "a dog next to a ball"."""
    if noun in " ".join(values.neighbours):
        return None
    other = str(rng.choice(list(values.neighbours)))
    side = 1 if rng.random() < 0.5 else -1
    main = replace(main, size=0.6, x=0.5 + side * 0.19, y=0.5 + float(rng.uniform(-0.1, 0.1)))
    small = Placed(int(rng.choice(sprites.rows("neighbour", other))), 0.5 - side * 0.3, 0.68, 0.36)
    return f"{article(noun)} next to {other}", (small, main)


def resize(values: Recipe, sprites: Sprites, noun: str, main: Placed, rng: np.random.Generator) -> Dressed:
    """Paint "a small dog" or "a large dog"."""
    small = bool(rng.random() < 0.5)
    return article(f"{'small' if small else 'large'} {noun}"), (place(main.sprite, rng, *(SMALL if small else LARGE)),)


def name_style(values: Recipe, sprites: Sprites, noun: str, main: Placed, rng: np.random.Generator) -> Dressed:
    """Name how the drawing is drawn: "a 3d dog"."""
    style = values.styles.get(sprites.table[main.sprite].package)
    return (article(f"{style} {noun}"), (main,)) if style else None


def add_rare_word(values: Recipe, sprites: Sprites, noun: str, main: Placed, rng: np.random.Generator) -> Dressed:
    """Put a word that means nothing before the noun: "a qvx dog"."""
    word = "".join(rng.choice(list(CONSONANTS), int(rng.integers(3, 5))))
    return None if word in IDENTIFIERS else (article(f"{word} {noun}"), (main,))


def picture(sprites: Sprites, index: int) -> Image.Image:
    """Give a sprite as an image."""
    return Image.fromarray(sprites.pixels[index])


def tinted(image: Image.Image, colour: RGB) -> Image.Image:
    """Paint a drawing in one colour, dark parts dark and bright parts bright."""
    pixels = np.asarray(image).astype(np.float32)
    light = (pixels[..., :3] @ np.array([0.3, 0.59, 0.11], np.float32))[..., None] / 255
    pixels[..., :3] = np.where(light < 0.5, 2 * light, 1) * np.array(colour, np.float32)
    pixels[..., :3] += np.clip(light - 0.5, 0, 0.5) * 0.9 * (255 - pixels[..., :3])
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def worn(image: Image.Image, word: str, item: Image.Image) -> Image.Image:
    """Put a hat on the head of a drawing, or glasses before its eyes, on a canvas with room around it."""
    left, top, right, bottom = image.getbbox() or (0, 0, *image.size)
    item = item.crop(item.getbbox())
    hat = "glasses" not in word
    width = int((right - left) * (0.6 if hat else 0.75))
    height = max(1, width * item.height // item.width)
    item = item.resize((width, height), Image.Resampling.BICUBIC)
    side = image.width + 2 * (room := height if hat else 0)
    canvas = Image.new("RGBA", (side, side))
    canvas.paste(image, (room, room))
    y = room + top + int(0.18 * (bottom - top)) - height if hat else top + int(0.32 * (bottom - top))
    canvas.alpha_composite(item, (room + (left + right - width) // 2, y))
    return canvas


@lru_cache(maxsize=4096)
def backdrop(key: tuple[int, RGB], pixels: bytes, side: int) -> Image.Image:
    """Put a scene before its sky."""
    canvas = Image.new("RGBA", (side, side), (*key[1], 255))
    canvas.alpha_composite(Image.frombytes("RGBA", (side, side), pixels))
    return canvas.convert("RGB")


def paint_background(sprites: Sprites, what: Background, size: int) -> Image.Image:
    """Paint the background alone."""
    if what.scene is None:
        return Image.new("RGB", (size, size), what.colour)
    scene = sprites.pixels[what.scene]
    image = backdrop((what.scene, what.colour), scene.tobytes(), scene.shape[0])
    box = tuple(share * image.width for share in what.crop)
    image = image.resize((size, size), Image.Resampling.BICUBIC, box=(box[0], box[1], box[2], box[3]))
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if what.mirror else image


def paint_placed(canvas: Image.Image, sprites: Sprites, what: Placed) -> None:
    """Paint one sprite on the picture."""
    image = picture(sprites, what.sprite)
    grown = 1.0
    if what.tint is not None:
        image = tinted(image, what.tint)
    if what.wears is not None:
        before = image.width
        image = worn(image, what.wears[0], picture(sprites, what.wears[1]))
        grown = image.width / before
    if what.mirror:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    before = image.width
    image = image.rotate(what.angle, Image.Resampling.BICUBIC, expand=True)
    side = max(2, round(what.size * canvas.width * grown * image.width / before))
    image = image.resize((side, side), Image.Resampling.BICUBIC)
    corner = (round(what.x * canvas.width - side / 2), round(what.y * canvas.height - side / 2))
    canvas.paste(image, corner, image)


def paint(sprites: Sprites, what: Plan, size: int) -> Pixels:
    """Paint a plan to (size, size, 3)."""
    canvas = paint_background(sprites, what.background, size)
    for placed in what.placed:
        paint_placed(canvas, sprites, placed)
    return np.asarray(canvas)


def pictures(
    values: Recipe, sprites: Sprites, indices: range, size: int, seed: int | None = None
) -> Iterator[tuple[Pixels, str]]:
    """Give pictures and captions in order."""
    for index in indices:
        what = plan(values, sprites, values.pictures.seed if seed is None else seed, index)
        yield paint(sprites, what, size), what.caption


def any_sprite(sprites: Sprites, values: Recipe, size: int, seed: int, index: int) -> Pixels:
    """Paint any drawing, also those without a caption, for the autoencoder."""
    rng = np.random.default_rng([seed, index])
    context = str(rng.choice([*values.colours, *values.scenes, *values.scenes]))
    back = background(values, sprites, context, rng)
    if rng.random() < 0.3:
        red, green, blue = rng.integers(0, 256, 3).tolist()
        back = Background((red, green, blue))
    placed = [place(int(rng.integers(len(sprites.table))), rng, 0.4, 1.1) for _ in range(int(rng.integers(1, 3)))]
    return paint(sprites, Plan(back, tuple(placed), "", "", ""), size)
