"""Real processes that start in milliseconds, and die at a chosen point."""

import multiprocessing
import os
import signal
from typing import Any

# A server imports what takes seconds once; every process is forked from it, and from no thread of the tests.
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["dreambooth.training", "dreambooth.drawings", "stages.train"])


def kill_this_process_in(place: Any, name: str, call: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Let a function of a module or class send a signal to its own process before its work, in one call (from 0)."""
    original, calls = getattr(place, name), iter(range(1_000_000))

    def deadly(*arguments: Any, **named: Any) -> Any:
        if next(calls) == call:
            os.kill(os.getpid(), number)
        return original(*arguments, **named)

    setattr(place, name, deadly)
