"""Throw mutated photos at `open_photo`: each is a picture or one line with a code, in bounded time and memory.

    python -m benchmarks.fuzz [COUNT] [SEED]

10,000 files without arguments. The same seed gives the same files.
"""

import argparse
import io
import re
import resource
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from dreambooth.images import UnusableError, open_photo
from dreambooth.params import Photos, load_params

SLOWEST = 10.0  # seconds that one file may take
Mutation = Callable[[bytearray, np.random.Generator], bytes]


def seeds() -> list[bytes]:
    """Return whole photos of every format and mode, from which the others are made."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (80, 96, 3), dtype=np.uint8))
    grey16 = Image.fromarray(rng.integers(0, 65536, (80, 96)).astype(np.uint16))
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "words"
    exif.get_ifd(0x8825)[1] = "N"
    xmp = b"<x:xmpmeta xmlns:x='adobe:ns:meta/'>exif:GPSLatitude</x:xmpmeta>"
    made = [
        _encoded(noise, "JPEG", exif=exif, xmp=xmp, comment=b"words"),
        _encoded(noise, "JPEG", progressive=True, quality=30),
        _encoded(noise.convert("CMYK"), "JPEG"),
        _encoded(noise.convert("L"), "JPEG"),
        _encoded(noise, "PNG", exif=exif),
        _encoded(noise.convert("RGBA"), "PNG"),
        _encoded(noise.convert("P"), "PNG", transparency=3),
        _encoded(grey16, "PNG"),
        _encoded(noise, "PNG", save_all=True, append_images=[noise.rotate(90), noise.rotate(180)]),
        _encoded(noise, "WEBP", exif=exif),
        _encoded(noise.convert("RGBA"), "WEBP", lossless=True),
        _encoded(noise, "WEBP", save_all=True, append_images=[noise.rotate(90)], lossless=True),
    ]
    return made


def mutated(count: int, seed: int) -> Iterator[bytes]:
    """Yield `count` files, each a photo with one to four mutations."""
    originals = seeds()
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        content = originals[int(rng.integers(len(originals)))]
        for _ in range(int(rng.integers(1, 5))):
            content = MUTATIONS[int(rng.integers(len(MUTATIONS)))](bytearray(content or b"\0"), rng)
        yield content


def run(count: int, seed: int, limits: Photos, folder: Path) -> Counter[str]:
    """Open `count` mutated files and count what became of them.

    Raises:
        RuntimeError: a file that took too long, a picture that is none, or a code that is not documented.
        Exception: whatever is no UnusableError is a fault of ours.
    """
    outcomes: Counter[str] = Counter()
    path = folder / "photo.jpg"
    for number, content in enumerate(mutated(count, seed)):
        path.write_bytes(content)
        start = time.monotonic()
        outcome, sound = _outcome(path, limits)
        if not sound or time.monotonic() - start > SLOWEST:
            raise RuntimeError(f"file {number} of seed {seed}: {outcome} after {time.monotonic() - start:.1f} s")
        outcomes[outcome] += 1
    return outcomes


def main() -> None:
    """Fuzz and print what became of the files, the time and the memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", nargs="?", type=int, default=10_000, help="files")
    parser.add_argument("seed", nargs="?", type=int, default=0)
    given = parser.parse_args()
    limits, start = load_params(Path("params.yaml")).photos, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        outcomes = run(given.count, given.seed, limits, Path(folder))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6
    told = ", ".join(f"{code} {number}" for code, number in outcomes.most_common())
    sys.stdout.write(f"{given.count} files in {time.monotonic() - start:.0f} s, peak {peak:.0f} MB: {told}\n")


@cache
def photo_codes() -> frozenset[str]:
    """Return the codes of photos that docs/photos.md explains."""
    told = (Path(__file__).resolve().parents[1] / "docs/photos.md").read_text(encoding="utf-8")
    return frozenset(re.findall(r"^\| `([EW]_[A-Z_]+)` \| .+ \|$", told, re.MULTILINE))


def _outcome(path: Path, limits: Photos) -> tuple[str, bool]:
    """Open one file; return what became of it, and whether that is what it should be."""
    try:
        picture = open_photo(path, limits).image
    except UnusableError as error:
        return error.code, error.code in photo_codes() and str(error).isprintable()
    is_sound = picture.mode == "RGB" and picture.width * picture.height <= limits.max_pixels and not picture.info
    return "picture", is_sound


def _encoded(image: Image.Image, format_name: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_name, **options)
    return buffer.getvalue()


def _flip(content: bytearray, rng: np.random.Generator) -> bytes:
    for place in rng.integers(0, len(content), int(rng.integers(1, 20))):
        content[place] ^= 1 << int(rng.integers(8))
    return bytes(content)


def _flip_head(content: bytearray, rng: np.random.Generator) -> bytes:
    for place in rng.integers(0, min(len(content), 64), int(rng.integers(1, 4))):
        content[place] = int(rng.integers(256))
    return bytes(content)


def _cut(content: bytearray, rng: np.random.Generator) -> bytes:
    return bytes(content[: int(rng.integers(len(content)))])


def _remove(content: bytearray, rng: np.random.Generator) -> bytes:
    start = int(rng.integers(len(content)))
    del content[start : start + int(rng.integers(1, 200))]
    return bytes(content)


def _repeat(content: bytearray, rng: np.random.Generator) -> bytes:
    start = int(rng.integers(len(content)))
    piece = content[start : start + int(rng.integers(1, 400))]
    return bytes(content[:start] + piece * int(rng.integers(2, 30)) + content[start:])


def _random(content: bytearray, rng: np.random.Generator) -> bytes:
    start = int(rng.integers(len(content)))
    content[start : start + 60] = rng.bytes(60)
    return bytes(content)


def _append(content: bytearray, rng: np.random.Generator) -> bytes:
    return bytes(content) + [b"PK\x03\x04", b"<script>", b"%PDF-1.7", rng.bytes(300)][int(rng.integers(4))]


def _numbers(content: bytearray, rng: np.random.Generator) -> bytes:
    """Write an extreme number where a size, a length or an offset may stand."""
    start = int(rng.integers(len(content)))
    content[start : start + 4] = [b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"\0\x01\0\0"][int(rng.integers(4))]
    return bytes(content)


def _png_size(content: bytearray, rng: np.random.Generator) -> bytes:
    """State another size in a PNG's header, with a checksum that fits."""
    if content[12:16] != b"IHDR" or len(content) < 33:
        return bytes(content)
    for place in (16, 20):
        content[place : place + 4] = int(rng.choice([1, 64, 5000, 70_000, 2**31 - 1])).to_bytes(4, "big")
    content[29:33] = zlib.crc32(bytes(content[12:29])).to_bytes(4, "big")
    return bytes(content)


MUTATIONS: tuple[Mutation, ...] = (
    _flip, _flip_head, _cut, _remove, _repeat, _random, _append, _numbers, _png_size,
)  # fmt: skip

if __name__ == "__main__":
    main()
