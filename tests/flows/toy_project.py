"""What the tests of the flows do with a toy project: draw photos, call dvc, read which stages ran."""

import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

REPOSITORY = Path(__file__).resolve().parents[2]


def make_photos(folder: Path, count: int, seed: int = 0) -> list[Path]:
    """Draw photos that no perceptual hash takes for one another."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number in range(count):
        picture = Image.new("RGB", (96, 96), "white")
        corner = 8 * ((3 * number + seed) % 8)
        draw = ImageDraw.Draw(picture)
        draw.ellipse((corner, 4 + 9 * number, corner + 24 + 8 * number, 40 + 9 * number), fill=(200, 40 * number, 20))
        draw.rectangle((70 - 20 * number, 60, 90 - 20 * number, 60 + 10 * number + 5), fill="navy")
        paths.append(folder / f"photo {number}.png")
        picture.save(paths[-1])
    return paths


def dvc(root: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run the dvc command as a person would, in the environment of these tests."""
    from flows.dvcrun import child_environment

    return subprocess.run(
        [sys.executable, "-m", "dvc", *arguments],
        cwd=root,
        env=child_environment(),
        capture_output=True,
        text=True,
        check=True,
    )


def ran(root: Path) -> list[str]:
    """Return which stages ran since the last call."""
    log = root / "ran.log"
    stages = log.read_text().splitlines() if log.exists() else []
    log.unlink(missing_ok=True)
    return stages


def quiet(prefect_home: Path) -> dict[str, str]:
    """Return an environment in which prefect keeps to one folder and reports nothing."""
    return {
        **os.environ,
        "PREFECT_HOME": str(prefect_home),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
    }


def await_true(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it did not happen within 60 s"
        time.sleep(0.1)


def await_health(address: str, log: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(address, timeout=2):
                return
        except OSError:
            time.sleep(0.3)
    pytest.fail(f"the server did not start: {log.read_text()[-2000:]}")
