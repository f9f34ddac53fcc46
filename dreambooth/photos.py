"""Look at a folder of photos: which can be used, and a stable code for everything that a person should know of each.

Codes that begin with E_ keep the photo out, those with W_ do not. N photos, B bits of a hash.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import laplace

from dreambooth.errors import PhotosError, SubjectError, shown
from dreambooth.images import UnusableError, both_hashes, hash_distance, open_photo
from dreambooth.params import Photos, check_id

SUBJECTS = "data/subjects"
PHOTO_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp"})
# Pictures that we do not read: whoever puts one there means it, so it is named and not passed over.
FOREIGN_SUFFIXES = frozenset({".avif", ".bmp", ".cr2", ".dng", ".eps", ".gif", ".heic", ".heif", ".jp2", ".jxl"}) | {
    ".nef", ".psd", ".raw", ".svg", ".tga", ".tif", ".tiff"
}  # fmt: skip
CAPTION_SUFFIX = ".txt"
_MEASURED_SIDE = 512  # pixels of the shorter side at which sharpness is measured, so that photos compare


@dataclass(frozen=True)
class PhotoFiles:
    """What lies in a folder: files that should be photos, their captions, and names that are passed over."""

    photos: list[Path]
    ignored: list[str]
    captions: dict[str, Path] = field(default_factory=dict)
    """The caption file, 00.txt, of a photo, 00.jpg, by the photo's name."""


@dataclass(frozen=True)
class Remark:
    """One thing that was found out about a photo: a code for programs, and words for people."""

    code: str
    text: str

    def __str__(self) -> str:
        return f"{self.text} ({self.code})"


@dataclass(frozen=True)
class Quality:
    """What was measured on a photo, grey levels from 0 to 255."""

    sharpness: float
    """Variance of the Laplacian of the grey picture, at most 512 pixels on its shorter side (Pech-Pacheco et al.
    2000)."""
    brightness: float
    """Mean grey level."""
    contrast: float
    """Standard deviation of the grey levels."""


@dataclass(frozen=True)
class PhotoReport:
    """What was found out about one file."""

    file: str
    width: int = 0
    height: int = 0
    quality: Quality | None = None
    warnings: list[Remark] = field(default_factory=list)
    error: Remark | None = None
    duplicate_of: str | None = None
    hash: str = ""
    """The perceptual hash, 16 hexadecimal digits."""

    @property
    def usable(self) -> bool:
        """Whether the photo goes into the training."""
        return self.error is None and self.duplicate_of is None

    @property
    def codes(self) -> list[str]:
        """The codes of all that was found out."""
        codes = [remark.code for remark in self.warnings] + ([self.error.code] if self.error else [])
        return codes + (["W_IMG_DUPLICATE"] if self.duplicate_of is not None else [])

    def as_row(self) -> dict[str, Any]:
        """Return it as one row of photos.json."""
        quality = self.quality and {name: round(value, 2) for name, value in vars(self.quality).items()}
        remarks = [str(remark) for remark in [*self.warnings, *([self.error] if self.error else [])]]
        found = {"file": self.file, "width": self.width, "height": self.height, "usable": self.usable}
        found |= {"codes": self.codes, "remarks": remarks, "duplicate_of": self.duplicate_of}
        return found | {"quality": quality, "hash": self.hash}


Use = Callable[[PhotoReport, Image.Image], object]


def subject_folder(root: Path, subject_id: str) -> Path:
    """Return data/subjects/<id> of a project.

    Raises:
        SubjectError: the id is none, or the folder is a link that leads out of data/subjects.
    """
    home = root / SUBJECTS
    folder = home / check_id(subject_id)
    if not folder.resolve().is_relative_to(home.resolve()):
        raise SubjectError(f"{folder} leads to {shown(folder.resolve())}; put a folder with the photos there, no link")
    return folder


def find_photos(folder: Path) -> PhotoFiles:
    """List a subject's folder: the photos by name, and what is passed over (hidden files, notes, folders, links)."""
    if not folder.is_dir():
        raise SubjectError(
            f"{shown(folder)} does not exist; put the photos there, or: dreambooth add ID PHOTOS --class-noun"
        )
    photos: list[Path] = []
    others: list[Path] = []
    for path in sorted(folder.iterdir()):
        is_photo = path.suffix.lower() in PHOTO_SUFFIXES | FOREIGN_SUFFIXES and not path.name.startswith(".")
        if is_photo and is_regular(path):
            photos.append(path)
        else:
            others.append(path)
    texts = {path.stem: path for path in others if path.suffix == CAPTION_SUFFIX and is_regular(path)}
    captions = {photo.name: texts[photo.stem] for photo in photos if photo.stem in texts}
    return PhotoFiles(photos, [path.name for path in others if path not in captions.values()], captions)


