"""Start a program as several processes that find each other, as torchrun and accelerate launch do.

Their own launchers answer every failure with exit code 1 and end the others after a delay. Here the code of the first
one that fails is the answer, because 75 means "stopped in good order, call again".
"""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from dreambooth.interruption import on_stop

PATIENCE = 30.0  # seconds that the others get to stop in good order when one has failed
_LOOK_EVERY = 0.1  # seconds between two looks at the processes


def start_all(command: Sequence[str], number: int, folder: Path) -> int:
    """Run a command as `number` processes that find each other; return the exit code of the first that fails, or 0.

    A signal to stop that reaches this process is passed on; when one process fails, the others are told to stop.

    Args:
        command: program and arguments.
        number: of processes, on this machine.
        folder: where they run.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    world = {"WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    # Without it each process would take every core, and they would wait for one another.
    world["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS") or max(1, (os.cpu_count() or 1) // number)
    children = []
    for rank_ in range(number):
        own = {**world, "RANK": rank_, "LOCAL_RANK": rank_}
        environment = os.environ | {name: str(value) for name, value in own.items()}
        children.append(subprocess.Popen(command, cwd=folder, env=environment))
    with on_stop(lambda number, frame: _tell(children, signal.SIGTERM)):
        return _wait(children)


def _wait(children: Sequence["subprocess.Popen[bytes]"]) -> int:
    """Wait for all; once one has failed, give the others a while to stop, then end them."""
    failed, deadline = 0, float("inf")
    while None in (codes := [child.poll() for child in children]):
        if any(codes) and not failed:
            failed, deadline = next(filter(None, codes)), time.monotonic() + PATIENCE
            _tell(children, signal.SIGTERM)
        if time.monotonic() > deadline:
            _tell(children, signal.SIGKILL)
        time.sleep(_LOOK_EVERY)
    code = failed or next(filter(None, codes), 0)
    return code if code >= 0 else 128 - code


def _tell(children: Sequence["subprocess.Popen[bytes]"], number: signal.Signals) -> None:
    for child in children:
        if child.poll() is None:
            child.send_signal(number)
