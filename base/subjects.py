"""Make the pictures of the demo subjects: drawings that the base model has never seen, on several backgrounds."""

from pathlib import Path

import numpy as np
from PIL import Image

from base import compose, icons, recipe, sprites
from base.recipe import Recipe, Subject
from base.sprites import Sprite, Sprites

SIZE = 256
SEED = 2022
"""The year of the paper."""

README = """# Demo subjects

Each folder holds five pictures of one subject: one drawing that the bundled base model (`data/base/emoji64`) was never
trained on, composed on different backgrounds by `python -m base.subjects`. Every other drawing of the same class may
have been in its training; those that look nearly the same were kept out too (`held_out` in `base/params.yaml`).

| subject | class noun | drawing | licence | by |
|---|---|---|---|---|
{rows}

Beside each picture stands its caption, which says what is not the subject.

The backgrounds are drawings of the same icon sets. Pictures were changed from the originals: rendered, turned,
mirrored and put together. The text of the Apache License 2.0 is in `LICENSE` at the root of the repository.
"""


def drawings(values: Recipe, subject: Subject, folder: Path) -> Sprites:
    """Render the subject (row 0) and the scenes of its own package, large enough for the pictures."""
    pinned = values.all_packages[subject.package]
    data = icons.read(icons.archive(folder, subject.package, pinned))
    table = [Sprite(subject.package, subject.icon, "noun", subject.class_noun)]
    table += [Sprite(subject.package, scene.icon, "scene", phrase) for phrase, scene in values.scenes.items()]
    found = [sprites.svg_of(data, row.icon, pinned) for row in table]
    if None in found:
        raise icons.IconError(f"{subject.package} lacks {[r.icon for r, f in zip(table, found, strict=True) if not f]}")
    return Sprites(table, np.stack([sprites.render(svg, 2 * SIZE) for svg in found if svg is not None]))


def pictures(values: Recipe, subject: Subject, drawn: Sprites) -> list[Image.Image]:
    """Compose one picture for each context of the subject."""
    made = []
    for number, context in enumerate(subject.contexts):
        rng = np.random.default_rng([SEED, number])
        placed = compose.place(0, rng, 0.62, 0.9)
        plan = compose.Plan(compose.background(values, drawn, context, rng), (placed,), "", context, "")
        made.append(Image.fromarray(compose.paint(drawn, plan, SIZE)))
    return made


def row(values: Recipe, name: str, subject: Subject) -> str:
    """Say in one row of the table where a subject is from."""
    package = values.all_packages[subject.package]
    drawing = f"`{sprites.names_of(subject.icon, package)[0]}` of {icons.SCOPE}/{subject.package} {package.version}"
    return f"| `{name}` | {subject.class_noun} | {drawing} | {package.licence} | {package.attribution} |"


def main() -> None:
    """Write the pictures of every subject and the table of their sources."""
    values = recipe.load()
    for name, subject in values.subjects.items():
        folder = recipe.SUBJECTS / name
        folder.mkdir(parents=True, exist_ok=True)
        drawn = drawings(values, subject, recipe.SCRATCH / "icons")
        for number, image in enumerate(pictures(values, subject, drawn)):
            image.save(folder / f"{number:02d}.png", optimize=True)
            words = f"a photo of {{}} {compose.phrase(values, subject.contexts[number])}\n"
            (folder / f"{number:02d}.txt").write_text(words, encoding="utf-8")
    rows = "\n".join(row(values, *item) for item in values.subjects.items())
    (recipe.SUBJECTS / "README.md").write_text(README.format(rows=rows), encoding="utf-8")


if __name__ == "__main__":
    main()
