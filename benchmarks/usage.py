"""Run a command as its user would, and say what it cost: wall time, CPU time, and the most memory it held."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

MEGABYTE = 1e6
POLL_SECONDS = 0.2
# Below 32768, where Linux begins to give outgoing connections their ports: none takes this one before its server does.
PORTS = range(20000, 32000)


class CommandError(Exception):
    """A command under measurement failed; its last lines are the message."""


@dataclass(frozen=True)
class Usage:
    """What a command, or several one after the other, cost."""

    wall: float
    """Seconds a person waits."""
    cpu: float
    """Seconds of all cores; they hardly depend on what else the machine does."""
    memory: float
    """Most resident memory of a process, in MB."""
    gpu_memory: float = 0.0
    """Most memory in use on the GPU, by anybody, in MB; 0 without a GPU."""

    def __add__(self, other: "Usage") -> "Usage":
        """Return the cost of both, one after the other."""
        gpu_memory = max(self.gpu_memory, other.gpu_memory)
        return Usage(self.wall + other.wall, self.cpu + other.cpu, max(self.memory, other.memory), gpu_memory)


NOTHING = Usage(0, 0, 0)
# Linux counts what a process was before its exec as its memory: a benchmark with torch in it would lend its own to
# each command. So a small process starts it, waits, and tells: CPU seconds, most memory.
_WAITER = """
import os, subprocess, sys
process = subprocess.Popen(sys.argv[2:])
_, status, used = os.wait4(process.pid, 0)
with open(int(sys.argv[1]), "w") as report:
    report.write(f"{used.ru_utime + used.ru_stime} {used.ru_maxrss}")
code = os.waitstatus_to_exitcode(status)
sys.exit(code if code >= 0 else 128 - code)
"""


def run(command: Sequence[str], folder: Path, environment: Mapping[str, str], log: Path) -> Usage:
    """Run a command to its end.

    Args:
        command: program and arguments.
        folder: to run it in.
        environment: all of it.
        log: gets what it prints, after what is there.

    Raises:
        CommandError: it did not exit with 0.
    """
    receiver, sender = os.pipe()
    with log.open("ab") as out, os.fdopen(receiver, encoding="ascii") as report:
        began = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _WAITER, str(sender), *command],
            cwd=folder, env=dict(environment), stdout=out, stderr=subprocess.STDOUT, pass_fds=[sender],
            start_new_session=True,
        )  # fmt: skip
        os.close(sender)
        try:
            with _GpuWatch() as watch:
                process.wait()
        except BaseException:  # who stops the benchmark stops what it measures, else the next one runs beside it
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
        wall = time.perf_counter() - began
        cpu, memory = map(float, report.read().split())
    if process.returncode:
        last = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise CommandError(f"{' '.join(command[:4])} ... exited with {process.returncode}:\n{last}")
    return Usage(wall, cpu, memory * 1024 / MEGABYTE, watch.peak)


def free_port() -> int:
    """Return a port for a server on which nobody listens."""
    while True:
        port = secrets.choice(PORTS)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class _GpuWatch:
    """Ask nvidia-smi a few times a second how much memory is in use, where there is one."""

    def __init__(self) -> None:
        self.peak = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True) if shutil.which("nvidia-smi") else None

    def __enter__(self) -> "_GpuWatch":
        if self._thread:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        if self._thread:
            self._thread.join()

    def _watch(self) -> None:
        command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
        while not self._stop.wait(POLL_SECONDS):
            answer = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
            if answer.isdigit():
                self.peak = max(self.peak, int(answer) * 2**20 / MEGABYTE)
