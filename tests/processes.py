"""Real processes that start in milliseconds, and die at a chosen point."""

import multiprocessing
import os
import signal
import sys
from pathlib import Path
from typing import Any

# A server imports what takes seconds once; every process is forked from it, and from no thread of the tests.
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(
    [
        "dreambooth.training", "dreambooth.drawings", "stages.train",
        # and what these import where they need it
        "diffusers.models.autoencoders.autoencoder_kl", "diffusers.models.unets.unet_2d_condition",
        "diffusers.schedulers.scheduling_ddim", "diffusers.schedulers.scheduling_dpmsolver_multistep",
        "transformers.models.clip.modeling_clip", "transformers.models.clip.tokenization_clip", "peft", "torch._dynamo",
    ]
)  # fmt: skip


def kill_this_process_in(place: Any, name: str, call: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Let a function of a module or class send a signal to its own process before its work, in one call (from 0)."""
    original, calls = getattr(place, name), iter(range(1_000_000))

    def deadly(*arguments: Any, **named: Any) -> Any:
        if next(calls) == call:
            os.kill(os.getpid(), number)
        return original(*arguments, **named)

    setattr(place, name, deadly)


def kill_this_process_at_write(folder: Path, write: int) -> None:
    """Kill this process before the n-th (from 0) change that Python makes in a folder; note the change in `killed`."""
    changes, note = iter(range(1_000_000)), os.open(folder / "killed", os.O_CREAT | os.O_WRONLY)

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            changing = bool(flags & (os.O_WRONLY | os.O_RDWR))
        else:
            path, changing = next(iter(arguments), None), event in ("os.mkdir", "os.rename", "shutil.rmtree")
        if changing and str(path).startswith(f"{folder}/") and next(changes) == write:
            os.write(note, f"{event} {path}".encode())
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
