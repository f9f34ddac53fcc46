"""A sweep of the tiny project: real trainings, as experiments of a real DVC in a real repository."""

import csv
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_project import add_photos, make_project, tiny_values
from toy_project import REPOSITORY, dvc

from dreambooth.errors import PipelineError
from dreambooth.params import load_params
from dreambooth.yaml12 import load_yaml
from flows.dvcrun import DvcRunner
from flows.dvcstore import kept_of
from flows.forget import inventory
from flows.graph import Graph
from flows.sweep import _require_known

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
PLACES = ("", " on a blue background", " on a green background")  # words that the bundled scorer knows


@pytest.fixture
def repository(tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project under git with this repository's dvc.yaml and code, whose prompts can be scored."""
    for name in ("GIT_AUTHOR", "GIT_COMMITTER"):
        monkeypatch.setenv(f"{name}_NAME", "Test")
        monkeypatch.setenv(f"{name}_EMAIL", "test@localhost")
    root = make_project(tmp_path / "project", tiny_model_folder, tiny_values())
    for name in ("dreambooth", "stages", "data/base/scorer"):
        shutil.copytree(REPOSITORY / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("dvc.yaml", ".gitignore", "data/classes/README.md"):
        shutil.copy(REPOSITORY / name, root / name)
    lines = [f"recontextualisation,a photo of {{}}{place}" for place in PLACES]
    (root / "data/prompts/bundled/live.csv").write_text("\n".join(["kind,prompt", *lines]) + "\n")
    git(root, "init", "--quiet")
    dvc(root, "init", "--quiet")
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--message", "tiny")
    return root


def git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True, text=True).stdout


def sweep(root: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return command(root, "sweep", "biscuit", *arguments)


def command(root: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    program = [sys.executable, "-m", "flows.cli", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    environment.pop("DREAMBOOTH_SCRATCH", None)
    return subprocess.run(program, cwd=root, env=environment, capture_output=True, text=True, check=False)


def commit_of(root: Path, row: dict[str, str]) -> str:
    return git(root, "for-each-ref", "--format=%(objectname)", f"refs/exps/**/{row['experiment']}").strip()


def trainings(root: Path) -> int:
    """Count the trainings that began, by the log of the sweep."""
    (log,) = (root / ".scratch").glob("sweep-*.log")
    return log.read_text().count("Running stage 'train@biscuit'")


@pytest.mark.nightly
def test_a_sweep_goes_on_after_a_failure_compares_the_rest_and_runs_nothing_twice(repository: Path) -> None:
    with (repository / "params.yaml").open("a") as file:
        file.write("# not committed\n")  # an experiment begins with what lies here
    before = (repository / "params.yaml").read_bytes()
    settings = ("-S", "train.mixed_precision=fp16,no,bf16", "-S", "train.learning_rate=7e-5")
    done = sweep(repository, *settings)
    assert done.returncode == 9, done.stdout + done.stderr
    assert done.stderr.startswith("E_PIPELINE: mixed_precision fp16, learning_rate 7e-05: E_TRAIN: train.mixed_")
    assert len(done.stderr.splitlines()) == 1
    table = repository / "reports/sweep-biscuit-mixed_precision-learning_rate.csv"
    with table.open(newline="") as file:
        failed, *rest = csv.DictReader(file)
    assert failed["error"].startswith("E_TRAIN: ")
    assert [row["train.mixed_precision"] for row in rest] == ["no", "bf16"]
    assert all(float(row["identity_low"]) <= float(row["identity_gain"]) <= float(row["identity_high"]) for row in rest)
    assert all(row["prompt_gain"] and row["pres_rise"] and row["copies"] and row["train_seconds"] for row in rest)
    assert table.with_suffix(".png").is_file()
    for row, outcome in ((failed, "E_TRAIN"), *((row, "done") for row in rest)):  # no column is cut
        assert re.search(
            rf"^{row['experiment']} +biscuit +{row['train.mixed_precision']} .* {outcome} *$", done.stdout, re.M
        )
    # The folder is as it was: experiments ran elsewhere, with the scratch folder of this one.
    assert (repository / "params.yaml").read_bytes() == before
    assert git(repository, "status", "--porcelain") == " M params.yaml\n"
    assert (repository / ".scratch/latents").is_dir()
    assert not (repository / "models").exists()

    # Once more: only what failed is tried again, and the times are those of the first call.
    assert trainings(repository) == 3
    again = sweep(repository, *settings)
    assert again.stdout.count("ran before") == 2
    assert trainings(repository) == 4
    with table.open(newline="") as file:
        assert list(csv.DictReader(file))[1:] == rest

    # Who forgets the subject finds it in the experiments, and the tables.
    lock = load_yaml(git(repository, "show", f"{commit_of(repository, rest[0])}:dvc.lock"))
    (training,) = lock["stages"]["train@biscuit"]["outs"]
    assert training["md5"] in kept_of(repository, "biscuit").objects
    found = {path.name for path in inventory(repository, "biscuit").paths}
    assert {table.name, f"{table.stem}.png", f"{table.stem}.log"} <= found

    # One is taken over: its values alone, and its training without training again.
    assert "dvc exp apply" not in done.stdout
    chosen = next(line for line in done.stdout.splitlines() if "sweep --apply" in line)
    name = chosen.partition("sweep --apply ")[2].partition(",")[0]
    applied = command(repository, "sweep", "--apply", name)
    assert applied.returncode == 0, applied.stderr
    assert "params.yaml: train.learning_rate: 0.0001 -> 7e-05" in applied.stdout
    assert load_params(repository / "params.yaml").train.learning_rate == 7e-5
    assert "# not committed" in (repository / "params.yaml").read_text()
    assert git(repository, "status", "--porcelain") == " M params.yaml\n"
    runner = DvcRunner(repository)
    stages = [stage for stage in Graph.load(repository).select(["biscuit"]).stale if not stage.is_data]
    outcomes = {stage.name: runner.run(stage.name, lambda line: None).outcome for stage in stages}
    assert {one for one, outcome in outcomes.items() if outcome == "ran"} == {"report@biscuit", "export@biscuit"}


def test_what_neither_git_nor_dvc_knows_is_named_before_any_work(repository: Path) -> None:
    add_photos(repository / "data/subjects/rex", 3)
    loose = sweep(repository, "-S", "train.seed=1,2")
    assert loose.returncode == 9
    assert "E_PIPELINE: neither git nor DVC knows data/subjects/rex/, so that no experiment" in loose.stderr
    files = "data/subjects/rex.dvc", "data/subjects/.gitignore"
    assert f"see it; dvc add data/subjects/rex, then git add {' '.join(files)} (no commit is needed)" in loose.stderr
    dvc(repository, "add", "--quiet", "data/subjects/rex")
    git(repository, "add", *files)
    _require_known(repository, load_params(repository / "params.yaml"), ["rex"])
    assert not (repository / "reports").exists()
    shutil.rmtree(repository / ".git")
    assert "has no commit of git" in sweep(repository, "-S", "train.seed=1,2").stderr


def test_what_add_tells_git_to_take_is_what_a_sweep_lacks_of_the_subject(repository: Path, tmp_path: Path) -> None:
    add_photos(tmp_path / "camera", 3, first=9)
    added = command(repository, "add", "rex", str(tmp_path / "camera"), "--class-noun", "dog", "--kind", "live")
    assert added.returncode == 0, added.stderr
    assert "\nFor git: git add params.yaml data/subjects/.gitignore data/subjects/rex.dvc\n" in added.stdout
    params = load_params(repository / "params.yaml")
    with pytest.raises(PipelineError) as refused:
        _require_known(repository, params, ["rex"])
    files = "data/subjects/.gitignore", "data/subjects/rex.dvc"
    assert f"knows {', '.join(files)}, so" in str(refused.value)
    assert f"; git add {' '.join(files)} (no commit is needed)" in str(refused.value)
    git(repository, "add", "params.yaml", *files)
    _require_known(repository, params, ["rex"])
