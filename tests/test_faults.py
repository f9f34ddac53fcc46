"""The table of faults and threats says what the tests say."""

import subprocess
import sys
from pathlib import Path

import pytest
from faults import FAULTS, MISSING, TABLE, THREATS, render
from tiny_project import REPOSITORY


@pytest.mark.slow
def test_the_committed_table_is_the_one_that_the_marks_give() -> None:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("faults.py"))],
        cwd=REPOSITORY, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == TABLE.read_text(encoding="utf-8"), "make faults"


def test_a_row_without_a_test_is_printed_as_missing() -> None:
    everything = {("fault", number): ["tests/a.py::b"] for number in FAULTS}
    everything |= {("threat", number): ["tests/a.py::b"] for number in THREATS}
    assert MISSING not in render(everything)
    del everything["fault", 3]
    assert "1 of 69 rows have no test: fault 3." in render(everything)
    assert render(everything).count(MISSING) == 1
