"""Turn photos on disk into upright sRGB pictures; refuse what is no photo, and say why for every file at once.

Pictures are PIL images of mode RGB; W width, H height, in pixels.
"""

import io
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from scipy.fft import dctn

from dreambooth.errors import PhotosError, SubjectError
from dreambooth.folders import read_manifest
from dreambooth.params import Photos

FORMATS = ("JPEG", "PNG", "WEBP")
PHOTO_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp"})
# Pictures that we do not read: whoever puts one there means it, so it is named and not passed over.
FOREIGN_SUFFIXES = frozenset({".avif", ".bmp", ".cr2", ".dng", ".eps", ".gif", ".heic", ".heif", ".jp2", ".jxl"}) | {
    ".nef", ".psd", ".raw", ".svg", ".tga", ".tif", ".tiff"
}  # fmt: skip
CAPTION_SUFFIX = ".txt"
PROVENANCE = "dreambooth"  # keyword of the text of a PNG that says how it was made
_HASH_SIDE = 32  # pixels of the grey thumbnail that is transformed; the 8 x 8 lowest frequencies count
_GPS, _ORIENTATION = 0x8825, 0x0112  # EXIF tags
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class PhotoFiles:
    """What lies in a folder: files that should be photos, their captions, and names that are passed over."""

    photos: list[Path]
    ignored: list[str]
    captions: dict[str, Path] = field(default_factory=dict)
    """The caption file, 00.txt, of a photo, 00.jpg, by the photo's name."""


@dataclass(frozen=True)
class PhotoReport:
    """What was found out about one file."""

    file: str
    width: int = 0
    height: int = 0
    warnings: list[str] = field(default_factory=list)
    error: str | None = None
    duplicate_of: str | None = None

    @property
    def usable(self) -> bool:
        """Whether the photo goes into the training."""
        return self.error is None and self.duplicate_of is None


class _UnusableError(Exception):
    """One file that cannot be used; the message says why."""


def find_photos(folder: Path) -> PhotoFiles:
    """List a subject's folder: the photos by name, and what is passed over (hidden files, notes, folders, links)."""
    if not folder.is_dir():
        raise SubjectError(f"{folder} does not exist; put the photos there, or: dreambooth add ID PHOTOS --class-noun")
    photos: list[Path] = []
    others: list[Path] = []
    for path in sorted(folder.iterdir()):
        is_photo = path.suffix.lower() in PHOTO_SUFFIXES | FOREIGN_SUFFIXES and not path.name.startswith(".")
        if is_photo and path.is_file() and not path.is_symlink():
            photos.append(path)
        else:
            others.append(path)
    texts = {path.stem: path for path in others if path.suffix == CAPTION_SUFFIX and path.is_file()}
    captions = {photo.name: texts[photo.stem] for photo in photos if photo.stem in texts}
    return PhotoFiles(photos, [path.name for path in others if path not in captions.values()], captions)


def open_image(path: Path, limits: Photos) -> Image.Image:
    """Read a photo: allowed format by content, within the limits, decoded to the last byte, upright, sRGB, on white.

    Returns:
        An RGB picture made of pixels alone: no EXIF, no comment, no profile.

    Raises:
        PhotosError: what is wrong with this file.
    """
    try:
        return _open(path, limits)[0]
    except _UnusableError as error:
        raise PhotosError([f"{path}: {error}"]) from None


def check_photos(folder: Path, limits: Photos) -> list[PhotoReport]:
    """Decode every photo of a folder and report on each; one bad file does not hide the next."""
    reports: list[PhotoReport] = []
    seen: list[tuple[str, NDArray[np.bool_]]] = []
    for path in find_photos(folder).photos:
        report, hashes = _check_one(path, limits)
        if hashes is not None:
            distance, twin = min(((hash_distance(hashes, other), name) for name, other in seen), default=(64, ""))
            if distance <= limits.duplicate_distance:
                report = PhotoReport(report.file, report.width, report.height, report.warnings, duplicate_of=twin)
            else:
                seen.append((path.name, hashes[0]))
        reports.append(report)
    return reports


