"""A folder of photos: every remark has its code, limits come before work, what is alike is said."""

import json
import os
import re
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter, ImageOps
from tiny_project import REPOSITORY, add_photos, make_photo

from benchmarks.fuzz import photo_codes
from dreambooth.errors import PhotosError, SubjectError, shown
from dreambooth.images import open_photo, png_bytes, shrunk
from dreambooth.params import Photos, load_params
from dreambooth.photos import (
    alike,
    check_photos,
    find_photos,
    mean_distance,
    measure,
    require_usable,
    subject_folder,
)


@pytest.fixture
def limits() -> Photos:
    return load_params(REPOSITORY / "params.yaml").photos


def noise(side: int = 96, mean: float = 128, spread: float = 40) -> Image.Image:
    pixels = np.random.default_rng(0).normal(mean, spread, (side, side, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def cut_jpeg() -> bytes:
    from io import BytesIO

    buffer = BytesIO()
    make_photo(0).save(buffer, "JPEG")
    return buffer.getvalue()[:-300]


def animation(path: Path, frames: int) -> None:
    pictures = [make_photo(number) for number in range(frames)]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], lossless=True)


@pytest.mark.fault(3, 4, 5, 7, 9)
@pytest.mark.threat(1)
@pytest.mark.parametrize(
    ("code", "make"),
    [
        ("E_IMG_EMPTY", lambda folder: (folder / "a.jpg").touch()),
        ("E_IMG_FORMAT", lambda folder: (folder / "a.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0")),
        ("E_IMG_TRUNCATED", lambda folder: (folder / "a.jpg").write_bytes(cut_jpeg())),
        ("E_IMG_BYTES", lambda folder: (folder / "a.jpg").write_bytes(bytes(300_000))),
        ("E_IMG_PIXELS", lambda folder: Image.new("1", (2000, 2000)).save(folder / "a.png")),
        ("E_IMG_SMALL", lambda folder: make_photo(0, 32).save(folder / "a.png")),
        ("E_IMG_FRAMES", lambda folder: animation(folder / "a.webp", 4)),
        ("E_IMG_FLAT", lambda folder: noise(96, 2, 1).save(folder / "a.png")),
        ("W_IMG_FRAMES", lambda folder: animation(folder / "a.webp", 3)),
        ("W_IMG_ASPECT", lambda folder: make_photo(0, 320).crop((0, 0, 320, 72)).save(folder / "a.png")),
        ("W_IMG_ENLARGED", lambda folder: make_photo(0, 80).save(folder / "a.png")),
        ("W_IMG_BLUR", lambda folder: make_photo(0, 400).filter(ImageFilter.GaussianBlur(4)).save(folder / "a.png")),
        ("W_IMG_DARK", lambda folder: noise(96, 14, 8).save(folder / "a.png")),
        ("W_IMG_BRIGHT", lambda folder: noise(96, 250, 8).save(folder / "a.png")),
    ],
)
def test_each_finding_has_its_code(tmp_path: Path, limits: Photos, code: str, make: object) -> None:
    make(tmp_path)  # type: ignore[operator]
    strict = limits.model_copy(update={"max_bytes": 200_000, "max_pixels": 200_000, "max_frames": 3})
    (report,) = check_photos(tmp_path, strict, resolution=90)
    expected = {code} | ({"W_IMG_ENLARGED"} if code == "W_IMG_ASPECT" else set())
    assert set(report.codes) == expected
    assert report.usable == code.startswith("W_")
    assert json.loads(json.dumps(report.as_row()))["codes"] == report.codes


@pytest.mark.fault(9)
def test_a_good_photo_has_no_remark(tmp_path: Path, limits: Photos) -> None:
    add_photos(tmp_path, 3)
    assert [report.codes for report in check_photos(tmp_path, limits, resolution=64)] == [[], [], []]


