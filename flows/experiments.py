"""Find and remove the experiments of DVC that sweeps made of one subject: refs of git, which their tables name."""

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from dreambooth import sweeps
from flows.commandline import git, is_in_repository

EXPERIMENTS = "refs/exps/"
SHOWN = ".dvc/tmp/exps/cache"  # parameters and metrics by commit, of `dvc exp show`, which makes it again


def experiments_of(root: Path, subject_id: str) -> dict[str, str]:
    """Return the commit of each ref of an experiment whose row in the table of a sweep has this subject."""
    names = set(_names(root, subject_id))
    if not names or not is_in_repository(root):
        return {}
    commits = commits_of(root)
    named = {commit for ref, commit in commits.items() if ref.rpartition("/")[2] in names}
    return {ref: commit for ref, commit in commits.items() if commit in named}  # those of `dvc exp apply` too


def commits_of(root: Path) -> dict[str, str]:
    """Return the commit of each experiment by its ref."""
    lines = git(root, "for-each-ref", "--format=%(objectname) %(refname)", EXPERIMENTS).splitlines()
    return {ref: commit for commit, _, ref in (line.partition(" ") for line in lines)}


def remove(root: Path, experiments: Iterable[tuple[str, str]]) -> None:
    """Remove refs, each if it still leads to its commit: no command of DVC shows the experiment any more."""
    for ref, commit in experiments:
        git(root, "update-ref", "-d", ref, commit)
    shutil.rmtree(root / SHOWN, ignore_errors=True)


def _names(root: Path, subject_id: str) -> Iterator[str]:
    """Yield the experiments of a subject that sweeps named; other words in their tables name nothing of theirs."""
    for table in sweeps.tables(root):
        for row in sweeps.rows(table):
            if row.get("subject") == subject_id and (row.get("experiment") or "").startswith(sweeps.PREFIX):
                yield row["experiment"]
