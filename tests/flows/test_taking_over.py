"""`dreambooth sweep --apply` writes the values of one experiment into params.yaml, and touches nothing else."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from ruamel.yaml import YAML
from test_cli import dreambooth
from toy_project import REPOSITORY

from dreambooth import sweeps
from dreambooth.errors import ParamsError, PipelineError
from dreambooth.params import load_params
from dreambooth.sweeps import Result
from flows.presets import Change
from flows.sweep import take_over

WON = {"train.learning_rate": 5e-5, "train.snr_gamma": None, "evaluate.seeds": [7], "classes.dog.class_noun": "puppy"}
CHANGED = ("learning_rate", "snr_gamma", "seeds", "class_noun")


@pytest.fixture
def root(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a project under git with the table of a sweep and its two experiments: one done, one failed."""
    for name in ("GIT_AUTHOR", "GIT_COMMITTER"):
        monkeypatch.setenv(f"{name}_NAME", "Test")
        monkeypatch.setenv(f"{name}_EMAIL", "test@localhost")
    shutil.copy(REPOSITORY / "params.yaml", project / "params.yaml")
    text = (project / "params.yaml").read_text().replace("snr_gamma: null", "snr_gamma: 5.0  # of Hang et al.")
    (project / "params.yaml").write_text(text)
    (project / ".dvc/config").write_text("")  # not without an SCM any more
    (project / ".gitignore").write_text("reports/\n")
    git(project, "init", "--quiet")
    git(project, "add", "--all")
    git(project, "commit", "--quiet", "--message", "before")
    _write_as_an_experiment(project)
    git(project, "commit", "--quiet", "--all", "--message", "an experiment")
    git(project, "update-ref", "refs/exps/ab/cdef/sweep-0123456789", "HEAD")
    git(project, "reset", "--quiet", "--hard", "HEAD^")
    measures = {"identity_gain": 0.1}
    rows = [Result("sweep-0123456789", one, WON, measures) for one in ("biscuit", "chime")]
    failed = Result("sweep-aaaaaaaaaa", "biscuit", WON, {}, error="E_TRAIN: no")
    gone = Result("sweep-bbbbbbbbbb", "biscuit", WON, measures)
    (project / "reports").mkdir()
    (project / "reports/sweep-x.csv").write_text(sweeps.csv_text([*rows, failed, gone]))
    return project


def git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True, text=True).stdout


def _write_as_an_experiment(root: Path) -> None:
    """Write params.yaml as `dvc exp run -S` does, null as nothing, with one value that no sweep changed."""
    yaml = YAML()
    content = yaml.load(root / "params.yaml")
    content["train"] |= {"learning_rate": 5e-5, "snr_gamma": None, "max_train_steps": 9}
    content["evaluate"]["seeds"] = [7]
    content["classes"]["dog"]["class_noun"] = "puppy"
    yaml.dump(content, root / "params.yaml")


def test_only_the_values_of_the_sweep_are_written_and_comments_null_and_lists_stay(root: Path) -> None:
    (root / "data/note.txt").write_text("staged before\n")
    git(root, "add", "data/note.txt")
    before, status = (
        (root / "params.yaml").read_text().splitlines(),
        git(root, "status", "--porcelain", "--untracked-files=no"),
    )
    changes, subjects = take_over(root, "sweep-0123456789")
    assert subjects == ("biscuit", "chime")
    assert changes == [
        Change("train.learning_rate", 1e-4, 5e-5),
        Change("train.snr_gamma", 5.0, None),
        Change("evaluate.seeds", [1000, 1001], [7]),
        Change("classes.dog.class_noun", "dog", "puppy"),
    ]
    after = (root / "params.yaml").read_text().splitlines()
    changed = [(one, other) for one, other in zip(before, after, strict=True) if one != other]
    assert {other.split(":")[0].strip() for _, other in changed} == set(CHANGED)
    assert re.search(r"^  snr_gamma: null +# of Hang et al\.$", "\n".join(after), re.M)
    assert load_params(root / "params.yaml").train.max_train_steps == 450  # of the experiment alone
    now = git(root, "status", "--porcelain", "--untracked-files=no")
    assert now == status + " M params.yaml\n"  # what was staged still is
    assert take_over(root, "sweep-0123456789")[0] == []


def test_what_cannot_be_taken_over_is_named_and_leaves_the_file_as_it_was(root: Path) -> None:
    before = (root / "params.yaml").read_bytes()
    for experiment, complaint in (
        ("sweep-cccccccccc", r"there is no experiment 'sweep-cccccccccc' in reports/sweep-x\.csv"),
        ("sweep-aaaaaaaaaa", r"sweep-aaaaaaaaaa failed \(E_TRAIN: no\)"),
        ("sweep-bbbbbbbbbb", "git has no experiment sweep-bbbbbbbbbb any more"),
    ):
        with pytest.raises(PipelineError, match=complaint):
            take_over(root, experiment)
    (root / "params.yaml").write_bytes(before.replace(b"  seeds: [1000, 1001]\n", b""))
    with pytest.raises(ParamsError, match=r"evaluate\.seeds: unknown, but sweep-0123456789 sets it"):
        take_over(root, "sweep-0123456789")
    shutil.rmtree(root / "reports")
    with pytest.raises(PipelineError, match="in reports/, where no sweep left a table"):
        take_over(root, "sweep-0123456789")


def test_the_command_says_each_change_and_the_next_step(root: Path) -> None:
    done = dreambooth(root, "sweep", "--apply", "sweep-0123456789")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "params.yaml: train.learning_rate: 1.0e-4 -> 5e-05"
    assert lines[4].startswith("Next: dreambooth run biscuit chime, ")
    again = dreambooth(root, "sweep", "--apply", "sweep-0123456789")
    assert again.stdout.startswith("params.yaml says what sweep-0123456789 says already")
    mixed = dreambooth(root, "sweep", "biscuit", "--apply", "sweep-0123456789")
    assert (mixed.returncode, "stands alone" in mixed.stderr) == (9, True)
    assert "no subject; dreambooth sweep ID" in dreambooth(root, "sweep").stderr