@pytest.mark.fault(9)
@pytest.mark.parametrize("subject", ["biscuit", "chime"])
def test_the_demo_photos_are_sharp_and_the_same_ones_blurred_are_not(subject: str, limits: Photos) -> None:
    for path in find_photos(REPOSITORY / "data/subjects" / subject).photos:
        photo = open_photo(path, limits).image
        blurred = photo.filter(ImageFilter.GaussianBlur(min(photo.size) / 100))
        assert measure(photo).sharpness > 5 * limits.min_sharpness
        assert measure(blurred).sharpness < limits.min_sharpness


@pytest.mark.fault(1)
def test_an_empty_folder_is_refused_with_the_minimum(tmp_path: Path, limits: Photos) -> None:
    with pytest.raises(PhotosError, match=r"has 0 usable photos .* fewer than 3; put 3 to 10 there"):
        require_usable(check_photos(tmp_path, limits), tmp_path, limits)


@pytest.mark.threat(1)
def test_too_many_files_or_bytes_are_refused_before_one_is_decoded(tmp_path: Path, limits: Photos) -> None:
    for number in range(5):
        (tmp_path / f"{number}.jpg").write_bytes(b"no photo at all")
    strict = limits.model_copy(update={"max_count": 4, "max_total_bytes": 60})
    with pytest.raises(PhotosError) as refused:
        check_photos(tmp_path, strict)
    assert [problem.split(", ")[1].split(";")[0] for problem in refused.value.problems] == [
        "more than photos.max_count 4",
        "more than photos.max_total_bytes 60",
    ]


@pytest.mark.fault(8)
def test_photos_that_are_alike_are_warned_about_and_different_ones_are_not(tmp_path: Path, limits: Photos) -> None:
    add_photos(tmp_path / "different", 5)
    assert alike(check_photos(tmp_path / "different", limits), limits) is None
    (tmp_path / "burst").mkdir()
    whole = make_photo(3, 256)
    for step in range(4):
        whole.crop((4 * step, 4 * step, 210 + 4 * step, 210 + 4 * step)).save(tmp_path / "burst" / f"{step}.png")
    reports = check_photos(tmp_path / "burst", limits)
    remark = alike(reports, limits)
    assert sum(report.usable for report in reports) >= 2
    assert remark is not None
    assert remark.code == "W_PHOTOS_ALIKE"


def test_the_mean_distance_is_that_of_all_pairs() -> None:
    hashes = np.random.default_rng(0).random((7, 63)) < 0.5
    pairs = [np.count_nonzero(hashes[i] != hashes[j]) for i in range(7) for j in range(i)]
    assert mean_distance(hashes) == pytest.approx(np.mean(pairs))
    assert mean_distance(np.array([[True, False], [True, True]])) == 1.0


@pytest.mark.threat(7)
def test_only_regular_files_are_photos_or_captions(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    add_photos(outside, 1)
    (outside / "secret.txt").write_text("a photo of {}")
    folder = tmp_path / "photos"
    add_photos(folder, 1)
    (folder / "link.png").symlink_to(outside / "00.png")
    (folder / "00.txt").symlink_to(outside / "secret.txt")
    (folder / "dangling.jpg").symlink_to(tmp_path / "nowhere")
    (folder / "folder.jpg").mkdir()
    os.mkfifo(folder / "pipe.jpg")
    found = find_photos(folder)
    assert [path.name for path in found.photos] == ["00.png"]
    assert found.captions == {}
    assert found.ignored == ["00.txt", "dangling.jpg", "folder.jpg", "link.png", "pipe.jpg"]


@pytest.mark.fault(11)
@pytest.mark.threat(6)
@pytest.mark.parametrize("bad", ["../../etc", "/etc", "", ".", "..", "a/b", "-x", "rex\n", "rex;x"])
def test_an_id_that_leads_elsewhere_is_refused(tmp_path: Path, bad: str) -> None:
    with pytest.raises(SubjectError, match="is not an id"):
        subject_folder(tmp_path, bad)


@pytest.mark.fault(11)
@pytest.mark.threat(6, 7)
def test_a_subject_that_is_a_link_out_of_the_project_is_refused(tmp_path: Path) -> None:
    add_photos(tmp_path / "elsewhere", 3)
    (tmp_path / "data/subjects").mkdir(parents=True)
    (tmp_path / "data/subjects/rex").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SubjectError, match=r"leads to .*elsewhere; put a folder"):
        subject_folder(tmp_path, "rex")


