"""Work in clones: make one, change parameters in it, hand back what was made (DVC remote, branch runs/<id>), take it.

What a run made can be restored after its clone is gone: a training with the photos that it saw, a folder of DVC by its
hash. A clone lives for one run. Cache, scratch and MLflow database are those of the home: the checkout of the worker.
"""

import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dreambooth.errors import PipelineError, shown
from dreambooth.folders import scratch_folder, write_file
from dreambooth.locks import only_one
from dreambooth.mlflowstore import tracking_uri
from dreambooth.params import load_params, parse_params
from dreambooth.pointer import dvc_cache
from dreambooth.yaml12 import dump_yaml, load_yaml
from flows.commandline import ROBOT, dvc, git, run_quietly
from flows.copies import OWNER
from flows.dvcstore import FOLDER_HASH
from flows.graph import Graph
from flows.presets import put
from flows.project import INPUTS, PARAMS, read_params_text, write_params_text

LOCK = "dvc.lock"
PROMPTS = "data/prompts"
CONFIG = ".dvc/config.local"
BRANCH = "runs/{}"
REMOTE = re.compile(r"^remote\.(.+)\.url=(.+)$", re.MULTILINE)  # a line of `dvc config --list`


def repository_of(home: Path) -> str:
    """Return where clones come from: DREAMBOOTH_REPOSITORY, else what the home was cloned from, else the home."""
    named = os.environ.get("DREAMBOOTH_REPOSITORY")
    if named:
        return named
    found = run_quietly(["git", "remote", "get-url", "origin"], home)
    return found.stdout.strip() or str(home)


def pushed_head(home: Path) -> str:
    """Return the commit that is checked out, once clones of the repository would work on what lies here.

    Raises:
        PipelineError: what they would read has changed since that commit, or the repository lacks it.
    """
    head, repository = git(home, "rev-parse", "HEAD"), repository_of(home)
    if changed := git(home, "status", "--porcelain", "--", *INPUTS):
        names = ", ".join(line.split(maxsplit=1)[1] for line in changed.splitlines()[:5])
        raise PipelineError(
            f"clones work on the commit {head[:12]}, and in {home} differ from it: {names}; "
            "git commit and git push, then run again"
        )
    if not _has(repository, head, home):
        raise PipelineError(f"{repository} lacks the commit {head[:12]} that {home} has; git push, then run again")
    return head


def _has(repository: str, commit: str, home: Path) -> bool:
    """Tell whether a repository has a commit of the home on one of its branches."""
    lines = git(home, "ls-remote", "--", repository, "HEAD", "refs/heads/*").splitlines()
    tips = {name: tip for tip, name in map(str.split, lines)}
    if commit in tips.values():
        return True
    tips = {name: tip for name, tip in tips.items() if f"/{BRANCH.format('')}" not in name}  # of runs there are many
    if tips:
        git(home, "fetch", "--quiet", "--", repository, *tips)
    return bool(tips) and not git(home, "rev-list", "--max-count=1", commit, "--not", *tips.values())


@contextmanager
def cloned(home: Path, repository: str, revision: str | None) -> Iterator[Path]:
    """Clone the repository for the time of the block; processes that start in it use cache and scratch of the home.

    Raises:
        PipelineError: git cannot clone, or there is no such revision.
    """
    if revision and revision.startswith("-"):  # to git an option, whoever may start a run
        raise PipelineError(f"revision: {shown(revision)} begins with -; name a commit or a branch")
    share_folders(home)
    with (
        tempfile.TemporaryDirectory(prefix="clone-", dir=scratch_folder(home), ignore_cleanup_errors=True) as folder,
        only_one(Path(folder), OWNER, f"work in {folder}"),  # a killed process leaves the folder, not the lock
    ):
        clone = Path(folder) / "project"
        git(home, "clone", "--quiet", "--", repository, str(clone))
        git(clone, "checkout", "--quiet", "--detach", revision or "HEAD", "--")
        _configure(clone, home)
        yield clone


