"""One process at a time, and the next one is told who it is."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_project import REPOSITORY

from dreambooth.locks import AlreadyRunningError, only_one

HOLD = "import sys, time; from pathlib import Path; from dreambooth.locks import only_one\n"
HOLD += "with only_one(Path(sys.argv[1]), 'train-biscuit', 'x'): print('held', flush=True); time.sleep(60)"


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
