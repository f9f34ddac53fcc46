"""Let one process at a time do a piece of work, and tell the next one who does it."""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from dreambooth.errors import DreamboothError


class AlreadyRunningError(DreamboothError):
    """Refuse work that another process is doing."""

    code = "E_RUNNING"
    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again when the other one is done


@contextmanager
def only_one(folder: Path, name: str, what: str) -> Iterator[None]:
    """Hold a lock while the work is done; the system frees it when the process ends, however it ends.

    Args:
        folder: of the locks; made if need be.
        name: of the work, as a file name.
        what: the work in words, for the message.

    Raises:
        AlreadyRunningError: another process holds it; with its pid and host.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    owner = folder / f"{name}.json"
    try:
        with FileLock(folder / f"{name}.lock", timeout=0):
            owner.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}), encoding="utf-8")
            yield
            owner.unlink(missing_ok=True)
    except Timeout:
        raise AlreadyRunningError(f"{what} is already running: {_who(owner)}; wait for it, or stop it") from None


def _who(owner: Path) -> str:
    try:
        who = json.loads(owner.read_text(encoding="utf-8"))
        return f"pid {who['pid']} on {who['host']}"
    except (OSError, ValueError, KeyError):
        return "a process that has not said who it is"