def is_regular(path: Path) -> bool:
    """Return whether a path is a file itself: no link, which may lead anywhere, no pipe, which may never end."""
    return path.is_file() and not path.is_symlink()


def check_photos(folder: Path, limits: Photos, resolution: int = 0, use: Use | None = None) -> list[PhotoReport]:
    """Decode every photo of a folder and report on each; one bad file does not hide the next.

    Args:
        folder: of the photos.
        limits: section `photos`.
        resolution: side of the pictures of the training, in pixels; 0 knows none.
        use: is given each usable photo with its report, one after the other, so that one alone is in memory.

    Raises:
        PhotosError: more photos, or more bytes, than are decoded at all.
    """
    paths = find_photos(folder).photos
    require_bounded(paths, folder, limits)
    twins = _Twins(limits.duplicate_distance)
    reports: list[PhotoReport] = []
    for path in paths:
        report, image = check_photo(path, limits, resolution)
        if image is not None:
            hashes = both_hashes(image)
            report = replace(report, hash=_hex(hashes[0]), duplicate_of=twins.find_or_keep(path.name, hashes))
            if report.usable and use is not None:
                use(report, image)
        reports.append(report)
    return reports


def require_bounded(paths: Sequence[Path], folder: Path | str, limits: Photos) -> None:
    """Refuse what would take for ever before anything of it is copied or decoded.

    Args:
        paths: of the photos.
        folder: where they are; in words where that is no one folder.
        limits: section photos of params.yaml.

    Raises:
        PhotosError: more photos, or more bytes of them together, than are looked at.
    """
    problems = []
    if len(paths) > limits.max_count:
        problems.append(f"{shown(folder)} has {len(paths)} photos, more than photos.max_count {limits.max_count}")
    total = sum(path.stat().st_size for path in paths)
    if total > limits.max_total_bytes:
        problems.append(
            f"{shown(folder)} has {total} bytes of photos, more than photos.max_total_bytes {limits.max_total_bytes}"
        )
    if problems:
        raise PhotosError([f"{problem}; take some away, or raise it" for problem in problems])


def check_photo(path: Path, limits: Photos, resolution: int = 0) -> tuple[PhotoReport, Image.Image | None]:
    """Report on one file; return its picture too, if it is one that can be used."""
    try:
        opened = open_photo(path, limits)
    except UnusableError as error:
        return PhotoReport(path.name, error=Remark(error.code, str(error))), None
    image, quality = opened.image, measure(opened.image)
    report = PhotoReport(path.name, image.width, image.height, quality)
    if quality.contrast < limits.min_contrast:
        text = f"shows nothing: contrast {quality.contrast:.1f} of 255, under photos.min_contrast {limits.min_contrast}"
        return replace(report, error=Remark("E_IMG_FLAT", text)), None
    remarks = list(_shape_remarks(image, limits, resolution)) + list(_quality_remarks(quality, limits))
    if opened.frames > 1:
        remarks.append(Remark("W_IMG_FRAMES", f"an animation of {opened.frames} frames; the first one is used"))
    if opened.tells_place:
        remarks.append(Remark("W_IMG_GPS", "it tells the place where it was taken (removed in training)"))
    return replace(report, warnings=remarks), image


def require_usable(reports: Sequence[PhotoReport], folder: Path | str, limits: Photos) -> list[PhotoReport]:
    """Return the usable reports, or raise PhotosError that names every file that is not and the counts that are not.

    Args:
        reports: of photos, whose files are relative to a folder or absolute.
        folder: where they are; in words where that is no one folder.
        limits: section photos of params.yaml.
    """
    problems = [f"{shown(Path(folder, report.file))}: {report.error}" for report in reports if report.error]
    usable = [report for report in reports if report.usable]
    duplicates = sum(report.duplicate_of is not None for report in reports)
    if len(usable) < limits.min_count:
        dropped = f" after {duplicates} duplicates were dropped" if duplicates else ""
        problems.append(
            f"{shown(folder)} has {len(usable)} usable photos (.jpg .jpeg .png .webp){dropped}, fewer than "
            f"{limits.min_count}; put 3 to 10 there"
        )
    if problems:
        raise PhotosError(problems)
    return usable


