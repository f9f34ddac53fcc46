"""Run one stage through DVC in a child process, line by line, so that DVC alone decides what is up to date."""

import contextlib
import subprocess
import tempfile
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from dreambooth.errors import PipelineError
from dreambooth.interruption import RESUME, Interrupted, is_alive, tell
from dreambooth.locks import AlreadyRunningError
from dreambooth.redaction import redact
from flows.commandline import DVC, child_environment, notes_folder
from flows.dvcstore import note_photos

Outcome = Literal["ran", "restored", "unchanged"]
_KEPT_LINES = 500
_BUSY = ("is busy, it is being blocked by", "Unable to acquire lock")
_RUNNING = f"{AlreadyRunningError.code}: "  # of a stage that refused: another process does the same work
_INTERRUPTED = f"{Interrupted.code}: "
_LONGEST_PAUSE = 30.0  # seconds
_GRACE = 30.0  # seconds a stage has to save its state: a training finishes its step first
_UNWINDING = 2.0  # seconds DVC has to write its locks when its stage has ended: cut short it leaves a torn file
# What DVC advises after every stage, to people at a terminal: nothing a log of a run needs.
_ADVICE = (
    "To track the changes with git",
    "To enable auto staging",
    "Use `dvc push`",
    "git add",
    "dvc config core.autostage",
)
_TOLD_ANYWAY = ("ERROR: failed to reproduce", "If there are no processes with such PIDs")  # by the error, or waited for
_CHATTER = (
    "> ",
    "ERROR: failed to ",
    "Running stage ",
    "Verifying data sources",
    "Updating lock file",
    "Generating lock file",
)

_runners: "weakref.WeakSet[DvcRunner]" = weakref.WeakSet()  # a signal handler has no other way to them


@dataclass(frozen=True)
class StageRun:
    """What became of one stage."""

    stage: str
    outcome: Outcome
    """ran; restored: DVC had the outputs of the same inputs; unchanged: they lay there already."""
    seconds: float
    note: str = ""
    """The line in which a stage counts what it reused and made."""


class DvcRunner:
    """Runs stages of one project, several at once if need be, and can stop all of them.

    Args:
        root: the folder with dvc.yaml.
        patience: seconds to wait for another process that works on the same files.
        sleep: how to wait; a test passes its own. None: until `stop` at most.
        wanted: in a fresh clone, the entries whose outputs must lie here at the end. What the DVC remote has is
            fetched instead of made; of the other entries only what a stage that runs needs. None fetches nothing.
    """

    def __init__(
        self,
        root: Path,
        patience: float = 3600.0,
        sleep: Callable[[float], object] | None = None,
        wanted: Collection[str] | None = None,
    ) -> None:
        self.root = root
        self.threads: Mapping[str, int] = {}
        """Of the stages of an entry, where they do not get all cores; see `child_environment`."""
        self.wanted = wanted
        self.patience = patience
        self._children: dict[int, str] = {}
        """What runs now: the process of DVC, and what it works on."""
        self._saved: dict[str, str] = {}
        """What interrupted stages said of their state."""
        self.stopped = threading.Event()
        """Set by `stop`."""
        self._sleep = sleep or self.stopped.wait
        _runners.add(self)

    def run(self, stage: str, say: Callable[[str], object]) -> StageRun:
        """Bring one stage up to date; its upstream stages must be.

        Args:
            stage: as DVC addresses it, `train@biscuit`.
            say: receives every line as it comes.

        Raises:
            PipelineError: it failed, or the files stayed busy; with the last words of the stage.
        """
        started = time.monotonic()
        note_photos(self.root, stage)
        lines = self._patiently(stage, ["repro", *self._fetching(stage), "--single-item", stage], say)
        note_photos(self.root, stage)
        return StageRun(stage, _outcome(lines), time.monotonic() - started, _note(lines))

    def experiment(
        self, name: str, overrides: Sequence[str], stages: Sequence[str], say: Callable[[str], object]
    ) -> None:
        """Run stages, and all they need, with other parameters in a folder of their own; the project stays as it is.

        Args:
            name: under which DVC keeps the result.
            overrides: train.learning_rate=5e-05 and so on.
            stages: as DVC addresses them.
            say: receives every line as it comes.

        Raises:
            PipelineError: a stage failed; with its last words.
        """
        settings = [part for override in overrides for part in ("--set-param", override)]
        home = notes_folder(self.root)
        place = home if home.is_dir() else None  # without a .dvc folder DVC refuses, and says why
        with tempfile.TemporaryDirectory(prefix=f"{name}-", dir=place, ignore_cleanup_errors=True) as notes:
            self._patiently(name, ["exp", "run", "--temp", "--name", name, *settings, *stages], say, Path(notes))

    def stop(self) -> dict[str, str]:
        """Stop the stages that run, and start no more: each may save its state first.

        Returns:
            What each of them said of its state; empty words of one that has none.
        """
        self.stopped.set()
        running = dict(self._children)
        stop_trees(running)
        deadline = time.monotonic() + _GRACE  # of a stage whose DVC is gone its words alone tell when it has ended
        while self._children.keys() & running and time.monotonic() < deadline:
            time.sleep(0.05)
        return {stage: self._saved.get(stage, "") for stage in running.values()}

    def _patiently(
        self, what: str, arguments: Sequence[str], say: Callable[[str], object], notes: Path | None = None
    ) -> list[str]:
        """Run DVC and return what it said, again and again while others work on the same files."""
        for pause in pauses(self.patience):
            code, lines = self._once(what, arguments, say, notes)
            if code == 0:
                return lines
            if self.stopped.is_set() or not _is_busy(lines):
                break
            say(f"{what}: another process works on the same files; trying again in {pause:.0f} s")
            self._sleep(pause)
        raise PipelineError(f"{what}: {_reason(code, lines)}")

    def _once(
        self, what: str, arguments: Sequence[str], say: Callable[[str], object], notes: Path | None
    ) -> tuple[int, list[str]]:
        if self.stopped.is_set():
            raise PipelineError(f"{what}: not started, the run was stopped; run it again")
        lines: deque[str] = deque(maxlen=_KEPT_LINES)
        # The same session and process group on purpose: whoever stops the group stops the stage with it.
        with subprocess.Popen(
            [*DVC, "--wait-for-lock", *arguments],
            cwd=self.root,
            env=child_environment(self.root, self.threads.get(what.partition("@")[0]), notes),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
        ) as child:
            self._children[child.pid] = what
            try:
                if self.stopped.is_set():  # between the look above and this line: `stop` may not have seen it
                    raise PipelineError(f"{what}: the run was stopped; run it again")
                for line in _lines(child):
                    lines.append(line)
                    if line.startswith(_INTERRUPTED):
                        self._saved[what] = line.removeprefix(_INTERRUPTED)
                    if not line.startswith(_TOLD_ANYWAY):
                        say(line)
                child.wait()
            except BaseException:
                stop_trees([child.pid])
                raise
            finally:
                self._children.pop(child.pid, None)
        return child.returncode, list(lines)

    def _fetching(self, stage: str) -> list[str]:
        if self.wanted is None:
            return []
        return ["--pull"] if stage.partition("@")[0] in self.wanted else ["--pull", "--allow-missing"]


