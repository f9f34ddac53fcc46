"""What scripts rely on, codes and exit codes, and what a machine may be told by variables, is documented as it is."""

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_project import REPOSITORY

from benchmarks.fuzz import photo_codes
from dreambooth.errors import MACHINE_FAULT, DreamboothError

SOURCES = sorted(path for folder in ("dreambooth", "stages", "flows") for path in (REPOSITORY / folder).glob("*.py"))


def kinds(kind: type[DreamboothError]) -> Iterator[type[DreamboothError]]:
    yield kind
    for below in kind.__subclasses__():
        yield from kinds(below)


def test_every_code_is_documented_with_its_exit_code_and_no_other() -> None:
    for path in SOURCES:
        if re.search(r"^class \w+\(\w*Error\)", path.read_text(), re.MULTILINE):
            importlib.import_module(f"{path.parent.name}.{path.stem}")
    known = {kind.code: kind.exit_code for kind in kinds(DreamboothError) if kind.__module__.startswith("dreambooth")}
    machine = set(re.findall(r'f"(E_[A-Z_]+): ', (REPOSITORY / "dreambooth/errors.py").read_text()))
    known |= dict.fromkeys(machine, MACHINE_FAULT)
    rows = re.findall(r"^\| `(E_[A-Z_]+)` \| (\d+) \|", (REPOSITORY / "docs/errors.md").read_text(), re.MULTILINE)
    assert {code: int(number) for code, number in rows} == known
    assert len(rows) == len(known)
    named = {code for path in SOURCES for code in re.findall(r'"(E_[A-Z_]*[A-Z])[:"]', path.read_text())}
    assert named <= set(known) | photo_codes()


def test_every_variable_of_ours_is_documented() -> None:
    used = {name for path in SOURCES for name in re.findall(r'"(DREAMBOOTH_[A-Z_]+)"', path.read_text())}
    table = re.findall(r"^\| `(\w+)` \|", (REPOSITORY / "docs/operations.md").read_text(), re.MULTILINE)
    assert len(used) > 7
    assert used == {name for name in table if name.startswith("DREAMBOOTH_")}


@pytest.mark.slow
@pytest.mark.parametrize("wanted", ["", "1"])
def test_a_stage_shows_a_traceback_if_it_is_asked_to_and_its_line_and_code_in_any_case(
    project: Path, wanted: str
) -> None:
    environment = {**os.environ, "DREAMBOOTH_DEBUG": wanted, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-m", "stages.validate", "nosuch"], cwd=project, env=environment, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 3
    assert done.stderr.splitlines()[-1].startswith("E_SUBJECT: ")
    assert ("Traceback" in done.stderr) == bool(wanted)