def _configure(clone: Path, home: Path) -> None:
    """Give a clone the cache, the remotes and what else git does not carry: credentials, and paths beside the home."""
    if (home / CONFIG).is_file():
        shutil.copy(home / CONFIG, clone / CONFIG)  # as private as it was
    dvc(clone, "config", "--local", "cache.dir", dvc(home, "cache", "dir").splitlines()[-1])
    for name, place in REMOTE.findall(dvc(home, "config", "--list")):
        if Path(place).is_absolute():  # perhaps written in relation to the home
            dvc(clone, "remote", "modify", "--local", name, "url", place)


def share_folders(home: Path) -> None:
    """Have the processes that start from now on use scratch folder and MLflow database of the home, in any folder."""
    os.environ.setdefault("DREAMBOOTH_SCRATCH", str(scratch_folder(home)))
    os.environ.setdefault("MLFLOW_TRACKING_URI", tracking_uri(home))


def override(project: Path, values: Mapping[str, Any]) -> None:
    """Put parameters into params.yaml, where DVC hashes them: {"train.learning_rate": 2e-6}; its comments stay.

    Raises:
        ParamsError: no such parameter, or a value that it does not take; the file is as it was.
    """
    if not values:
        return
    load_params(project / PARAMS)  # refuses a file that is missing or cannot be read
    text, _ = put(read_params_text(project), values, "an override")
    parse_params(load_yaml(text))
    if (project / PARAMS).resolve().is_relative_to(project.resolve()):
        write_params_text(project, text)
    else:  # what a link leads to outside of the clone is read by others too
        write_file(project / PARAMS, text.encode())


def _params_files(project: Path) -> list[str]:
    """Return params.yaml and, where it is a link within the project, the file that it leads to."""
    place, home = (project / PARAMS).resolve(), project.resolve()
    return sorted({PARAMS, place.relative_to(home).as_posix()}) if place.is_relative_to(home) else [PARAMS]


def publish(clone: Path, stages: Collection[str]) -> None:
    """Send the outputs of stages, and the run-cache that knows what they were made from, to the DVC remote.

    Raises:
        PipelineError: there is no remote, or it refuses.
    """
    if stages:
        dvc(clone, "push", "--run-cache", *sorted(stages))  # not --quiet: it would say no error either


def commit_back(clone: Path, run_id: str) -> str | None:
    """Push dvc.lock, and the parameters it was made with, as the branch runs/<id>; None where nothing changed.

    Raises:
        PipelineError: git cannot push.
    """
    files = [LOCK, *_params_files(clone)]
    changed = git(clone, "status", "--porcelain", "--untracked-files=all", "--", *files)
    if not changed:
        return None
    git(clone, "add", "--force", "--", *files)
    git(clone, *ROBOT, "commit", "--quiet", "--message", f"Run {run_id}")
    branch = BRANCH.format(run_id)
    git(clone, "push", "--quiet", "--force", "origin", f"HEAD:refs/heads/{branch}")
    return branch


def take_back(home: Path, repository: str, run_id: str, keys: Collection[str]) -> bool:
    """Take the entries of subjects and classes from dvc.lock of runs/<id> into that of the home; False without one."""
    branch = BRANCH.format(run_id)
    fetched = run_quietly(["git", "fetch", "--quiet", repository, f"refs/heads/{branch}"], home)
    if fetched.returncode:
        return False
    theirs = load_yaml(git(home, "show", f"FETCH_HEAD:{LOCK}"))
    lock = home / LOCK
    ours = load_yaml(lock.read_text(encoding="utf-8")) if lock.is_file() else {}
    merged = merge_locks(ours, theirs, keys)
    if merged != ours:
        write_file(lock, dump_yaml(merged).encode())
    return True


def merge_locks(ours: Mapping[str, Any], theirs: Mapping[str, Any], keys: Collection[str]) -> dict[str, Any]:
    """Return a dvc.lock with their entries of these subjects and classes, and ours of all others."""
    taken = {name: entry for name, entry in theirs.get("stages", {}).items() if name.partition("@")[2] in keys}
    return {"schema": theirs.get("schema", "2.0"), "stages": {**ours.get("stages", {}), **taken}}