def stop_all() -> dict[str, str]:
    """Stop all runners of this process; return what their stages said, see `DvcRunner.stop`."""
    return {stage: said for runner in list(_runners) for stage, said in runner.stop().items()}


def _lines(child: "subprocess.Popen[str]") -> Iterator[str]:
    """Yield what a child prints; text mode makes lines of the carriage returns of a progress bar."""
    assert child.stdout is not None
    for line in child.stdout:
        if line.strip() and not line.strip().startswith(_ADVICE):
            yield redact(line.rstrip())


def pauses(patience: float) -> Iterator[float]:
    """Yield 1, 2, 4, ... seconds, at most 30 each, until their sum reaches the patience."""
    pause, waited = 1.0, 0.0
    while waited < patience or not waited:
        yield pause
        waited += pause
        pause = min(2 * pause, _LONGEST_PAUSE)


def _is_busy(lines: list[str]) -> bool:
    """Tell whether DVC waits for files, or a stage for another process at the same work."""
    if any(line.startswith(_RUNNING) for line in lines):
        return True
    return any(line.startswith("ERROR: ") and busy in line for line in lines for busy in _BUSY)


def _outcome(lines: list[str]) -> Outcome:
    if any(line.startswith(("Running stage ", "Verifying data sources")) for line in lines):
        return "ran"
    return "restored" if any(line.endswith("checking out outputs") for line in lines) else "unchanged"


def _note(lines: list[str]) -> str:
    return next((line for line in reversed(lines) if " reused" in line and line.startswith("prior ")), "")


def _reason(code: int, lines: list[str]) -> str:
    """Say why a stage failed: its own E_CODE lines, else its last words, else DVC's."""
    exited = next((line.rpartition("exited with ")[2] for line in reversed(lines) if "exited with " in line), str(code))
    codes = [line for line in lines if line.startswith("E_")]
    others = [line for line in codes if not line.startswith(_INTERRUPTED)]
    if exited == str(RESUME) and not others:  # E_RUNNING exits with the same code, and says who runs
        return "stopped with its state saved; run it again to continue"
    if _is_busy(lines) and not codes:
        return " ".join(line.strip() for line in lines if "busy" in line or "(PID" in line)
    own = [line for line in lines if not line.startswith(_CHATTER)]
    told = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return f"{' | '.join(codes or own[-1:] or told[-1:] or ['it said nothing'])} (exit {exited})"


def stop_trees(pids: Iterable[int]) -> None:
    """End children and all below them: stages first, so that DVC sees them end; all are told before one is awaited."""
    told: list[psutil.Process] = []
    idle: list[psutil.Process] = []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            parent = psutil.Process(pid)
            below = parent.children(recursive=True)
            for process in below:
                tell(process.terminate)
            told += [*below, parent]
            idle += [] if below else [parent]
    for process in _still_there(idle, _UNWINDING):  # its stage may have heard the same signal as we
        tell(process.terminate)
    for process in _still_there(told, _GRACE):
        tell(process.kill)


def _still_there(processes: Iterable[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Return which processes have not ended after so many seconds.

    psutil's own wait would reap a child, and its Popen would then report exit code 0.
    """
    deadline = time.monotonic() + seconds
    while (left := [one for one in processes if is_alive(one)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left