def require_usable(reports: Sequence[PhotoReport], folder: Path, limits: Photos) -> list[PhotoReport]:
    """Return the usable reports, or raise PhotosError that names every file that is not and the counts that are not."""
    problems = [f"{folder / report.file}: {report.error}" for report in reports if report.error]
    usable = [report for report in reports if report.usable]
    duplicates = sum(report.duplicate_of is not None for report in reports)
    if len(usable) < limits.min_count:
        dropped = f" after {duplicates} duplicates were dropped" if duplicates else ""
        problems.append(
            f"{folder} has {len(usable)} usable photos (.jpg .jpeg .png .webp){dropped}, fewer than "
            f"{limits.min_count}; put 3 to 10 there"
        )
    if len(usable) > limits.max_count:
        problems.append(f"{folder} has {len(usable)} photos, more than photos.max_count {limits.max_count}")
    if problems:
        raise PhotosError(problems)
    return usable


def read_prepared(folder: Path) -> Iterator[tuple[str, Image.Image]]:
    """Read the pictures that `validate` has made, one after the other, with their names, in its order."""
    for entry in read_manifest(folder)["photos"]:
        with Image.open(folder / entry["file"], formats=["PNG"]) as image:
            yield entry["file"], image.convert("RGB")


def read_captions(folder: Path) -> dict[str, str | None]:
    """Read the caption of each picture that `validate` has made, by its name; None where the photo has none."""
    return {entry["file"]: entry.get("caption") for entry in read_manifest(folder)["photos"]}


def to_square(image: Image.Image, resolution: int) -> Image.Image:
    """Scale the shorter side to `resolution` (Lanczos) and cut the middle square out."""
    return ImageOps.fit(image, (resolution, resolution), method=Image.Resampling.LANCZOS)


def perceptual_hash(image: Image.Image) -> NDArray[np.bool_]:
    """Return 63 bits that survive scaling and recompression (Zauner 2010): signs of the lowest DCT coefficients.

    Returns:
        (63,) whether each of the 8 x 8 lowest coefficients but the mean is above their median.
    """
    grey = image.convert("L").resize((_HASH_SIDE, _HASH_SIDE), Image.Resampling.LANCZOS)
    low = dctn(np.asarray(grey, dtype=np.float64), norm="ortho")[:8, :8].ravel()[1:]
    return np.asarray(low > np.median(low))


def both_hashes(image: Image.Image) -> NDArray[np.bool_]:
    """Return (2, 63), the perceptual hashes of a picture and of its mirror image."""
    return np.stack([perceptual_hash(image), perceptual_hash(ImageOps.mirror(image))])


def hash_distance(hashes: NDArray[np.bool_], other: NDArray[np.bool_]) -> int:
    """Count the bits in which a picture or its mirror image (2, 63) differs from `other` (63,): the fewer of the two.

    One function for photos that stand twice in a folder and for generated pictures that repeat a photo.
    """
    return int(np.count_nonzero(hashes != other, axis=-1).min())


def png_bytes(image: Image.Image, provenance: Mapping[str, Any] | None = None) -> bytes:
    """Encode a picture as PNG, the same pixels to the same bytes.

    Args:
        image: any picture.
        provenance: how it was made; becomes JSON under the keyword dreambooth (an iTXt chunk).
    """
    buffer, chunks = io.BytesIO(), PngInfo()
    if provenance is not None:
        chunks.add_itxt(PROVENANCE, json.dumps(provenance, sort_keys=True))
    image.save(buffer, "PNG", compress_level=4, pnginfo=chunks)
    return buffer.getvalue()


def read_provenance(png: bytes) -> dict[str, Any]:
    """Return how a picture of ours was made, from the PNG itself; nothing where it does not say."""
    with Image.open(io.BytesIO(png), formats=("PNG",)) as image:
        image.load()
        text = str(image.info.get(PROVENANCE, ""))
    found: dict[str, Any] = json.loads(text) if text else {}
    return found


