"""Photos: upright sRGB pixels out, or one clear line for each file that is none."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps
from tiny_project import REPOSITORY, add_photos, make_photo

from dreambooth.errors import PhotosError, SubjectError
from dreambooth.images import open_photo, perceptual_hash, png_bytes, to_square
from dreambooth.params import Photos, load_params
from dreambooth.photos import check_photos, find_photos, require_usable

ORIENTATION = 0x0112


@pytest.fixture
def limits() -> Photos:
    return load_params(REPOSITORY / "params.yaml").photos


@pytest.mark.fault(2)
def test_junk_is_passed_over_and_named(tmp_path: Path) -> None:
    add_photos(tmp_path, 2)
    for name in (".DS_Store", "Thumbs.db", "captions.txt"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (tmp_path / "link.jpg").symlink_to(tmp_path / "00.png")
    found = find_photos(tmp_path)
    assert [path.name for path in found.photos] == ["00.png", "01.png"]
    assert found.ignored == [".DS_Store", ".ipynb_checkpoints", "Thumbs.db", "captions.txt", "link.jpg"]


def test_a_text_of_the_same_name_is_the_caption_of_a_photo(tmp_path: Path) -> None:
    add_photos(tmp_path, 2)
    (tmp_path / "01.txt").write_text("a photo of {} in a park")
    (tmp_path / "02.txt").write_text("of no photo")
    found = find_photos(tmp_path)
    assert found.captions == {"01.png": tmp_path / "01.txt"}
    assert found.ignored == ["02.txt"]


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SubjectError, match="does not exist"):
        find_photos(tmp_path / "none")


def truncated_jpeg() -> bytes:
    buffer = io.BytesIO()
    make_photo(0).save(buffer, "JPEG")
    return buffer.getvalue()[:-400]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("torn.jpg", truncated_jpeg(), "cannot be decoded"),
        ("empty.jpg", b"", "0 bytes"),
        ("note.jpg", b"this is a text", "looks like text"),
        ("a.jpg", b"%!PS-Adobe-3.0 EPSF-3.0", "looks like EPS"),
        ("b.jpg", b"8BPS\0\1" + bytes(20), "looks like PSD"),
        ("c.jpg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is no JPEG, PNG or WEBP"),
        ("f.png", b"<!DOCTYPE html><html><script>1</script></html>", "looks like text"),
        ("d.heic", b"\0\0\0\x18ftypheic" + bytes(20), "HEIC"),
        ("e.gif", b"GIF89a" + bytes(20), "looks like GIF"),
    ],
)
@pytest.mark.fault(3, 5)
@pytest.mark.threat(2)
def test_each_file_that_is_no_photo_is_named_with_its_fault(
    tmp_path: Path, limits: Photos, name: str, content: bytes, said: str
) -> None:
    add_photos(tmp_path, 3)
    (tmp_path / name).write_bytes(content)
    reports = check_photos(tmp_path, limits)
    with pytest.raises(PhotosError) as refused:
        require_usable(reports, tmp_path, limits)
    assert len(refused.value.problems) == 1
    assert name in refused.value.problems[0]
    assert said in refused.value.problems[0]


@pytest.mark.fault(4)
@pytest.mark.threat(1)
def test_a_picture_over_the_pixel_limit_is_refused_before_it_is_decoded(tmp_path: Path, limits: Photos) -> None:
    bomb = Image.new("1", (20_000, 20_000))
    bomb.save(tmp_path / "bomb.png")
    assert (tmp_path / "bomb.png").stat().st_size < 100_000
    assert "more pixels" in str(check_photos(tmp_path, limits)[0].error)
    Image.new("1", (8_000, 8_000)).save(tmp_path / "bomb.png")
    content = (tmp_path / "bomb.png").read_bytes()
    (tmp_path / "bomb.png").write_bytes(content[:60] + bytes(len(content) - 60))  # whoever decodes it says so
    assert "8000 x 8000 pixels, more than photos.max_pixels" in str(check_photos(tmp_path, limits)[0].error)


@pytest.mark.fault(1)
def test_too_few_photos_are_refused_with_the_count(tmp_path: Path, limits: Photos) -> None:
    add_photos(tmp_path, 2)
    with pytest.raises(PhotosError, match=r"has 2 usable photos.*fewer than 3; put 3 to 10 there"):
        require_usable(check_photos(tmp_path, limits), tmp_path, limits)


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.fault(6)
def test_the_orientation_tag_becomes_pixels(tmp_path: Path, limits: Photos, orientation: int) -> None:
    photo = make_photo(1, 96).crop((0, 0, 96, 64))
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    photo.save(tmp_path / "turned.png", exif=exif)
    upright = open_photo(tmp_path / "turned.png", limits).image
    photo.getexif()[ORIENTATION] = orientation
    assert np.array_equal(np.asarray(upright), np.asarray(ImageOps.exif_transpose(photo)))
    assert not upright.getexif()
    assert upright.size == ((96, 64) if orientation < 5 else (64, 96))


def saved(image: Image.Image, path: Path, **options: object) -> Path:
    image.save(path, **options)  # type: ignore[arg-type]
    return path


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda path: saved(Image.new("CMYK", (80, 80), (0, 255, 255, 0)), path / "a.jpg"), (254, 0, 0)),
        (lambda path: saved(Image.new("RGBA", (80, 80), (0, 0, 255, 0)), path / "a.png"), (255, 255, 255)),
        (lambda path: saved(Image.new("LA", (80, 80), (0, 0)), path / "a.png"), (255, 255, 255)),
        (
            lambda path: saved(Image.fromarray(np.full((80, 80), 0x80FF, np.uint16)), path / "a.png"),
            (0x80, 0x80, 0x80),
        ),
        (
            lambda path: saved(
                Image.new("RGB", (80, 80), (9, 9, 9)),
                path / "a.webp",
                save_all=True,
                append_images=[Image.new("RGB", (80, 80), (250, 0, 0))],
                lossless=True,
            ),
            (9, 9, 9),
        ),
        (lambda path: saved(Image.new("P", (80, 80), 0), path / "a.png", transparency=0), (255, 255, 255)),
    ],
    ids=["cmyk", "alpha on white", "grey alpha on white", "16 bits", "first frame", "palette on white"],
)
@pytest.mark.fault(7)
def test_every_mode_becomes_rgb_by_a_stated_rule(
    tmp_path: Path, limits: Photos, make: Callable[[Path], Path], expected: tuple[int, ...]
) -> None:
    image = open_photo(make(tmp_path), limits).image
    assert image.mode == "RGB"
    assert np.allclose(np.asarray(image)[40, 40], expected, atol=2)


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
@pytest.mark.fault(7)
def test_colours_are_converted_to_srgb(tmp_path: Path, limits: Photos, mode: str) -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = srgb.replace(b"rXYZ", b"temp").replace(b"bXYZ", b"rXYZ").replace(b"temp", b"bXYZ")
    Image.new("RGB", (80, 80), (255, 0, 0)).convert(mode).save(tmp_path / "a.png", icc_profile=swapped)
    assert np.allclose(np.asarray(open_photo(tmp_path / "a.png", limits).image), (0, 0, 255), atol=2)


def test_a_profile_of_another_kind_of_colours_is_passed_over(tmp_path: Path, limits: Photos) -> None:
    photo = make_photo(3)
    photo.save(tmp_path / "a.png", icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes())
    assert np.array_equal(np.asarray(open_photo(tmp_path / "a.png", limits).image), np.asarray(photo))


def test_an_odd_exif_block_hides_neither_the_photo_nor_the_next_one(tmp_path: Path, limits: Photos) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    content = exif.tobytes().replace(b"\x06\x00\x00\x00\x00\x00", b"\x06\x00\xff\xff\xff\xff")
    make_photo(0).save(tmp_path / "a.jpg", exif=content + b"\xff" * 40)
    make_photo(1).save(tmp_path / "b.jpg")
    reports = check_photos(tmp_path, limits)
    assert [report.file for report in reports] == ["a.jpg", "b.jpg"]
    assert reports[1].usable


@pytest.mark.threat(4, 3)
def test_nothing_but_pixels_survives(tmp_path: Path, limits: Photos) -> None:
    exif = Image.Exif()
    exif[0x010E] = "CANARY description"
    exif.get_ifd(0x8825)[1] = "N"
    make_photo(2).save(tmp_path / "a.jpg", exif=exif, comment=b"CANARY comment")
    image = open_photo(tmp_path / "a.jpg", limits).image
    assert image.info == {}
    assert b"CANARY" not in png_bytes(image)


@pytest.mark.threat(4)
def test_a_gps_position_is_warned_about(tmp_path: Path, limits: Photos) -> None:
    exif = Image.Exif()
    exif.get_ifd(0x8825)[1] = "N"
    make_photo(2).save(tmp_path / "a.jpg", exif=exif)
    assert "the place" in str(check_photos(tmp_path, limits)[0].warnings)


@pytest.mark.fault(8)
def test_copies_resaved_smaller_and_mirrored_are_found_and_other_photos_are_not(tmp_path: Path, limits: Photos) -> None:
    add_photos(tmp_path, 12)
    original = make_photo(0)
    original.save(tmp_path / "x1.png")
    original.save(tmp_path / "x2.jpg", quality=60)
    original.resize((70, 70)).save(tmp_path / "x3.png")
    ImageOps.mirror(original).save(tmp_path / "x4.png")
    twins = {report.file: report.duplicate_of for report in check_photos(tmp_path, limits) if report.duplicate_of}
    assert twins == dict.fromkeys(["x1.png", "x2.jpg", "x3.png", "x4.png"], "00.png")


def test_the_hash_has_63_bits_and_is_that_of_its_own_copy() -> None:
    one = perceptual_hash(make_photo(5))
    assert one.shape == (63,)
    assert np.array_equal(one, perceptual_hash(make_photo(5)))
    assert np.count_nonzero(one != perceptual_hash(make_photo(6))) > 8


@pytest.mark.fault(9)
def test_an_extreme_shape_is_warned_about(tmp_path: Path, limits: Photos) -> None:
    make_photo(0, 320).crop((0, 0, 320, 72)).save(tmp_path / "wide.png")
    assert "crop it by hand" in str(check_photos(tmp_path, limits)[0].warnings)


@pytest.mark.parametrize("size", [(64, 64), (200, 100), (100, 333)])
def test_the_middle_square_is_cut_out(size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, "red")
    image.paste("blue", (size[0] // 2 - 4, size[1] // 2 - 4, size[0] // 2 + 4, size[1] // 2 + 4))
    square = to_square(image, 64)
    assert square.size == (64, 64)
    assert square.getpixel((32, 32))[2] > 200  # type: ignore[index]


@pytest.mark.fault(10)
def test_a_name_in_any_script_is_read(tmp_path: Path, limits: Photos) -> None:
    add_photos(tmp_path, 3)
    for number, name in enumerate(["-rf $(touch x); 'é\".png", "фото 1.png", "x" * 240 + ".png"]):
        make_photo(10 + number).save(tmp_path / name)
    assert len(require_usable(check_photos(tmp_path, limits), tmp_path, limits)) == 6
