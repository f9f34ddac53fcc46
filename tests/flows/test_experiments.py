"""`dvc exp run -S` writes params.yaml anew, in its own way of writing YAML, and our stages read it."""

import subprocess
import sys
from pathlib import Path

import pytest
from toy_project import dvc

from dreambooth.params import load_params

STAGES = """
stages:
  train:
    cmd: "{python} -c 'import pathlib, dreambooth.params as p; \\
      train = p.load_params(pathlib.Path(\\"params.yaml\\")).train; \\
      pathlib.Path(\\"read.txt\\").write_text(str((train.learning_rate, train.mixed_precision)))'"
    params: [train]
    outs: [{{read.txt: {{cache: false}}}}]
"""


def git(root: Path, *arguments: str) -> None:
    command = ["git", "-c", "user.name=Test", "-c", "user.email=test@localhost", *arguments]
    subprocess.run(command, cwd=root, check=True, capture_output=True)


@pytest.fixture
def repository(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a project under Git whose only stage says which parameters it read."""
    for name in ("GIT_AUTHOR", "GIT_COMMITTER"):
        monkeypatch.setenv(f"{name}_NAME", "Test")
        monkeypatch.setenv(f"{name}_EMAIL", "test@localhost")
    (project / "dvc.yaml").write_text(STAGES.format(python=sys.executable))
    git(project, "init", "--quiet")
    (project / ".dvc/config").write_text("")  # not without an SCM any more
    git(project, "add", "--all")
    git(project, "commit", "--quiet", "--message", "toy")
    return project


@pytest.mark.slow
def test_an_experiment_reads_the_numbers_and_words_that_dvc_wrote(repository: Path) -> None:
    dvc(repository, "exp", "run", "-S", "train.learning_rate=5e-5", "-S", "train.mixed_precision='no'")
    assert "learning_rate: 5e-05" in (repository / "params.yaml").read_text()
    assert (repository / "read.txt").read_text() == "(5e-05, 'no')"
    dvc(repository, "exp", "run", "-S", "train.learning_rate=7e-5")
    assert (repository / "read.txt").read_text() == "(7e-05, 'no')"
    assert load_params(repository / "params.yaml").train.learning_rate == 7e-5
