"""How time and memory grow: with photos, steps, class images, subjects and registered versions; cost a subject of many.

    python -m benchmarks.growth [TABLE ...] [--largest 1000]

Tables: photos steps class-images subjects versions together. Random pipeline of the tests, whose model hardly computes:
what grows is the work around it. Every number is that of a whole process, as a person calls it. Appended to
benchmarks/results/<date>-growth.md table after table, so a stop loses the one at hand. The longest rows are those of
1,000: class images, and versions, each of which is a copy (half a second and 2.4 MB: 8 minutes and 2.4 GB of TMPDIR).

Beside each stands its floor: the imports that the command cannot do without, and its arithmetic or its bytes over a
measured peak of this machine.
"""

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property, partial
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks import usage
from benchmarks.bench import hardware
from benchmarks.floors import (
    TRAINING,
    Work,
    count_work,
    decode_seconds,
    hash_seconds,
    import_seconds,
    parse_seconds,
    peak_flops,
    write_speed,
)
from benchmarks.recipe import ROOT
from benchmarks.usage import Usage

sys.path.insert(0, str(ROOT / "tests"))  # its tiny pipeline and project


tiny_pipelines, tiny_project = import_module("tiny_pipelines"), import_module("tiny_project")

SUBJECT, CLASS = "biscuit", "dog"
SAMPLER_STEPS, TRAIN_BATCH_SIZE = 2, 2
_TABLES = "import pandas, pydantic, ruamel.yaml, PIL.Image"
_DVC = "import dvc.repo"
_MLFLOW = "import mlflow"
_FLOW = "import prefect.flows, dvc.repo, mlflow"


@dataclass(frozen=True)
class Row:
    """What one command cost."""

    count: int
    """How many there are."""
    what: str
    """What was run."""
    cost: Usage
    floor: float
    """Seconds."""


class Place:
    """A folder for the projects of one table, and the environment of what runs in them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder / "log"
        self.base = tiny_pipelines.write_sd(folder / "tiny")
        self._imports: dict[str, float] = {}

    def imports(self, program: str) -> float:
        """Return the seconds of a process that does nothing but import."""
        if program not in self._imports:
            self._imports[program] = import_seconds(program)
        return self._imports[program]

    def computing(self, steps: int = 0, images: int = 0) -> float:
        """Return the least seconds of a stage that trains so many steps or draws so many class images."""
        flop = steps * self._work.step + images * self._work.image(SAMPLER_STEPS)
        return self.imports(TRAINING) + flop / self._flops

    @cached_property
    def write(self) -> float:
        """Bytes a second to the disk."""
        return write_speed(self.folder)

    @cached_property
    def _flops(self) -> float:
        return peak_flops("no")

    @cached_property
    def _work(self) -> Work:
        return count_work(self.base, TRAIN_BATCH_SIZE, tiny_project.TINY_RESOLUTION)

    def project(self, name: str, change: Callable[[dict[str, Any]], object] = lambda values: None) -> Path:
        """Make a project of one subject with five photos."""
        values = tiny_project.tiny_values()
        values["prior"] |= {"num_inference_steps": SAMPLER_STEPS}
        values["train"] |= {"train_batch_size": TRAIN_BATCH_SIZE}
        values["photos"] |= {"max_count": 10**4, "min_distance": 0.0, "duplicate_distance": 0}
        change(values)
        made: Path = tiny_project.make_project(self.folder / name, self.base, values)
        return made

    def run(self, root: Path, *command: str) -> Usage:
        """Run a module of this repository in a project."""
        return self.python(root, "-m", *command)

    def python(self, root: Path, *arguments: str) -> Usage:
        """Run Python in a project."""
        own = {
            "PYTHONPATH": str(ROOT),
            "DREAMBOOTH_CACHE": str(root / ".cache"),
            "PREFECT_HOME": str(self.folder / "prefect"),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "DVC_SITE_CACHE_DIR": str(self.folder / "dvc"),
            "DVC_NO_ANALYTICS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        environment = {**os.environ, **own}
        environment.pop("DREAMBOOTH_TRACKING", None)
        return usage.run([sys.executable, *arguments], root, environment, self.log)


def photos(place: Place, largest: int) -> Iterator[Row]:
    """Validate photos, and train two steps on them: each is encoded once."""
    for count in _up_to(largest, 3, 30, 300):
        root = place.project(f"photos-{count}", partial(_train, 2))
        shutil.rmtree(root / "data/subjects" / SUBJECT)
        tiny_project.add_photos(root / "data/subjects" / SUBJECT, count)
        reading = place.imports(_TABLES) + decode_seconds(sorted((root / "data/subjects" / SUBJECT).iterdir()))
        yield Row(count, "validate", place.run(root, "stages.validate", SUBJECT), reading)
        place.run(root, "stages.prior", CLASS)
        yield Row(count, "train", place.run(root, "stages.train", SUBJECT), place.computing(steps=2))


def steps(place: Place, largest: int) -> Iterator[Row]:
    """Train."""
    for count in _up_to(largest, 10, 100, 1000):
        root = place.project(f"steps-{count}", partial(_train, count))
        place.run(root, "stages.validate", SUBJECT)
        place.run(root, "stages.prior", CLASS)
        yield Row(count, "train", place.run(root, "stages.train", SUBJECT), place.computing(steps=count))


def class_images(place: Place, largest: int) -> Iterator[Row]:
    """Draw class images, find them again, and train two steps beside them."""
    for count in _up_to(largest, 16, 128, 1000):

        def change(values: dict[str, Any], n: int = count) -> None:
            values["prior"] |= {"num_class_images": n, "batch_size": 16}
            values["train"] |= {"max_train_steps": 2}

        root = place.project(f"classes-{count}", change)
        place.run(root, "stages.validate", SUBJECT)
        yield Row(count, "prior, drawn", place.run(root, "stages.prior", CLASS), place.computing(images=count))
        found = place.imports(_TABLES) + hash_seconds([path for path in root.glob(".cache/**/*") if path.is_file()])
        yield Row(count, "prior, found", place.run(root, "stages.prior", CLASS), found)
        yield Row(count, "train", place.run(root, "stages.train", SUBJECT), place.computing(steps=2))


def subjects(place: Place, largest: int) -> Iterator[Row]:
    """Ask for the state of so many subjects, none of which ever ran."""
    for count in _up_to(largest, 1, 10, 100, 1000):
        root = _many(place, f"subjects-{count}", count)
        floor = place.imports(_DVC) + parse_seconds(root / "params.yaml")
        yield Row(count, "status", place.run(root, "flows.cli", "status"), floor)
        yield Row(count, "plan", place.run(root, "flows.cli", "plan"), floor)
        yield Row(count, "dvc status", place.run(root, "dvc", "status"), floor)


def versions(place: Place, largest: int) -> Iterator[Row]:
    """Register exports, and list the versions."""
    program = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); from registered import write_export;"
        "from dreambooth.registry import register; root = Path.cwd()\n"
        "for i in range(int(sys.argv[3]), int(sys.argv[4])): write_export(root, Path(sys.argv[2]), f'{i:064x}');"
        "register(root, 'biscuit')"
    )
    root, before = place.project("versions"), 0
    (root / "dvc.yaml").write_text("stages: {}\n")
    script = place.folder / "register_many.py"
    script.write_text(program)

    for count in _up_to(largest, 1, 10, 100, 1000):
        arguments = (str(ROOT / "tests"), str(place.base), str(before), str(count))
        cost = place.python(root, str(script), *arguments)
        written = (count - before) * sum(path.stat().st_size for path in place.base.rglob("*.*")) / place.write
        yield Row(count, f"register {count - before} more", cost, place.imports(_MLFLOW) + written)
        before = count
        listed = place.run(root, "flows.cli", "versions", SUBJECT)
        yield Row(count, "versions", listed, place.imports(_MLFLOW))


def together(place: Place, largest: int) -> Iterator[Row]:
    """Run so many subjects of one class at once, from photos to registered versions; then again with nothing to do."""
    for count in _up_to(largest, 1, 2, 4):
        root = _many(place, f"together-{count}", count)
        # prior once, train and evaluate of each load a model: side by side, a core each
        loading = (1 + 2 * count) * place.imports(TRAINING) / min(count, os.cpu_count() or 1)
        yield Row(count, "run", place.run(root, "flows.cli", "run"), loading)
        yield Row(count, "run, up to date", place.run(root, "flows.cli", "run"), place.imports(_FLOW))


TABLES = {
    "photos": photos, "steps": steps, "class-images": class_images, "subjects": subjects, "versions": versions,
    "together": together,
}  # fmt: skip


def _many(place: Place, name: str, count: int) -> Path:
    """Make a project of so many subjects with this repository's stages under DVC."""
    names = [f"subject-{number:04d}" for number in range(count)]

    def change(values: dict[str, Any]) -> None:
        values["subjects"] = {one: {"class_id": CLASS, "identifier": "sks", "kind": "live"} for one in names}

    root = place.project(name, change)
    shutil.rmtree(root / "data/subjects")
    for number, one in enumerate(names):
        tiny_project.add_photos(root / "data/subjects" / one, 3, first=3 * number)
    for folder in ("dreambooth", "stages"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "dvc.yaml", root)
    place.run(root, "dvc", "init", "--no-scm", "--quiet")
    return root


