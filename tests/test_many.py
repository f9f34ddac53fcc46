"""What commands cost that have nothing to do: the benchmark, at toy size."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_project import REPOSITORY

from benchmarks import many
from benchmarks.usage import CommandError


@pytest.mark.slow
def test_commands_over_two_subjects_and_one_unchanged_run_to_their_end_and_leave_the_home_as_it_was(
    tmp_path: Path,
) -> None:
    home, folder = tmp_path / "home", tmp_path / "folder"
    home.mkdir()
    own = {name: value for name, value in os.environ.items() if not name.startswith(("DVC_", "PREFECT_", "XDG_"))}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.many", "--planned", "2", "--unchanged", "1", "--folder", str(folder)],
        cwd=REPOSITORY, env=own | {"HOME": str(home)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    measured = ["plan, 2 subjects that never ran", "plan, 1 unchanged", "status, 1 unchanged", "retrain, 1 unchanged"]
    assert [line.partition(":")[0] for line in done.stdout.splitlines() if " s of CPU, " in line] == measured
    assert "skipped: unchanged" in (folder / "log").read_text()
    assert not list(home.iterdir())


@pytest.mark.slow
def test_a_server_that_ends_at_its_start_is_told(tmp_path: Path) -> None:
    broken = {**os.environ, "PREFECT_HOME": str(tmp_path), "PREFECT_LOGGING_LEVEL": "no such level"}
    with (
        pytest.raises(CommandError, match=r"^the server of Prefect ended with 1:\n(.*\n)*.*LoggingSettings"),
        many.prefect_server(broken, tmp_path / "log"),
    ):
        pass
