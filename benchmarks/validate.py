"""Measure `validate`: 10 photos of 12 megapixels, and 250, 500, 1,000 photos of one: seconds and peak memory.

`python -m benchmarks.validate`; each count runs in a process of its own, so that its peak is its own.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from dreambooth.models import peak_megabytes
from dreambooth.params import load_params
from stages import validate

LARGE, SMALL = (4000, 3000), (1200, 900)
CASES = ((10, LARGE), (250, SMALL), (500, SMALL), (1000, SMALL))


def make_photos(folder: Path, count: int, size: tuple[int, int]) -> None:
    """Write JPEG photos with detail at every scale, no two of them alike."""
    folder.mkdir(parents=True)
    width, height = size
    for number in range(count):
        rng = np.random.default_rng(number)
        coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
        grain = rng.normal(0, 8, (height // 2, width // 2, 1)).repeat(2, 0).repeat(2, 1)
        pixels = (np.asarray(coarse, dtype=np.float32) + grain).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:04d}.jpg", quality=90)


def measure(count: int, size: tuple[int, int]) -> None:
    """Validate `count` photos and print what it took."""
    params = load_params(Path("params.yaml"))
    wide = params.photos.model_copy(update={"max_count": max(count, params.photos.max_count)})
    params = params.model_copy(update={"photos": wide})
    subject = next(iter(params.subjects))
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        make_photos(root / "data/subjects" / subject, count, size)
        before, start = peak_megabytes(), time.monotonic()
        validate.run(params, subject, root)
        seconds = time.monotonic() - start
    sys.stdout.write(
        f"{count} photos of {size[0]} x {size[1]}: {seconds:.1f} s, {1000 * seconds / count:.0f} ms each, "
        f"peak {peak_megabytes():.0f} MB (before {before:.0f} MB)\n"
    )


def main() -> None:
    """Run every case, or the one of the command line."""
    if len(sys.argv) > 1:
        count, width, height = (int(word) for word in sys.argv[1:])
        measure(count, (width, height))
        return
    for count, (width, height) in CASES:
        arguments = [str(number) for number in (count, width, height)]
        subprocess.run([sys.executable, "-m", "benchmarks.validate", *arguments], check=True)


if __name__ == "__main__":
    main()
