"""End a run, a sweep or a service that was told to stop: stages save their state, a line says so, no process stays.

Ctrl-C reaches the whole process group, and with it the temporary server of Prefect. Without its server Prefect would
go on asking for it for minutes, so that such a run does not wait until Prefect has wound up.
"""

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import FrameType

import psutil

from dreambooth.interruption import Interrupted, StopRequest, on_stop, tell
from flows.console import err
from flows.dvcrun import stop_all, stop_trees
from flows.tables import print_problems

_GRACE = 2.0  # seconds for DVC to write its locks, and for a temporary server to close its database
_current: "_Leaving | None" = None


class _Leaving:
    """Hears the signals of one run: the first lets the stages save their state, the same one again ends all at once."""

    def __init__(self, subjects: Sequence[str], has_server: bool) -> None:
        self.subjects = subjects
        self.has_server = has_server
        self.words = ""
        """What became of the stages; empty until they have ended."""
        self.thread: threading.Thread | None = None
        self._request = StopRequest()
        self._is_ending = False
        self._is_released = False

    def hear(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal; the work is done in a thread, so that the next signal is heard too."""
        if self._is_released:
            self._is_released = False
            raise KeyboardInterrupt
        if self.has_server and number == signal.SIGTERM:  # Prefect has told its server, and ends the process by it
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if self._request.is_repeated_by(number):
            grace, self._is_ending = 0.0 if self._is_ending else _GRACE, True
            _end(128 + number, grace)
        if not self._request:
            self._request.note(number)
            self.thread = threading.Thread(target=self._leave, name="leave", daemon=True)
            self.thread.start()

    def _leave(self) -> None:
        logging.disable(logging.CRITICAL)  # tasks that fail now, and a server that is gone, are no news
        _say_stopping()
        self.words = in_words(stop_all(), self.subjects)
        if self._is_ending:  # the next signal came meanwhile
            return
        if not self.has_server:
            with suppress(OSError, SystemExit):
                print_problems(err, Interrupted.code, self.words)
            _end(Interrupted.exit_code, _GRACE)
        self._is_released = True  # a server that stays is told by Prefect what became of the run
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


@contextmanager
def leaving_when_told(subjects: Sequence[str], has_server: bool) -> Iterator[None]:
    """Let SIGINT and SIGTERM end a run of subjects in good order; in the main thread only, elsewhere nothing is heard.

    Args:
        subjects: named in what is said.
        has_server: whether a server of Prefect stays when this process ends; else the process ends here.

    Raises:
        Interrupted: a signal came, the stages have ended, and Prefect has told its server.
    """
    global _current
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _current = leaving = _Leaving(subjects, has_server)
    try:
        with on_stop(leaving.hear):
            yield
            if leaving.thread is not None:  # the signal came when all was done
                leaving.thread.join()
    except KeyboardInterrupt:
        raise Interrupted(leaving.words) from None
    finally:
        _current = None


@contextmanager
def leaving_a_sweep_when_told() -> Iterator[None]:
    """Let SIGINT and SIGTERM end a sweep, which no server of Prefect knows of: the stage that runs saves its state.

    Raises:
        Interrupted: a signal came, and the stage has ended.
    """
    request = StopRequest()

    def hear(number: int, frame: FrameType | None) -> None:
        if _is_first(request, number):
            threading.Thread(target=_say_stopping, daemon=True).start()  # a handler may not write what it broke into
            raise KeyboardInterrupt

    try:
        with on_stop(hear):
            yield
    except KeyboardInterrupt:
        raise Interrupted("stopped; the same command continues") from None


@contextmanager
def leaving_a_service_when_told(has_server: bool) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end what serves deployments; with a server that stays Prefect does it.

    A temporary server hears the Ctrl-C as well, and Prefect would ask it for minutes. So the process ends here. Of a
    SIGTERM Prefect would end this process alone, and the stages would go on.
    """
    if has_server:
        with suppress(KeyboardInterrupt):  # before Prefect hears it
            yield
        return
    request = StopRequest()

    def hear(number: int, frame: FrameType | None) -> None:
        if _is_first(request, number):
            threading.Thread(target=_leave_a_service, name="leave", daemon=True).start()

    from prefect.runner import Runner

    of_prefect = Runner.handle_sigterm

    def hear_for_prefect(runner: Runner, number: int, frame: FrameType | None) -> None:
        hear(number, frame)

    Runner.handle_sigterm = hear_for_prefect  # type: ignore[method-assign, assignment]
    try:
        with on_stop(hear):
            yield
    finally:
        Runner.handle_sigterm = of_prefect  # type: ignore[method-assign]


def _is_first(request: StopRequest, number: int) -> bool:
    """Note a signal, and tell whether it is the first one; the same one again ends all at once."""
    if request.is_repeated_by(number):
        _end(128 + number, _GRACE)
    if request:
        return False
    request.note(number)
    return True


def _leave_a_service() -> None:
    logging.disable(logging.CRITICAL)
    _say_stopping()
    stop_trees([one.pid for one in psutil.Process().children(recursive=True) if _runs(one, "dvc")])
    _end(0, _GRACE)


@contextmanager
def heard_in_a_flow() -> Iterator[None]:
    """Hear SIGTERM inside a flow too, where Prefect handles it: only where its server would not hear of it."""
    if _current is None or _current.has_server:
        yield
        return
    with on_stop(_current.hear):
        yield


@contextmanager
def ending_at_once() -> Iterator[None]:
    """Let SIGINT and SIGTERM end this process without a word, before anything begins: imports make errors of them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with on_stop(lambda number, _: os._exit(128 + number)):
        yield


def in_words(stopped: Mapping[str, str], subjects: Sequence[str]) -> str:
    """Say what became of the stages that ran, and how to go on.

    Args:
        stopped: the last words of each stage, empty where it had none.
        subjects: of the run.
    """
    stages = [f"{stage}: {said or 'stopped'}" for stage, said in stopped.items()] or ["stopped"]
    return f"{', '.join(stages)}; dreambooth run {' '.join(subjects)} continues"


def _say_stopping() -> None:
    with suppress(OSError, SystemExit):  # of rich: nobody reads any more, as behind a pipe that Ctrl-C has ended too
        err.print("stopping: the stages save their state first; the same signal again ends them at once")


def _end(code: int, grace: float) -> None:
    """End stages and a temporary server, then this process; DVC ends by itself when its stage is gone.

    It is writing its locks then, and a signal would leave a torn file that no later DVC reads. So it has some seconds.
    """
    children = psutil.Process().children()
    for process in psutil.Process().children(recursive=True):
        if process not in children:
            tell(process.kill)
        elif _runs(process, "uvicorn"):  # a temporary server
            tell(process.terminate)
    for process in psutil.wait_procs(children, grace)[1]:
        tell(process.kill)
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _runs(process: psutil.Process, module: str) -> bool:
    with suppress(psutil.Error):
        return module in process.cmdline()
    return False
