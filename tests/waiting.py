"""Wait for what other threads, processes and servers do; find a port for one."""

import subprocess
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.usage import free_port as free_port


def await_true(
    condition: Callable[[], Any], patience: float = 60, pause: float = 0.1, otherwise: str = "it did not happen"
) -> None:
    """Wait until a condition holds.

    Args:
        condition: is asked again and again.
        patience: seconds after which the test fails.
        pause: seconds between two questions.
        otherwise: what it fails with.
    """
    deadline = time.monotonic() + patience
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"{otherwise} within {patience} s")
        time.sleep(pause)


def await_server(address: str, process: "subprocess.Popen[Any]", log: Path, patience: float = 300) -> None:
    """Wait until a server answers; fail with the end of its log if it does not, or has ended."""
    deadline = time.monotonic() + patience
    while not answers(address):
        if process.poll() is not None or time.monotonic() > deadline:
            pytest.fail(f"{address} does not answer (exit code {process.poll()}): {log.read_text()[-2000:]}")
        time.sleep(0.2)


def answers(address: str) -> bool:
    """Whether a server says 200."""
    try:
        with urllib.request.urlopen(address, timeout=2) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False