def _train(count: int, values: dict[str, Any]) -> None:
    values["train"] |= {"max_train_steps": count}


def _up_to(largest: int, *counts: int) -> list[int]:
    return [count for count in counts if count <= largest]


def markdown(name: str, rows: Sequence[Row]) -> str:
    """Lay a table out: what was run, how many there were, its cost, its floor, and what each one more cost."""
    lines = [
        f"## {name}", "",
        "| what | how many | wall s | floor s | wall / floor | CPU s | peak MB | CPU ms for each one more |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for what in dict.fromkeys(row.what for row in rows):
        before: Row | None = None
        for row in (row for row in rows if row.what == what):
            cost, told = row.cost, "-"
            if before is not None:
                told = f"{1000 * (cost.cpu - before.cost.cpu) / (row.count - before.count):.0f}"
            lines.append(
                f"| {what} | {row.count} | {cost.wall:.1f} | {row.floor:.2f} | {cost.wall / row.floor:.1f} "
                f"| {cost.cpu:.1f} | {cost.memory:.0f} | {told} |"
            )
            before = row
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> Path:
    """Measure the tables that are asked for; append each to the results when it is finished."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", choices=[[], *TABLES], default=[], metavar="TABLE")
    parser.add_argument("--largest", type=int, default=1000, help="no more of anything than this")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    given = parser.parse_args(arguments)
    path = Path(given.out) / f"{datetime.now(UTC):%Y-%m-%d}-growth.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        path.write_text(
            f"# Growth\n\n{hardware()}. Tiny random pipeline of the tests; whole processes, as a person calls them.\n",
            encoding="utf-8",
        )
    for name in given.tables or TABLES:
        with tempfile.TemporaryDirectory(prefix="growth-") as folder:
            rows = list(TABLES[name](Place(Path(folder)), given.largest))
        with path.open("a", encoding="utf-8") as file:
            file.write("\n" + markdown(name, rows))
    return path


if __name__ == "__main__":
    main()
