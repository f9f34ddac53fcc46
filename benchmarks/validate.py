"""Measure `validate`: 10 photos of 12 megapixels, and 250, 500, 1,000 photos of one: seconds and peak memory.

    python -m benchmarks.validate [COUNT WIDTH HEIGHT]

Photos are made in a process of their own, so that the peak is that of `validate`.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from dreambooth.params import load_params
from stages import validate

SUBJECT = "biscuit"
LARGE, SMALL = (4000, 3000), (1200, 900)
CASES = ((10, LARGE), (250, SMALL), (500, SMALL), (1000, SMALL))


def make_photos(folder: Path, count: int, size: tuple[int, int]) -> None:
    """Write JPEG photos with detail at every scale, no two of them alike."""
    folder.mkdir(parents=True)
    width, height = size
    for number in range(count):
        rng = np.random.default_rng(number)
        coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize(
            size, Image.Resampling.BICUBIC
        )
        grain = rng.normal(0, 8, (height // 2, width // 2, 1)).repeat(2, 0).repeat(2, 1)
        pixels = (np.asarray(coarse, dtype=np.float32) + grain).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:04d}.jpg", quality=90)


def measure(root: Path, count: int, size: tuple[int, int]) -> None:
    """Validate `count` photos that lie ready and print what it took."""
    params = load_params(Path("params.yaml"))
    wide = params.photos.model_copy(update={"max_count": max(count, params.photos.max_count)})
    params = params.model_copy(update={"photos": wide})
    start, cpu = time.monotonic(), time.process_time()
    validate.run(params, SUBJECT, root)
    seconds, cpu = time.monotonic() - start, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6
    sys.stdout.write(
        f"{count} photos of {size[0]} x {size[1]}: {seconds:.1f} s ({cpu:.1f} s of one core), "
        f"{1000 * cpu / count:.0f} ms of it each, peak {peak:.0f} MB\n"
    )


def main() -> None:
    """Run every case, or the one of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", nargs="*", type=int, metavar="N", help="COUNT WIDTH HEIGHT of one case; else all")
    parser.add_argument("--half", choices=("make", "measure"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if len(given.case) not in (0, 3):
        parser.error("a case is three numbers: COUNT WIDTH HEIGHT")
    if given.half:  # each half of a case is a process of its own
        count, *size = given.case
        _run_half(given.half, given.folder, count, (size[0], size[1]))
        return
    for case in [given.case] if given.case else [[count, *size] for count, size in CASES]:
        with tempfile.TemporaryDirectory() as place:
            for half in ("make", "measure"):
                command = [sys.executable, "-m", "benchmarks.validate", *map(str, case), "--half", half]
                subprocess.run([*command, "--folder", place], check=True)


def _run_half(half: str, root: Path, count: int, size: tuple[int, int]) -> None:
    if half == "make":
        make_photos(root / "data/subjects" / SUBJECT, count, size)
    else:
        measure(root, count, size)


if __name__ == "__main__":
    main()
