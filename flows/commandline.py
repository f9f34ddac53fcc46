"""Run git and DVC to the end, and say in a line why one failed; the environment that DVC and its stages get."""

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from dreambooth.errors import PipelineError

ROBOT = ("-c", "user.name=dreambooth", "-c", "user.email=dreambooth@localhost")
DVC = (sys.executable, "-m", "dvc")
NOTES = ".dvc/tmp/notes"
_NOTES_VARIABLE = "DVC_SITE_CACHE_DIR"
_ADVERTISEMENT = "Having any troubles?"  # how DVC ends after an error that it did not expect


def git(folder: Path, *arguments: str) -> str:
    """Run git and return what it says.

    Raises:
        PipelineError: with its last words.
    """
    return _said("git", run_quietly(["git", *arguments], folder), arguments, folder)


def dvc(folder: Path, *arguments: str) -> str:
    """Run dvc and return what it says.

    Raises:
        PipelineError: with its last words.
    """
    return _said("dvc", run_quietly([*DVC, *arguments], folder), arguments, folder)


def run_quietly(command: Sequence[str], folder: Path) -> "subprocess.CompletedProcess[str]":
    """Run git or dvc to its end, which the caller judges; it asks nobody for a password.

    Raises:
        PipelineError: the program or the folder is not there.
    """
    environment = {**child_environment(folder), "GIT_TERMINAL_PROMPT": "0"}
    try:
        return subprocess.run(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=False,
        )
    except FileNotFoundError as error:
        name = "git" if command[0] == "git" else "dvc"
        raise PipelineError(
            f"{name} in {folder}: {error.filename} is not there; install or make it, then run again"
        ) from None


def child_environment(root: Path, threads: int | None = None, notes: Path | None = None) -> dict[str, str]:
    """Return the environment of DVC and its stages: `python` is this one, lines come at once, nothing is reported.

    DVC runs a stage in $SHELL, which need not be set in a container. bash gives its place to the stage. dash and fish
    stay between the two, and die of a Ctrl-C before the stage has saved its state: it would be nobody's child then.

    Args:
        root: of the project.
        threads: that a stage may compute with, if the user has not said it himself; None: as many as there are cores.
        notes: where DVC notes names and hashes; None: where the user says, else `notes_folder`.
    """
    here = str(Path(sys.executable).parent)
    path = os.pathsep.join([here, os.environ.get("PATH", os.defpath)])
    usual = {_NOTES_VARIABLE: str(notes_folder(root))}
    usual |= {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    fixed = {"PATH": path, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8", "DVC_NO_ANALYTICS": "1"}
    fixed |= {} if notes is None else {_NOTES_VARIABLE: str(notes)}
    bash = shutil.which("bash")
    return {**usual, **os.environ, **fixed, **({"SHELL": bash} if bash else {})}


def notes_folder(root: Path) -> Path:
    """Return where DVC notes names and hashes of a project's files: in the project, for its owner alone.

    DVC's own place, /var/tmp/dvc, is open to all users, and keeps those of clones for ever. A folder for each machine:
    they are databases, which two machines on one disk would break.
    """
    folder = root.absolute() / NOTES / platform.node()
    if (root / ".dvc").is_dir():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def is_in_repository(folder: Path) -> bool:
    """Tell whether a folder lies in a repository of git, be it one that git cannot read."""
    return any((one / ".git").exists() for one in (folder, *folder.absolute().parents))


def last_words(done: "subprocess.CompletedProcess[str]") -> str:
    """Return the last lines of what a program said; all from the last but one on that DVC calls an error.

    The last one sums up ("6 files failed to upload"), the one before has the cause.
    """
    lines = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith(_ADVERTISEMENT)]
    errors = [number for number, line in enumerate(lines) if line.startswith("ERROR: ")]
    told = lines[errors[-2:][0] if errors else -3 :]
    return " ".join(" ".join(line.removeprefix("ERROR: ") for line in told).split()) or f"exit {done.returncode}"


def _said(name: str, done: "subprocess.CompletedProcess[str]", arguments: Sequence[str], folder: Path) -> str:
    if done.returncode:
        verb = next((word for word in arguments if re.fullmatch("[a-z][a-z-]+", word)), "")
        raise PipelineError(f"{name} {verb} in {folder}: {last_words(done)}; mend that, then run again")
    return done.stdout.strip()
