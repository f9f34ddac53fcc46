"""Render the drawings of the recipe to sprites: RGBA pictures of one size, and a table that says what each is.

N sprites, S pixels a side.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import resvg_py
from numpy.typing import NDArray
from PIL import Image

from base import icons, recipe
from base.recipe import FurtherPackage, Package, Recipe

TABLE, PIXELS = "sprites.json", "sprites.npy"
FOLDER, FURTHER_FOLDER = recipe.SCRATCH / "sprites", recipe.SCRATCH / "further_sprites"


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


def names_of(icon: str, package: Package) -> list[str]:
    """List what a package may call an icon."""
    if not isinstance(package, FurtherPackage):
        return [icon]
    return package.names.get(icon) or list(dict.fromkeys([icon, icon.replace("-", "")]))


def svg_of(data: dict[str, Any], icon: str, package: Package) -> str | None:
    """Give the first drawing of an icon that a package has, or None."""
    return next((svg for own in names_of(icon, package) if (svg := icons.svg(data, own)) is not None), None)


def drawn_by(values: Recipe, name: str, package: Package, folder: Path) -> Iterator[tuple[Sprite, NDArray[np.uint8]]]:
    """Render every wanted drawing that a package has, save those held out."""
    data = icons.read(icons.archive(folder, name, package))
    for kind, word, icon in wanted(values):
        for own in names_of(icon, package):
            svg = icons.svg(data, own)
            if svg is not None and f"{name}:{own}" not in values.held_out:
                yield Sprite(name, icon, kind, word), render(svg, values.sprite_size)


def draw(values: Recipe, folder: Path, packages: Mapping[str, Package]) -> Sprites:
    """Render every wanted drawing of some packages."""
    both = [one for name, package in packages.items() for one in drawn_by(values, name, package, folder)]
    return Sprites([sprite for sprite, _ in both], np.stack([pixels for _, pixels in both]))


def check(values: Recipe, drawn: Sprites) -> None:
    """Refuse an icon that no package has: it is a mistake in the recipe.

    Raises:
        icons.IconError: A word of the recipe has no drawing.
    """
    missing = {(kind, icon) for kind, _, icon in wanted(values)} - {(s.kind, s.icon) for s in drawn.table}
    if missing:
        raise icons.IconError(f"no package has {sorted(missing)}; correct the name in {recipe.PARAMS.name}")


def save(sprites: Sprites, folder: Path) -> None:
    """Write the table and the pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / PIXELS, sprites.pixels)
    (folder / TABLE).write_text(json.dumps([asdict(s) for s in sprites.table], indent=1), encoding="utf-8")


def load(folder: Path) -> Sprites:
    """Read what `save` wrote."""
    table = [Sprite(**row) for row in json.loads((folder / TABLE).read_text(encoding="utf-8"))]
    return Sprites(table, np.load(folder / PIXELS))


def join(first: Sprites, second: Sprites) -> Sprites:
    """Give the drawings of both."""
    return Sprites(first.table + second.table, np.concatenate([first.pixels, second.pixels]))


def main() -> None:
    """Render the sprites of the recipe, and those that only the scorer learns from."""
    values, folder = recipe.load(), recipe.SCRATCH / "icons"
    drawn = draw(values, folder, values.packages)
    check(values, drawn)
    save(drawn, FOLDER)
    save(draw(values, folder, values.scorer.packages), FURTHER_FOLDER)


if __name__ == "__main__":
    main()
