"""Find what git keeps of one subject: experiments of sweeps, to be removed; others, and its photos, to be named."""

import re
import shutil
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from dreambooth import sweeps
from dreambooth.errors import PipelineError
from dreambooth.params import names_id
from dreambooth.yaml12 import YamlError, load_yaml
from flows.commandline import git, is_in_repository
from flows.project import PARAMS

EXPERIMENTS = "refs/exps/"
SHOWN = ".dvc/tmp/exps/cache"  # parameters and metrics by commit, of `dvc exp show`, which makes it again
NAMED = re.compile(EXPERIMENTS + r"[0-9a-f]{2}/[0-9a-f]{38}/(.+)")  # by the commit that an experiment began with


def experiments_of(root: Path, subject_id: str) -> dict[str, str]:
    """Return the commit of each ref of an experiment whose row in the table of a sweep has this subject."""
    names = set(_names(root, subject_id))
    if not names or not is_in_repository(root):
        return {}
    commits = commits_of(root)
    named = {commit for ref, commit in commits.items() if ref.rpartition("/")[2] in names}
    return {ref: commit for ref, commit in commits.items() if commit in named}  # those of `dvc exp apply` too


def others_with(root: Path, subject_id: str, known: Collection[str]) -> list[str]:
    """Return the names of experiments whose params.yaml has the subject, without those of the known refs.

    `dvc exp run` makes them of every subject of the project, so that they hold the work of others as well. Those that
    a table of a sweep names are of its subjects alone.
    """
    tabled = {row.get("experiment") for table in sweeps.tables(root) for row in sweeps.rows(table)}
    commits = commits_of(root) if is_in_repository(root) else {}
    named = {
        match[1]: commit for ref, commit in commits.items() if ref not in known and (match := NAMED.fullmatch(ref))
    }
    return [name for name, commit in named.items() if name not in tabled and _has_subject(root, commit, subject_id)]


def has_commits(root: Path, path: str) -> bool:
    """Tell whether a commit of any branch has a file at a path, or below it."""
    return is_in_repository(root) and bool(git(root, "log", "--all", "--max-count", "1", "--format=%H", "--", path))


def commits_of(root: Path) -> dict[str, str]:
    """Return the commit of each experiment by its ref."""
    lines = git(root, "for-each-ref", "--format=%(objectname) %(refname)", EXPERIMENTS).splitlines()
    return {ref: commit for commit, _, ref in (line.partition(" ") for line in lines)}


def remove(root: Path, experiments: Iterable[tuple[str, str]]) -> None:
    """Remove refs, each if it still leads to its commit: no command of DVC shows the experiment any more."""
    for ref, commit in experiments:
        git(root, "update-ref", "-d", ref, commit)
    shutil.rmtree(root / SHOWN, ignore_errors=True)


def _has_subject(root: Path, commit: str, subject_id: str) -> bool:
    try:
        text = git(root, "show", f"{commit}:./{PARAMS}")
    except PipelineError:  # of another project in the same repository
        return False
    try:
        content = load_yaml(text)
    except YamlError:
        return names_id(text, subject_id)
    return isinstance(content, dict) and subject_id in (content.get("subjects") or ())


def _names(root: Path, subject_id: str) -> Iterator[str]:
    """Yield the experiments of a subject that sweeps named; other words in their tables name nothing of theirs."""
    for table in sweeps.tables(root):
        for row in sweeps.rows(table):
            if row.get("subject") == subject_id and (row.get("experiment") or "").startswith(sweeps.PREFIX):
                yield row["experiment"]
