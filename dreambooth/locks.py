"""Let one process at a time do a piece of work, and tell the next one who does it."""

import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Literal, get_args

from filelock import FileLock, Timeout

from dreambooth.errors import DreamboothError
from dreambooth.folders import scratch_folder

Job = Literal["train", "evaluate", "register"]
JOBS: tuple[Job, ...] = get_args(Job)
"""What one process at a time does with a subject; `dreambooth forget` finds the files of these locks."""
LOCKS = "locks"  # in the scratch folder
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class AlreadyRunningError(DreamboothError):
    """Refuse work that another process is doing."""

    code = "E_RUNNING"
    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again when the other one is done


@contextmanager
def only_one(folder: Path, name: str, what: str, wait: Callable[[str], object] | None = None) -> Iterator[None]:
    """Hold a lock while the work is done; the system frees it when the process ends, however it ends.

    Args:
        folder: of the locks; made if need be.
        name: of the work, as a file name.
        what: the work in words, for the message.
        wait: is told who runs, and then this process waits for its turn; None refuses instead.

    Raises:
        AlreadyRunningError: another process holds it; with its pid and host.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    owner, lock = folder / f"{name}.json", FileLock(folder / f"{name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if wait is None:
            raise AlreadyRunningError(f"{what} is already running: {_who(owner)}; wait for it, or stop it") from None
        wait(f"{what} is already running: {_who(owner)}; waiting for it")
        lock.acquire()
    try:
        owner.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "boot": _boot_id()}))
        yield
        owner.unlink(missing_ok=True)
    finally:
        lock.release()


def only_one_of(
    root: Path, job: Job, subject_id: str, what: str, wait: Callable[[str], object] | None = None
) -> AbstractContextManager[None]:
    """Hold the lock of what one process at a time does with a subject of a project; see `only_one`."""
    return only_one(scratch_folder(root) / LOCKS, f"{job}-{subject_id}", what, wait)


def locks_of(root: Path, subject_id: str) -> list[Path]:
    """Return the files of the locks of a subject."""
    folder = scratch_folder(root) / LOCKS
    return [path for job in JOBS for path in folder.glob(f"{job}-{subject_id}.*")]


def _boot_id() -> str:
    """Return what tells this start of the machine from others: a pid says nothing after the next one."""
    return _BOOT_ID.read_text(encoding="ascii").strip() if _BOOT_ID.exists() else ""


def _who(owner: Path) -> str:
    try:
        who = json.loads(owner.read_text(encoding="utf-8"))
        if who["host"] == socket.gethostname() and who["boot"] != _boot_id():
            raise ValueError("left from an earlier start of this machine")
        return f"pid {who['pid']} on {who['host']}"
    except (OSError, ValueError, KeyError):
        return "a process that has not said who it is"
