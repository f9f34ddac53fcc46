"""The tests leave alone what the variables of whoever runs them point at: project, servers, repository, home."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from registered import BISCUIT, command, write_evaluation, write_export, write_project
from tiny_project import REPOSITORY

from dreambooth.registry import register

pytestmark = pytest.mark.slow


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=Test", "-c", "user.email=test@localhost"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


def commit(folder: Path, message: str) -> None:
    git(folder, "init", "--quiet")
    git(folder, "commit", "--quiet", "--allow-empty", "--message", message)


@pytest.fixture
def root(tmp_path: Path, tiny_model_folder: Path, empty_database: Path) -> Path:
    """A project under Git with a version that would be promoted."""
    root = tmp_path / "project"
    write_project(root, empty_database)
    commit(root, "toy")
    write_export(root, tiny_model_folder, "1" * 64)
    write_evaluation(root, "1" * 64, 0.5)
    register(root, BISCUIT)
    return root


def content(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_a_command_works_in_the_project_of_its_test(root: Path) -> None:
    before = content(root)
    done = command(root, "promote", BISCUIT)
    assert done.returncode == 0, done.stderr
    assert content(root)["mlflow.db"] != before["mlflow.db"]
    commit(root, "promoted")
    assert content(root)[".git/logs/HEAD"] != before[".git/logs/HEAD"]


def test_what_a_user_exports_reaches_no_test(root: Path, tmp_path: Path) -> None:
    """As docs/operations.md says, and in a hook of git, which sets GIT_DIR."""
    shutil.move(root, tmp_path / "of the user")
    root = tmp_path / "of the user"
    exported = {
        "DREAMBOOTH_HOME": str(root), "MLFLOW_TRACKING_URI": f"sqlite:///{root}/mlflow.db",
        "PREFECT_API_URL": "http://127.0.0.1:9/api", "GIT_DIR": str(root / ".git"), "HF_TOKEN": "a secret",
    }  # fmt: skip
    test = f"{Path(__file__).relative_to(REPOSITORY)}::{test_a_command_works_in_the_project_of_its_test.__name__}"
    before = content(root)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test],
        cwd=REPOSITORY, env=os.environ | exported, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert content(root) == before, done.stdout
    assert done.returncode == 0, done.stdout