@pytest.mark.fault(10)
@pytest.mark.threat(5)
@pytest.mark.parametrize(
    "name",
    [
        "-rf.png",
        "a; touch x $(id) `id` & | > <.png",
        "'\"\\.png",
        "línea\u2028nueva \u202egnp.png",
        "new\nline.png",
        "\x1b[31mred.png",
        "日本語.png",
        "n" * 251 + ".png",
        os.fsdecode(b"\xff\xfe.png"),
        "=HYPERLINK(1).png",
        " .png",
        "%s{0}{}.png",
    ],
)
def test_any_name_is_read_and_printed_on_one_line(tmp_path: Path, limits: Photos, name: str) -> None:
    make_photo(0).save(tmp_path / "x.png")
    (tmp_path / "x.png").rename(tmp_path / name)
    (report,) = check_photos(tmp_path, limits)
    assert report.usable
    assert report.file == name
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(PhotosError) as refused:
        require_usable(check_photos(tmp_path, limits), tmp_path, limits)
    assert len(str(refused.value).splitlines()) == 2
    assert shown(str(refused.value.problems[0])).isprintable()
    assert refused.value.problems[0].isprintable()


@pytest.mark.threat(3, 4)
def test_what_hangs_on_a_picture_is_not_in_the_prepared_one(tmp_path: Path, limits: Photos) -> None:
    photo = make_photo(1)
    exif = Image.Exif()
    exif[0x010E] = "CANARY"
    xmp = b"<x:xmpmeta>CANARY exif:GPSLatitude='1'</x:xmpmeta>"
    photo.save(tmp_path / "a.jpg", exif=exif, comment=b"CANARY", xmp=xmp)
    with (tmp_path / "a.jpg").open("ab") as file:
        file.write(b"PK\x03\x04CANARY<script>alert(1)</script>")
    photo.save(tmp_path / "b.webp", exif=exif, xmp=xmp, lossless=True)
    for name in ("a.jpg", "b.webp"):
        assert b"CANARY" in (tmp_path / name).read_bytes()
        assert b"CANARY" not in png_bytes(open_photo(tmp_path / name, limits).image)
    assert "W_IMG_GPS" in check_photos(tmp_path, limits)[0].codes


@pytest.mark.fault(42)
@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_photo_that_may_not_be_read_is_named(tmp_path: Path, limits: Photos) -> None:
    add_photos(tmp_path, 1)
    (tmp_path / "00.png").chmod(0)
    assert check_photos(tmp_path, limits)[0].codes == ["E_IMG_READ"]


def test_large_pictures_are_scaled_down_by_their_shorter_side_and_small_ones_stay() -> None:
    assert shrunk(Image.new("RGB", (400, 300)), 150).size == (200, 150)
    small = Image.new("RGB", (40, 30))
    assert shrunk(small, 150) is small


def test_every_code_is_explained_and_every_explained_one_is_used() -> None:
    sources = "".join((REPOSITORY / "dreambooth" / name).read_text() for name in ("images.py", "photos.py"))
    assert set(re.findall(r'"([EW]_(?:IMG|PHOTOS)_[A-Z]+)"', sources)) == photo_codes()


def test_copies_are_found_among_hundreds(tmp_path: Path, limits: Photos) -> None:
    """The name of a socket is no photo, the mirrored hundredth is the first again."""
    add_photos(tmp_path, 40)
    ImageOps.mirror(make_photo(7)).save(tmp_path / "mirrored.png")
    if sys.platform == "linux":
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(str(tmp_path / "s.png"))
    reports = check_photos(tmp_path, limits)
    assert {report.file: report.duplicate_of for report in reports if report.duplicate_of} == {"mirrored.png": "07.png"}
