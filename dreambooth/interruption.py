"""Stop in good order: finish the step when told to stop, and do not outlive whoever started the work."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

import psutil

from dreambooth.errors import DreamboothError

RESUME = 75  # EX_TEMPFAIL of sysexits.h: "try again later"
_LOOK_EVERY = 0.5  # seconds
ONE_REQUEST = 1.0  # seconds in which the same signal is one: of the group, of a runner above, both of `timeout`
_requests: list["StopRequest"] = []  # that are open now, for `_follow`
_answered: list["StopRequest"] = []  # of this process
_SHELLS = {"sh", "dash", "bash", "ash", "busybox", "ksh", "zsh", "fish"}


class Interrupted(DreamboothError):  # noqa: N818 - it is no mistake of anybody
    """End a training that was told to stop, after its state was saved."""

    code = "E_INTERRUPTED"
    exit_code = RESUME


class StopRequest:
    """Whether a signal has asked to stop."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.since = 0.0

    def __bool__(self) -> bool:
        return self.signal is not None

    def note(self, number: int) -> None:
        """Be asked by a signal."""
        self.signal, self.since = signal.Signals(number), time.monotonic()

    def is_repeated_by(self, number: int) -> bool:
        """Tell whether a signal asks again: the same one, and not at nearly the same time."""
        return self.signal == number and time.monotonic() - self.since > ONE_REQUEST


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Note the first SIGTERM or SIGINT instead of dying of it; the same one again ends the process at once.

    One of each is one request, and so are two at nearly the same time: a signal reaches the whole group, and a runner
    above passes its own SIGTERM on. Works in the main thread only; elsewhere nothing is noted.
    """
    request = StopRequest()

    def note(number: int, frame: FrameType | None) -> None:
        if request.signal is None:
            request.note(number)
        elif request.is_repeated_by(number):
            os._exit(128 + number)

    if threading.current_thread() is not threading.main_thread():  # signals arrive elsewhere
        yield request
        return
    _requests.append(request)
    try:
        with on_stop(note):
            yield request
    finally:
        _requests.remove(request)
        if request:
            _answered.append(request)


@contextmanager
def deaf_once_answered() -> Iterator[None]:
    """Pass over signals when a training has answered one: its state is saved, the process ends, and has to say so."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def hear(number: int, frame: FrameType | None) -> None:
        previous = before[signal.Signals(number)]
        if _answered or previous == signal.SIG_IGN:
            return
        if callable(previous):
            previous(number, frame)
        else:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    try:
        with on_stop(hear):
            yield
    finally:
        if _answered:
            for number in before:
                signal.signal(number, signal.SIG_IGN)


@contextmanager
def on_stop(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Let a handler have SIGTERM and SIGINT for a while; in the main thread only."""
    before = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def die_with_starter() -> None:
    """Send this process a SIGTERM when who started it ends: an orphaned training would run beside the next one."""
    for starter in _starters():
        threading.Thread(target=_follow, args=(starter,), name=f"follow-{starter.pid}", daemon=True).start()


def is_alive(process: psutil.Process) -> bool:
    """Tell whether a process runs; one that is dead and not yet reaped does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:  # of another user now, so it is there
        return True


def tell(send: Callable[[], object]) -> None:
    """Send a process a signal, `process.terminate`; ignore one that has ended or that we may not signal."""
    with suppress(psutil.Error):
        send()


def _starters() -> list[psutil.Process]:
    """Return the parent; under DVC also the parent of a shell between the two.

    DVC runs the command of a stage in $SHELL. bash puts the command into its own place, the dash that is /bin/sh on
    Debian stays and waits: it outlives a killed DVC.
    """
    parents = psutil.Process().parents()[:2]
    between = "DVC_STAGE" in os.environ and len(parents) == 2 and parents[0].name() in _SHELLS
    return parents if between else parents[:1]


def _follow(starter: psutil.Process) -> None:
    """Look until it has ended: psutil's own wait would also wait until its parent has reaped it."""
    while is_alive(starter):
        time.sleep(_LOOK_EVERY)
    if not any(_requests):  # else it is saving already, and the same signal again would end it at once
        os.kill(os.getpid(), signal.SIGTERM)
