"""What commands cost that have nothing to do: the benchmark, at toy size."""

from pathlib import Path

import pytest

from benchmarks import many


@pytest.mark.slow
def test_commands_over_two_subjects_and_one_unchanged_run_to_their_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    many.measure(tmp_path, planned=2, unchanged=1)
    said = capsys.readouterr().out
    measured = ["plan, 2 subjects that never ran", "plan, 1 unchanged", "status, 1 unchanged", "retrain, 1 unchanged"]
    assert [line.partition(":")[0] for line in said.splitlines() if " s of CPU, " in line] == measured
    assert "skipped: unchanged" in (tmp_path / "log").read_text()
