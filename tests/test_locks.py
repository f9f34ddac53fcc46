"""One process at a time, and the next one is told who it is."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from tiny_project import REPOSITORY

from dreambooth.locks import AlreadyRunningError, only_one

HOLD = "import sys, time; from pathlib import Path; from dreambooth.locks import only_one\n"
HOLD += "with only_one(Path(sys.argv[1]), 'train-biscuit', 'x'): print('held', flush=True); time.sleep(60)"


@pytest.mark.fault(23)
def test_the_second_process_is_told_who_runs_and_a_killed_one_holds_nothing(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(AlreadyRunningError, match=rf"pid {holder.pid} on {socket.gethostname()}; wait"),
            only_one(tmp_path, "train-biscuit", "the training of biscuit"),
        ):
            pass
        with only_one(tmp_path, "train-rex", "another piece of work"):
            pass
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
    with only_one(tmp_path, "train-biscuit", "the training of biscuit"):
        assert str(os.getpid()) in (tmp_path / "train-biscuit.json").read_text()


def test_whoever_waits_is_told_for_whom_and_comes_next(tmp_path: Path) -> None:
    order: list[str] = []
    told = threading.Event()

    def second() -> None:
        def wait(line: str) -> None:
            order.append(line)
            told.set()

        with only_one(tmp_path, "prior", "the drawing", wait=wait):
            order.append("second")

    with only_one(tmp_path, "prior", "the drawing"):
        other = threading.Thread(target=second)
        other.start()
        assert told.wait(60)
        order.append("first")
    other.join()
    assert order == [
        f"the drawing is already running: pid {os.getpid()} on {socket.gethostname()}; waiting for it",
        "first",
        "second",
    ]


def test_a_note_from_an_earlier_start_of_the_machine_names_nobody(tmp_path: Path) -> None:
    with only_one(tmp_path, "prior", "the drawing"):
        note = tmp_path / "prior.json"
        who = json.loads(note.read_text())
        assert who["pid"] == os.getpid()
        note.write_text(json.dumps(who | {"boot": "another"}))
        with (
            pytest.raises(AlreadyRunningError, match="a process that has not said who it is"),
            only_one(tmp_path, "prior", "the drawing"),
        ):
            pass
