"""Find the copies of the project in which runs and sweeps work, and those that killed ones left behind."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from dreambooth.folders import scratch_folder
from dreambooth.locks import AlreadyRunningError, only_one

OWNER = "owner"  # the lock in the folder of a clone
SWEEPS = ".dvc/tmp/exps/standalone"  # where `dvc exp run --temp` computes, a folder for each experiment


@dataclass(frozen=True)
class Copy:
    """A copy of the project in which a run or an experiment of a sweep works, or worked until it was killed."""

    folder: Path
    """All of it, to be removed."""
    project: Path
    user: str
    """Who works in it, in words; empty: nobody."""
    is_clone: bool


def copies(home: Path) -> list[Copy]:
    """List the copies of the project in the scratch folder and in DVC's folder of experiments, with who uses each."""
    clones = sorted(folder for folder in scratch_folder(home).glob("clone-*") if folder.is_dir())
    sweeps = sorted(folder for folder in (home / SWEEPS).glob("tmp*") if folder.is_dir())
    if not clones + sweeps:
        return []
    working = _working_folders()
    found = [Copy(one, one / "project", _holder(one) or _user(one, working), True) for one in clones]
    return found + [Copy(one, one, _user(one, working), False) for one in sweeps]


def remove_left(home: Path) -> None:
    """Remove the clones that killed runs left, unless a stage of theirs works on."""
    made = [project.parent for project in scratch_folder(home).glob("clone-*/project")]  # after they took their lock
    working = _working_folders() if made else {}
    for folder in made:
        if not (_holder(folder) or _user(folder, working)):
            shutil.rmtree(folder, ignore_errors=True)


def _holder(folder: Path) -> str:
    """Say who holds the lock of a clone, on whatever machine; nobody after a kill, where the system frees it."""
    if not (folder / f"{OWNER}.lock").is_file():
        return ""
    try:
        with only_one(folder, OWNER, f"work in {folder}"):
            return ""
    except AlreadyRunningError as error:
        return str(error)


def _user(folder: Path, working: Mapping[Path, int]) -> str:
    """Say which process works in a folder: a stage may outlive the run that was killed, and DVC locks nothing."""
    place = folder.resolve()
    pid = next((pid for path, pid in working.items() if path.is_relative_to(place)), None)
    return "" if pid is None else f"pid {pid} works in {folder}; wait for it, or stop it"


def _working_folders() -> dict[Path, int]:
    return {Path(one.info["cwd"]): one.pid for one in psutil.process_iter(["cwd"]) if one.info["cwd"]}