def _check_one(path: Path, limits: Photos) -> tuple[PhotoReport, NDArray[np.bool_] | None]:
    """Report on one file, with the perceptual hashes of the picture and of its mirror image if it is one."""
    try:
        image, has_gps = _open(path, limits)
    except _UnusableError as error:
        return PhotoReport(path.name, error=str(error)), None
    remarks = ["its EXIF tells the place where it was taken (removed in training)"] if has_gps else []
    aspect = max(image.size) / min(image.size)
    if aspect > limits.max_aspect:
        remarks.append(f"{image.width} x {image.height}: the middle square shows 1/{aspect:.1f} of it; crop it by hand")
    return PhotoReport(path.name, image.width, image.height, remarks), both_hashes(image)


def _open(path: Path, limits: Photos) -> tuple[Image.Image, bool]:
    """Return the picture, and whether its file tells a GPS position."""
    size = path.stat().st_size
    if size == 0:
        raise _UnusableError("is empty (0 bytes); copy the photo again")
    if size > limits.max_bytes:
        raise _UnusableError(f"has {size} bytes, more than photos.max_bytes {limits.max_bytes}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata, which is dropped; of bombs: our own cap is lower
            with Image.open(path, formats=FORMATS) as image:
                _check_size(image, limits)
                image.load()
                return _upright_rgb(image), _has_gps(image)
    except UnidentifiedImageError:
        raise _UnusableError(f"is no JPEG, PNG or WEBP {_looks_like(path)}; convert it or take it away") from None
    except Image.DecompressionBombError:
        raise _UnusableError(f"has more pixels than photos.max_pixels {limits.max_pixels}; scale it down") from None
    except Exception as error:  # decoders raise whatever a damaged file leads them to, struct.error for one
        raise _UnusableError(f"cannot be decoded ({str(error) or type(error).__name__}); copy it again") from None


def _check_size(image: Image.Image, limits: Photos) -> None:
    width, height = image.size
    if width * height > limits.max_pixels:
        raise _UnusableError(
            f"has {width} x {height} pixels, more than photos.max_pixels {limits.max_pixels}; scale it down"
        )
    if min(width, height) < limits.min_side:
        raise _UnusableError(f"is {width} x {height} pixels, its shorter side under photos.min_side {limits.min_side}")


def _has_gps(image: Image.Image) -> bool:
    try:
        return bool(image.getexif().get_ifd(_GPS))
    except Exception:  # an EXIF block that cannot be read tells no place
        return False


def _upright_rgb(image: Image.Image) -> Image.Image:
    turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    upright = image.transpose(turn) if turn is not None else image
    if upright.mode.startswith("I"):  # 16 bits of grey: keep the high byte
        upright = Image.fromarray((np.asarray(upright).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8))
    alpha = upright.convert("RGBA").getchannel("A") if upright.has_transparency_data else None
    colours = _to_srgb(upright, image.info.get("icc_profile"))
    if alpha is not None:
        colours = Image.composite(colours, Image.new("RGB", colours.size, "white"), alpha)
    return Image.fromarray(np.asarray(colours))  # of pixels alone: no comment or profile survives


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    if image.mode in ("RGBA", "LA", "P", "PA"):
        image = image.convert("RGBA").convert("RGB")
    if profile and image.mode in ("RGB", "CMYK"):
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
        except ImageCms.PyCMSError:
            return image.convert("RGB")  # a broken profile: the plain conversion is what viewers show
        return converted if converted is not None else image.convert("RGB")
    return image.convert("RGB")


def _looks_like(path: Path) -> str:
    with path.open("rb") as file:
        head = file.read(16)
    known = {b"GIF8": "GIF", b"%!PS": "EPS", b"8BPS": "PSD", b"II*\0": "TIFF", b"MM\0*": "TIFF", b"BM": "BMP"}
    name = next((name for magic, name in known.items() if head.startswith(magic)), None)
    if head[4:8] == b"ftyp":
        name = "HEIC or AVIF"
    if name is None:
        name = "text" if head.isascii() and b"\0" not in head else "unknown"
    return f"(it looks like {name})"
