"""Lay pictures out for people: one labelled contact sheet, a row a prompt, a column a model or seed.

All sizes are pixels.
"""

import math
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

PAPER, INK, FADED, ABSENT = "#ffffff", "#222222", "#666666", "#e8e8e8"
LINE_SPACING = 1.25  # line height over the height of "Ag"
LABEL_EMS = 12  # a row label wraps at so many font sizes

STRIP_TILE = 128  # pixels, of a comparison

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def grid(
    rows: Sequence[Sequence[Image.Image | None]],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    captions: Sequence[Sequence[str]] | None = None,
    tile: int = 192,
) -> Image.Image:
    """Draw a contact sheet: column labels on top, row labels at the left, a caption under each picture.

    Labels and captions wrap and a row grows with them, so nothing is cut off. A tile holds its picture whole: a small
    one (64 px) grows by an integer factor with hard pixels, a large one shrinks. Pillow's own font has little beyond
    ASCII: other letters become boxes.

    Args:
        rows: Pictures by row and column; None becomes a grey tile that says "missing".
        row_labels: One for each row; "" leaves the space empty.
        column_labels: One for each column.
        captions: Same shape as `rows`, or None for no captions.
        tile: Side of a tile, at least 32.

    Raises:
        ValueError: The shapes do not agree, or `tile` is too small.
    """
    _check(rows, row_labels, column_labels, captions, tile)
    gap = max(tile // 16, 4)
    size = min(max(tile // 12, 10), 20)
    font, small = ImageFont.load_default(size=size), ImageFont.load_default(size=max(size - 3, 10))
    labels = [wrap(text, font, LABEL_EMS * size) for text in row_labels]
    headers = [wrap(text, font, tile) for text in column_labels]
    notes = [[wrap(text, small, tile) for text in row] for row in captions or [[""] * len(row) for row in rows]]

    label_width = max(_width(label, font) for label in labels)
    left = gap + label_width + (gap if label_width else 0)
    top = gap + max(_height(header, font) for header in headers)
    note_heights = [max(_height(note, small) for note in row) for row in notes]
    heights = [max(tile + note, _height(label, font)) for note, label in zip(note_heights, labels, strict=True)]
    width, height = left + len(headers) * (tile + gap), top + gap // 2 + sum(heights) + gap * len(rows)

    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, header in enumerate(headers):
        x = left + column * (tile + gap) + tile // 2
        _write(draw, (x, top - _height(header, font)), header, font, INK, "ma")
    y = top + gap // 2
    for row, label, row_notes, row_height in zip(rows, labels, notes, heights, strict=True):
        _write(draw, (gap, y), label, font, INK, "la")
        for column, (image, note) in enumerate(zip(row, row_notes, strict=True)):
            x = left + column * (tile + gap)
            sheet.paste(missing(tile, small) if image is None else fit(image, tile), (x, y))
            _write(draw, (x + tile // 2, y + tile), note, small, FADED, "ma")
        y += row_height + gap
    return sheet


def comparison_grid(
    photos: Sequence[Image.Image],
    templates: Sequence[str],
    called: Mapping[str, str],
    seeds: Sequence[int],
    pictures: Mapping[str, Sequence[Image.Image]],
    scores: Mapping[str, Sequence[float]],
) -> Image.Image:
    """Lay out the photos, then a row a prompt: the models side by side at the same seed, the score under each picture.

    Args:
        photos: of the subject.
        templates: P sentences with {} for the subject.
        called: by model, the words that stood there.
        seeds: S of each prompt.
        pictures: by model, P x S, seeds of one prompt beside each other.
        scores: by model, P x S.
    """
    columns = [f"{name}, {{}}: {called[name]}, seed {seed}" for seed in seeds for name in pictures]
    rows, captions = [], []
    for number in range(len(templates)):
        numbers = range(number * len(seeds), (number + 1) * len(seeds))
        rows.append([images[i] for i in numbers for images in pictures.values()])
        captions.append([f"{values[i]:.3f}" for i in numbers for values in scores.values()])
    table = grid(rows, templates, columns, captions, tile=STRIP_TILE)
    return _stacked(_strip(photos, len(columns)), table) if photos else table


def _strip(photos: Sequence[Image.Image], width: int) -> Image.Image:
    """Lay out photos in rows of `width`, without the names of the columns below: no model drew them."""
    blank = Image.new("RGB", (STRIP_TILE, STRIP_TILE), PAPER)
    rows = [[*photos[start : start + width]] for start in range(0, len(photos), width)]
    rows[-1] += [blank] * (width - len(rows[-1]))
    return grid(rows, ["photos of the subject", *[""] * (len(rows) - 1)], [""] * width, tile=STRIP_TILE)


def _stacked(above: Image.Image, below: Image.Image) -> Image.Image:
    sheet = Image.new("RGB", (max(above.width, below.width), above.height + below.height), PAPER)
    sheet.paste(above, (sheet.width - above.width, 0))  # tiles over tiles: names of rows may be of two widths
    sheet.paste(below, (0, above.height))
    return sheet


def fit(image: Image.Image, tile: int) -> Image.Image:
    """Centre a picture of any mode on a white square of `tile`: integer factor if it is smaller, Lanczos if larger."""
    longest = max(image.size)
    picture = image.convert("RGBA")
    if longest <= tile:
        factor = tile // longest
        picture = picture.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    else:
        size = (max(round(image.width * tile / longest), 1), max(round(image.height * tile / longest), 1))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    square = Image.new("RGB", (tile, tile), PAPER)
    square.paste(picture, ((tile - picture.width) // 2, (tile - picture.height) // 2), picture)
    return square


def missing(tile: int, font: Font) -> Image.Image:
    """Draw the grey square that stands for a picture that is not there."""
    square = Image.new("RGB", (tile, tile), ABSENT)
    ImageDraw.Draw(square).text((tile // 2, tile // 2), "missing", FADED, font, anchor="mm")
    return square


def wrap(text: str, font: Font, width: int) -> list[str]:
    """Break a text into lines that fit `width`, at spaces where possible; an empty text has no lines."""
    lines: list[str] = []
    line = ""
    for word in text.split():
        if line and font.getlength(f"{line} {word}") > width:
            lines.append(line)
            line = ""
        line = f"{line} {word}" if line else word
        while font.getlength(line) > width and len(line) > 1:  # one word alone is too wide: break inside it
            fits = max((end for end in range(1, len(line)) if font.getlength(line[:end]) <= width), default=1)
            lines.append(line[:fits])
            line = line[fits:]
    return [*lines, line] if line else lines


def _check(
    rows: Sequence[Sequence[Image.Image | None]],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    captions: Sequence[Sequence[str]] | None,
    tile: int,
) -> None:
    """Refuse what does not make a rectangle."""
    if not rows or not column_labels:
        raise ValueError(
            f"a grid needs a row and a column, got {len(rows)} rows and {len(column_labels)} column labels"
        )
    if tile < 32:
        raise ValueError(f"tile {tile} px leaves no room for text; use 32 or more")
    if len(rows) != len(row_labels):
        raise ValueError(f"{len(rows)} rows but {len(row_labels)} row labels")
    if captions is not None and len(captions) != len(rows):
        raise ValueError(f"{len(rows)} rows but {len(captions)} rows of captions")
    for index, row in enumerate(rows):
        if len(row) != len(column_labels):
            raise ValueError(f"row {index} has {len(row)} pictures but there are {len(column_labels)} column labels")
        if captions is not None and len(captions[index]) != len(row):
            raise ValueError(f"row {index} has {len(row)} pictures but {len(captions[index])} captions")


def _write(
    draw: ImageDraw.ImageDraw, at: tuple[int, int], lines: Sequence[str], font: Font, ink: str, anchor: str
) -> None:
    """Write lines below `at`: its y is the top of the first, its x their left edge ("la") or their middle ("ma")."""
    leading = _line_height(font) - round(font.getbbox("Ag")[3])
    for index, line in enumerate(lines):
        y = at[1] + leading // 2 + index * _line_height(font)
        draw.text((at[0], y), line, ink, font, anchor=anchor)


def _line_height(font: Font) -> int:
    return round(font.getbbox("Ag")[3] * LINE_SPACING)


def _height(lines: Sequence[str], font: Font) -> int:
    return len(lines) * _line_height(font)


def _width(lines: Sequence[str], font: Font) -> int:
    return max((math.ceil(font.getlength(line)) for line in lines), default=0)
