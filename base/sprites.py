"""Render the drawings of the recipe to sprites: RGBA pictures of one size, and a table that says what each is.

N sprites, S pixels a side.
"""

import json
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import resvg_py
from numpy.typing import NDArray
from PIL import Image

from base import icons, recipe
from base.recipe import Recipe

TABLE, PIXELS = "sprites.json", "sprites.npy"


@dataclass(frozen=True)
class Sprite:
    """What one sprite shows."""

    package: str
    icon: str
    kind: str
    """noun, scene, accessory, neighbour or extra."""
    word: str
    """The noun, the phrase of the scene, the accessory; the icon's name for an extra."""


@dataclass(frozen=True)
class Sprites:
    """The table and the pixels of all sprites."""

    table: list[Sprite]
    pixels: NDArray[np.uint8]
    """(N, S, S, 4), alpha not premultiplied."""

    def rows(self, kind: str, word: str) -> list[int]:
        """List the sprites of one word."""
        return [i for i, s in enumerate(self.table) if (s.kind, s.word) == (kind, word)]


def render(svg: str, size: int) -> NDArray[np.uint8]:
    """Render a document to (size, size, 4)."""
    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)
    return np.asarray(Image.open(BytesIO(bytes(png))).convert("RGBA").resize((size, size)))


def wanted(values: Recipe) -> list[tuple[str, str, str]]:
    """List (kind, word, icon) of everything that the recipe draws."""
    rows = [("noun", noun, icon) for noun, names in values.nouns.items() for icon in names]
    rows += [("scene", phrase, scene.icon) for phrase, scene in values.scenes.items()]
    for kind, table in (("accessory", values.accessories), ("neighbour", values.neighbours)):
        rows += [(kind, word, icon) for word, icon in table.items()]
    return rows + [("extra", icon, icon) for icon in values.extra_icons]


def draw(values: Recipe, folder: Path) -> Sprites:
    """Render every wanted drawing of every package, save those held out.

    An icon that no package has is a mistake in the recipe.

    Raises:
        icons.IconError: A word of the recipe has no drawing.
    """
    table: list[Sprite] = []
    pixels: list[NDArray[np.uint8]] = []
    for package, pinned in values.packages.items():
        data = icons.read(icons.archive(folder, package, pinned))
        for kind, word, icon in wanted(values):
            svg = icons.svg(data, icon)
            if svg is not None and f"{package}:{icon}" not in values.held_out:
                table.append(Sprite(package, icon, kind, word))
                pixels.append(render(svg, values.sprite_size))
    missing = {(kind, icon) for kind, _, icon in wanted(values)} - {(s.kind, s.icon) for s in table}
    if missing:
        raise icons.IconError(f"no package has {sorted(missing)}; correct the name in {recipe.PARAMS.name}")
    return Sprites(table, np.stack(pixels))


def save(sprites: Sprites, folder: Path) -> None:
    """Write the table and the pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / PIXELS, sprites.pixels)
    (folder / TABLE).write_text(json.dumps([asdict(s) for s in sprites.table], indent=1), encoding="utf-8")


def load(folder: Path) -> Sprites:
    """Read what `save` wrote."""
    table = [Sprite(**row) for row in json.loads((folder / TABLE).read_text(encoding="utf-8"))]
    return Sprites(table, np.load(folder / PIXELS))


def main() -> None:
    """Render the sprites of the recipe."""
    save(draw(recipe.load(), recipe.SCRATCH / "icons"), recipe.SCRATCH / "sprites")


if __name__ == "__main__":
    main()
