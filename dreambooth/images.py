"""Turn a photo on disk into an upright sRGB picture, or say why it is none; hashes and PNG of pictures.

Pictures are PIL images of mode RGB; W width, H height, in pixels.
"""

import io
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from scipy.fft import dctn

from dreambooth.errors import shown
from dreambooth.folders import TornFolderError, read_manifest
from dreambooth.params import Photos

FORMATS = ("JPEG", "PNG", "WEBP")
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
class Opened:
    """A photo as it was found in its file."""

    image: Image.Image
    """Upright, sRGB, on white: pixels alone."""
    tells_place: bool
    """Whether its EXIF or XMP tells where it was taken."""
    frames: int
    """More than one in an animation, of which the first is used."""


class UnusableError(Exception):
    """One file that cannot be used.

    Args:
        code: stable, for programs: E_IMG_TRUNCATED.
        text: why, for people.
    """

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


def open_photo(path: Path, limits: Photos) -> Opened:
    """Read a photo: allowed format by content, within the limits, decoded to the last byte, upright, sRGB, on white.

    Returns:
        An RGB picture made of pixels alone, no EXIF, no comment, no profile, and what a person should know of its file.

    Raises:
        UnusableError: what is wrong with this file, with its code.
    """
    _check_file(path, limits)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata, which is dropped
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                _check_size(image, limits)
                frames = _check_frames(image, limits)
                image.load()
                return Opened(_upright_rgb(image), _tells_place(image), frames)
    except UnusableError:
        raise
    except UnidentifiedImageError:
        text = f"is no JPEG, PNG or WEBP {_looks_like(path)}; convert it or take it away"
        raise UnusableError("E_IMG_FORMAT", text) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        text = f"has more pixels than photos.max_pixels {limits.max_pixels}; scale it down"
        raise UnusableError("E_IMG_PIXELS", text) from None
    except Exception as error:  # decoders raise whatever a damaged file leads them to, struct.error for one
        text = f"cannot be decoded ({shown(str(error) or type(error).__name__)}); copy it again"
        raise UnusableError("E_IMG_TRUNCATED", text) from None


def read_prepared(folder: Path) -> Iterator[tuple[str, Image.Image]]:
    """Read the pictures that `validate` has made, one after the other, with their names, in its order."""
    manifest = read_manifest(folder)
    for entry in manifest["photos"]:
        if entry["file"] not in manifest["files"]:  # whose names were found in the folder itself
            raise TornFolderError(f"{shown(folder / entry['file'])} is not in the manifest; run validate again")
        with Image.open(folder / entry["file"], formats=["PNG"]) as image:
            yield entry["file"], image.convert("RGB")


def read_captions(folder: Path) -> dict[str, str | None]:
    """Read the caption of each picture that `validate` has made, by its name; None where the photo has none."""
    return {entry["file"]: entry.get("caption") for entry in read_manifest(folder)["photos"]}


def shrunk(image: Image.Image, shorter_side: int) -> Image.Image:
    """Scale a picture down (Lanczos) until its shorter side has no more pixels than this; a small one stays."""
    scale = shorter_side / min(image.size)
    if scale >= 1:
        return image
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS)


def to_square(image: Image.Image, resolution: int) -> Image.Image:
    """Scale the shorter side to `resolution` (Lanczos) and cut the middle square out."""
    return ImageOps.fit(image, (resolution, resolution), method=Image.Resampling.LANCZOS)


def perceptual_hash(image: Image.Image) -> NDArray[np.bool_]:
    """Return 63 bits that survive scaling and recompression (Zauner 2010): signs of the lowest DCT coefficients.

    Returns:
        (63,) whether each of the 8 x 8 lowest coefficients but the mean is above their median.
    """
    return _hash_of(_thumbnail(image))


def both_hashes(image: Image.Image) -> NDArray[np.bool_]:
    """Return (2, 63), the perceptual hashes of a picture and of its mirror image."""
    thumbnail = _thumbnail(image)
    return np.stack([_hash_of(thumbnail), _hash_of(ImageOps.mirror(thumbnail))])


def hash_distance(hashes: NDArray[np.bool_], others: NDArray[np.bool_]) -> NDArray[np.intp]:
    """Count the bits in which a picture or its mirror image differs from others: the fewer of the two.

    One function for photos that stand twice in a folder and for generated pictures that repeat a photo.

    Args:
        hashes: (2, 63), of `both_hashes`.
        others: (..., 63), hashes of pictures as they are.

    Returns:
        (...), one number for each of the others.
    """
    return np.asarray(np.count_nonzero(hashes != others[..., None, :], axis=-1).min(axis=-1))


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


def _thumbnail(image: Image.Image) -> Image.Image:
    return image.convert("L").resize((_HASH_SIDE, _HASH_SIDE), Image.Resampling.LANCZOS)


def _hash_of(thumbnail: Image.Image) -> NDArray[np.bool_]:
    low = dctn(np.asarray(thumbnail, dtype=np.float64), norm="ortho")[:8, :8].ravel()[1:]
    return np.asarray(low > np.median(low))


def _check_file(path: Path, limits: Photos) -> None:
    """Refuse by what the file system says, before a byte is read."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise UnusableError("E_IMG_READ", f"cannot be read ({error.strerror}); mend its permissions") from None
    if size == 0:
        raise UnusableError("E_IMG_EMPTY", "is empty (0 bytes); copy the photo again")
    if size > limits.max_bytes:
        raise UnusableError("E_IMG_BYTES", f"has {size} bytes, more than photos.max_bytes {limits.max_bytes}")
    if not os.access(path, os.R_OK):
        raise UnusableError("E_IMG_READ", "cannot be read (Permission denied); mend its permissions")


def _check_size(image: Image.Image, limits: Photos) -> None:
    """Refuse by the size that the header states, before a pixel is decoded."""
    width, height = image.size
    if width * height > limits.max_pixels:
        text = f"has {width} x {height} pixels, more than photos.max_pixels {limits.max_pixels}; scale it down"
        raise UnusableError("E_IMG_PIXELS", text)
    if min(width, height) < limits.min_side:
        text = f"is {width} x {height} pixels, its shorter side under photos.min_side {limits.min_side}"
        raise UnusableError("E_IMG_SMALL", text)


def _check_frames(image: Image.Image, limits: Photos) -> int:
    frames = int(getattr(image, "n_frames", 1))
    if frames > limits.max_frames:
        text = f"has {frames} frames, more than photos.max_frames {limits.max_frames}; save the one that you mean"
        raise UnusableError("E_IMG_FRAMES", text)
    return frames


def _tells_place(image: Image.Image) -> bool:
    xmp = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp") or b""
    if b"GPSLatitude" in (xmp.encode() if isinstance(xmp, str) else xmp):
        return True
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
    plain = Image.new("RGB", colours.size)  # gets pixels alone: no comment or profile survives
    plain.paste(colours)
    return plain


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    if image.mode in ("RGBA", "LA", "P", "PA"):
        image = image.convert("RGBA").convert("RGB")
    if profile and image.mode in ("RGB", "CMYK"):
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
        except (ImageCms.PyCMSError, OSError, ValueError):
            return image.convert("RGB")  # a broken profile: the plain conversion is what viewers show
        return converted if converted is not None else image.convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


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