def measure(image: Image.Image) -> Quality:
    """Measure sharpness, brightness and contrast of an RGB picture."""
    grey = image.convert("L")
    scale = _MEASURED_SIDE / min(grey.size)
    if scale < 1:
        size = (max(1, round(grey.width * scale)), max(1, round(grey.height * scale)))
        grey = grey.resize(size, Image.Resampling.BOX)
    levels = np.asarray(grey, dtype=np.float32)
    return Quality(float(laplace(levels).var()), float(levels.mean()), float(levels.std()))


def alike(reports: Sequence[PhotoReport], limits: Photos) -> Remark | None:
    """Return a remark on the whole folder if its usable photos are all alike, else None."""
    hashes = [report.hash for report in reports if report.usable and report.hash]
    if len(hashes) < 2 or (distance := mean_distance(np.stack([_bits(one) for one in hashes]))) >= limits.min_distance:
        return None
    text = (
        f"the photos are alike: two of them differ in {distance:.1f} of 63 bits, under photos.min_distance "
        f"{limits.min_distance}; add other places, angles and light"
    )
    return Remark("W_PHOTOS_ALIKE", text)


def mean_distance(hashes: NDArray[np.bool_]) -> float:
    """Return the mean number of bits in which two of N hashes differ; about 31 of 63 for photos that are not alike.

    A bit that k of N hashes have differs in k (N - k) of the N (N - 1) / 2 pairs.

    Args:
        hashes: (N, B), N at least 2.
    """
    count, ones = len(hashes), hashes.sum(axis=0)
    return float((ones * (count - ones)).sum() / (count * (count - 1) / 2))


class _Twins:
    """Find the earlier photo that shows the same: hashes within a distance, mirrored ones too."""

    def __init__(self, distance: int) -> None:
        self._distance = distance
        self._names: list[str] = []
        self._hashes: list[NDArray[np.bool_]] = []

    def find_or_keep(self, name: str, hashes: NDArray[np.bool_]) -> str | None:
        """Return the name of the twin of a photo with its hash and that of its mirror image, or keep the photo."""
        if self._names:
            differing = hash_distance(hashes, np.stack(self._hashes))
            nearest = int(differing.argmin())
            if differing[nearest] <= self._distance:
                return self._names[nearest]
        self._names.append(name)
        self._hashes.append(hashes[0])
        return None


def _shape_remarks(image: Image.Image, limits: Photos, resolution: int) -> Iterator[Remark]:
    aspect, size = max(image.size) / min(image.size), f"{image.width} x {image.height}"
    if aspect > limits.max_aspect:
        yield Remark("W_IMG_ASPECT", f"{size}: the middle square shows 1/{aspect:.1f} of it; crop it by hand")
    if min(image.size) < resolution:
        yield Remark("W_IMG_ENLARGED", f"{size}: under base.resolution {resolution}, it will be enlarged")


def _quality_remarks(quality: Quality, limits: Photos) -> Iterator[Remark]:
    sharpness, brightness = quality.sharpness, quality.brightness
    if sharpness < limits.min_sharpness:
        text = f"blurred: sharpness {sharpness:.1f}, under photos.min_sharpness {limits.min_sharpness}"
        yield Remark("W_IMG_BLUR", text)
    if brightness < limits.min_brightness:
        text = f"dark: brightness {brightness:.0f} of 255, under photos.min_brightness {limits.min_brightness}"
        yield Remark("W_IMG_DARK", text)
    if brightness > limits.max_brightness:
        text = f"too bright: brightness {brightness:.0f} of 255, above photos.max_brightness {limits.max_brightness}"
        yield Remark("W_IMG_BRIGHT", text)


def _hex(bits: NDArray[np.bool_]) -> str:
    return np.packbits(bits).tobytes().hex()


def _bits(digits: str) -> NDArray[np.bool_]:
    return np.unpackbits(np.frombuffer(bytes.fromhex(digits), dtype=np.uint8))[:63].astype(bool)
