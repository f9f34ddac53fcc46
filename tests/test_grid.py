"""The contact sheet: every picture whole and in its place, no text cut off."""

import numpy as np
import pytest
from PIL import Image, ImageFont

from dreambooth.grid import ABSENT, STRIP_TILE, comparison_grid, fit, grid, wrap

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def picture(colour=RED, size=(64, 64)):
    return Image.new("RGB", size, colour)


def checkerboard():
    image = picture(size=(2, 2))
    image.putpixel((0, 0), BLUE)
    image.putpixel((1, 1), BLUE)
    return image


def count(image, colour):
    return int((np.asarray(image) == np.asarray(colour)).all(axis=-1).sum())


def border(image):
    pixels = np.asarray(image)
    return np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 3), (3, 1)])
def test_every_picture_is_drawn_once_and_whole(rows, columns):
    sheet = grid([[picture()] * columns] * rows, ["a dog"] * rows, ["base"] * columns, tile=64)
    assert count(sheet, RED) == rows * columns * 64 * 64


def test_rows_and_columns_keep_their_order():
    colours = [[(200, 0, 0), (0, 200, 0)], [(0, 0, 200), (200, 200, 0)]]
    sheet = np.asarray(grid([[picture(c) for c in row] for row in colours], ["1", "2"], ["a", "b"]))
    centres = [[np.argwhere((sheet == c).all(axis=-1)).mean(axis=0) for c in row] for row in colours]
    (a, b), (c, d) = centres
    assert a[0] == b[0] < c[0] == d[0]
    assert a[1] == c[1] < b[1] == d[1]


def test_small_pictures_grow_by_an_integer_factor_with_hard_pixels():
    square = fit(checkerboard(), 33)  # factor 16, a white pixel is left over
    assert count(square, RED) == count(square, BLUE) == 2 * 16 * 16
    assert count(square, WHITE) == 33 * 33 - 32 * 32


def test_large_pictures_shrink_and_keep_their_aspect():
    square = fit(picture(size=(400, 200)), 100)
    assert count(square, RED) == 100 * 50


def test_shrinking_averages_what_it_leaves_out():
    stripes = Image.fromarray(np.tile(np.uint8([[0, 255]]), (200, 100)))
    inner = np.asarray(fit(stripes, 50))[5:-5, 5:-5]
    assert abs(inner.astype(int) - 127).max() < 8


def test_a_sliver_does_not_vanish():
    assert count(fit(picture(size=(1000, 1)), 100), RED) == 100


def test_transparency_shows_the_paper():
    assert count(fit(Image.new("RGBA", (64, 64), (0, 0, 0, 0)), 64), WHITE) == 64 * 64


def test_a_missing_picture_is_a_grey_tile_with_a_word():
    sheet = grid([[picture(), None]], ["a dog"], ["base", "champion"], tile=96)
    grey = count(sheet, tuple(int(ABSENT[i : i + 2], 16) for i in (1, 3, 5)))
    assert 0.8 * 96 * 96 < grey < 96 * 96
    assert count(sheet, RED) == 64 * 64


def test_long_labels_make_room_and_nothing_reaches_the_border():
    prompt = "a sks dog on a beach at sunset, " * 20
    plain = grid([[picture()]], ["a dog"], ["base"])
    labelled = grid([[picture()]], [prompt], ["base"])
    assert labelled.height > plain.height
    assert (border(labelled) == 255).all()
    sheet = grid([[picture()]], [prompt], ["challenger of " * 9], [["identity " * 30]])
    assert sheet.height > labelled.height
    assert (border(sheet) == 255).all()
    assert count(sheet, RED) == count(plain, RED)


def test_captions_add_height_and_empty_labels_add_no_width():
    pictures = [[picture()], [picture()]]
    plain = grid(pictures, ["", ""], ["base"])
    assert grid(pictures, ["", ""], ["base"], [["identity .71"], [""]]).height > plain.height
    assert grid(pictures, ["a dog", ""], ["base"]).width > plain.width
    assert plain.width == 192 + 2 * 12


@pytest.mark.parametrize("width", [1, 20, 60, 200])
def test_wrap_keeps_every_letter_and_fits(width):
    font = ImageFont.load_default(size=12)
    text = "a photo of a sks dog wearing Donaudampfschifffahrtsgesellschaftskapitaen cap"
    lines = wrap(text, font, width)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert all(font.getlength(line) <= width or len(line) == 1 for line in lines)


def test_wrap_breaks_at_spaces_where_it_can():
    font = ImageFont.load_default(size=12)
    assert wrap("one two", font, int(font.getlength("one two")) + 1) == ["one two"]
    assert wrap("one two", font, int(font.getlength("one tw"))) == ["one", "two"]
    assert wrap("  ", font, 50) == []


def test_same_pictures_same_sheet():
    sheets = [grid([[checkerboard(), None]], ["a dog"], ["a", "b"], [[".5", ""]]) for _ in range(2)]
    assert sheets[0].tobytes() == sheets[1].tobytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], [], ["base"]), "needs a row and a column"),
        (([[]], ["a"], []), "needs a row and a column"),
        (([[None]], ["a", "b"], ["base"]), "1 rows but 2 row labels"),
        (([[None], [None, None]], ["a", "b"], ["base"]), "row 1 has 2 pictures but there are 1 column labels"),
        (([[None]], ["a"], ["base"], []), "1 rows but 0 rows of captions"),
        (([[None]], ["a"], ["base"], [["x", "y"]]), "row 0 has 1 pictures but 2 captions"),
        (([[None]], ["a"], ["base"], None, 8), "tile 8 px"),
    ],
)
def test_what_is_no_rectangle_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        grid(*arguments)


def test_a_comparison_has_a_row_a_prompt_below_the_photos():
    pictures = [Image.new("RGB", (32, 32), (10 * i, 0, 0)) for i in range(6)]
    models = {"base": pictures, "personalised": pictures}
    called, scores = {"base": "a dog", "personalised": "sks dog"}, {name: [0.1] * 6 for name in models}
    short = comparison_grid(pictures[:3], ["{}"], called, [1, 2], models, scores)
    tall = comparison_grid(pictures[:3], ["{}", "{} in space", "red {}"], called, [1, 2], models, scores)
    assert tall.width == short.width
    assert tall.height > short.height + 2 * STRIP_TILE


def test_a_comparison_shows_every_photo_in_as_many_rows_as_they_need():
    pictures = [Image.new("RGB", (32, 32), (10 * i, 0, 0)) for i in range(6)]
    models, called = {"base": pictures, "personalised": pictures}, {"base": "a dog", "personalised": "sks dog"}
    scores = {name: [0.1] * 6 for name in models}
    two, five = (comparison_grid(pictures[:count], ["{}"], called, [1], models, scores) for count in (2, 5))
    assert five.width == two.width
    assert five.height > two.height + 2 * STRIP_TILE