@contextmanager
def trained(home: Path, subject_id: str, fingerprint: str, md5: str | None) -> Iterator[Path]:
    """Yield a folder in which a training and all else lie that its evaluation reads: the home, else a clone.

    The clone has the dvc.lock that names this export, and its files from the DVC remote; the home stays as it is.

    Args:
        home: the checkout of this worker.
        subject_id: of the subject.
        fingerprint: of the training.
        md5: of its export in dvc.lock; None where DVC does not know it.

    Raises:
        PipelineError: no dvc.lock names the export, git or the remote refuses, or what came is another training.
        RegistryError: it is not here, and DVC does not know its export.
    """
    from dreambooth.promotion import is_trained_in, trained_here  # its import takes a second

    if is_trained_in(home, subject_id, fingerprint):
        yield home
        return
    if md5 is None:
        with trained_here(home, subject_id, fingerprint, md5) as place:
            yield place
        return
    with _clone_that_names(home, md5, subject_id) as clone:
        if (home / PROMPTS).is_dir():  # judged by those of today, as parameters and code are
            shutil.copytree(home / PROMPTS, clone / PROMPTS, dirs_exist_ok=True)
        dvc(clone, "pull", *_read_by_evaluation(clone, subject_id))
        if not is_trained_in(clone, subject_id, fingerprint):
            raise PipelineError(
                f"dvc.lock names the export {md5} of {subject_id} and another training than {fingerprint[:12]}; "
                f"train it again: dreambooth run {subject_id}"
            )
        yield clone


@contextmanager
def _clone_that_names(home: Path, md5: str, subject_id: str) -> Iterator[Path]:
    """Yield a clone whose dvc.lock names an output by its hash: that of the home, of the default branch, of a run."""
    lock = home / LOCK
    text = lock.read_text(encoding="utf-8") if lock.is_file() else ""
    is_at_home = md5 in text
    repository = str(home) if is_at_home else repository_of(home)
    with cloned(home, repository, None) as clone:
        if is_at_home:  # perhaps not committed yet
            write_file(clone / LOCK, text.encode())
        else:
            git(clone, "checkout", "--quiet", "--detach", _revision_that_names(clone, repository, md5, subject_id))
        yield clone


def _revision_that_names(clone: Path, repository: str, md5: str, subject_id: str) -> str:
    runs = f"refs/remotes/origin/{BRANCH.format('')}"
    newest_first = git(clone, "for-each-ref", "--sort=-committerdate", "--format=%(refname)", runs).splitlines()
    for revision in ("HEAD", *newest_first):
        if md5 in run_quietly(["git", "show", f"{revision}:{LOCK}"], clone).stdout:
            return revision
    raise PipelineError(
        f"{LOCK} names the export {md5} of {subject_id} neither here nor on a branch {BRANCH.format('<id>')} of "
        f"{repository}; push the commit or the branch that does, or train it again: dreambooth run {subject_id}"
    )


def _read_by_evaluation(project: Path, subject_id: str) -> list[str]:
    """Return the stages and .dvc files whose outputs `evaluate` reads."""
    name = f"evaluate@{subject_id}"
    stages = Graph.load(project, allow_missing=True).select([subject_id]).stages
    return [above for stage in stages if stage.name == name for above in stage.upstream]


def fetch(home: Path, md5: str) -> None:
    """Fetch a folder of DVC by its hash from the remote into the cache of the home, whatever dvc.lock says there.

    Raises:
        PipelineError: it is no hash of a folder, there is no remote, or it does not have all of the files.
    """
    if not FOLDER_HASH.fullmatch(md5):
        raise PipelineError(
            f"{md5!r} is no hash of a folder of DVC, which is 32 digits and .dir; register the export again"
        )
    with cloned(home, repository_of(home), None) as clone:
        outs = [{"md5": md5, "hash": "md5", "path": "fetched"}]
        write_file(clone / "fetched.dvc", dump_yaml({"outs": outs}).encode())
        dvc(clone, "fetch", "fetched.dvc")
    if not (dvc_cache(home) / md5[:2] / md5[2:]).is_file():  # of a list of files that is nowhere DVC only warns
        raise PipelineError(f"the DVC remote of {repository_of(home)} lacks {md5}; dvc push it from where it was made")
