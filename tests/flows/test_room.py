"""A run whose outputs find no room: refused where earlier runs tell their sizes, not where they are guesses."""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml
from test_cli import dreambooth
from toy_project import dvc, ran

from dreambooth.folders import DiskFullError
from flows.graph import Graph
from flows.plan import NO_ROOM
from flows.room import known_sizes, require_room

ABOVE = {"prior@dog": [], "train@rex": ["prior@dog"], "export@rex": ["train@rex"], "train@tom": ["prior@dog"]}
SIZES = {"prior@dog": 5, "train@rex": 100, "export@rex": 300}


def sizes(reasons: Mapping[str, list[str]]) -> dict[str, float]:
    every = Graph.of(ABOVE, reasons, SIZES)
    return known_sizes(every, every)


@pytest.mark.parametrize("reason", ["train.learning_rate modified", "dreambooth/trainer.py modified"])
def test_what_is_made_again_is_as_large_as_it_was(reason: str) -> None:
    assert sizes({"train@rex": [reason]}) == {"train@rex": 100, "export@rex": 300}


@pytest.mark.parametrize(
    "reason",
    [
        "train.method modified",
        "train modified",
        "data/base modified",
        "models/rex deleted",
        "never ran",
        "train.rank new",
    ],
)
def test_what_may_become_larger_or_smaller_is_a_guess_and_so_is_what_is_made_from_it(reason: str) -> None:
    assert sizes({"train@rex": [reason]}) == {}
    assert sizes({"prior@dog": [reason], "train@tom": ["never ran"]}) == {}


def test_what_never_ran_is_as_large_as_that_of_another_subject_that_is_up_to_date() -> None:
    assert sizes({"train@tom": ["never ran"]}) == {"train@tom": 100}
    every = Graph.of(ABOVE, {"train@tom": ["never ran"]}, SIZES)
    assert known_sizes(every, every.select(["tom"])) == {"train@tom": 100}  # of one that does not run now


def leave_free(monkeypatch: pytest.MonkeyPatch, count: float) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 0, int(count)))


def change(project: Path, name: str, value: object) -> None:
    params = yaml.safe_load((project / "params.yaml").read_text())
    params["train"][name] = value
    (project / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))


@pytest.mark.slow
@pytest.mark.fault(20)
def test_a_run_without_room_is_refused_before_its_first_stage_if_earlier_runs_tell_sizes_and_else_warned_about(
    project: Path, monkeypatch: pytest.MonkeyPatch, prefect_server: str
) -> None:
    full = "import shutil; shutil.disk_usage = lambda path: shutil._ntuple_diskusage(10, 9, 1)"
    (project / "fail-prior-dog").touch()
    guessed = dreambooth(project, "run", "rex", before=full, PREFECT_API_URL=prefect_server)
    assert re.search(rf"WARNING .*plan: {NO_ROOM}", guessed.stderr)
    assert "prior@dog" in ran(project)  # nobody knows what it needs, so it is tried
    (project / "fail-prior-dog").unlink()
    dvc(project, "repro")
    ran(project)
    change(project, "learning_rate", 2.0e-4)
    graph = Graph.load(project)
    needed = sum(stage.size for stage in graph.stale)
    leave_free(monkeypatch, needed)
    require_room(project, graph, graph)
    leave_free(monkeypatch, needed - 1)
    with pytest.raises(DiskFullError, match=rf"8 stages need {needed:,} bytes, .* {needed - 1:,} are free; make room"):
        require_room(project, graph, graph)
    done = dreambooth(project, "run", "rex", before=full, PREFECT_API_URL=prefect_server)
    assert done.returncode != 0
    assert "E_DISK_FULL: " in done.stderr, done.stderr
    assert "the outputs of 4 stages need" in " ".join(done.stderr.split())
    assert ran(project) == []
    change(project, "method", "lora")  # whose weights are another size, which nobody knows
    graph = Graph.load(project)
    require_room(project, graph, graph)


def test_the_room_is_that_of_the_cache_of_dvc_wherever_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []

    def usage(path: Path) -> object:
        asked.append(path)
        return shutil._ntuple_diskusage(10, 9, 1000)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    (tmp_path / "project/.dvc").mkdir(parents=True)
    (tmp_path / "disk").mkdir()
    every = Graph.of(ABOVE, {"train@rex": ["train.seed modified"]}, SIZES)
    require_room(tmp_path / "project", every, every)
    (tmp_path / "project/.dvc/config.local").write_text(f"[cache]\n    dir = {tmp_path / 'disk'}\n")
    require_room(tmp_path / "project", every, every)
    assert asked == [tmp_path / "project/.dvc", tmp_path / "disk"]
