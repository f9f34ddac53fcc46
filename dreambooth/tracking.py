"""Send the parameters, curves and pictures of a run to MLflow without ever stopping or slowing the run.

A thread of its own does all the sending. What could not be sent when a run ends waits in <scratch>/unsent: the next
run sends it, or `python -m dreambooth.tracking`. Sending twice is harmless: every metric carries its own time.
"""

import json
import logging
import os
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from dreambooth.folders import scratch_folder, write_file
from dreambooth.interruption import Interrupted
from dreambooth.mlflowstore import connect, ensure_run, explain, http_status, tracking_uri
from dreambooth.redaction import redact

PENDING = "pending.json"
FLUSH_ENTRIES = 500
FLUSH_SECONDS = 5.0
CLOSE_SECONDS = 60.0
KILLED_SECONDS = 10.0  # a stopped stage has 30 s, part of which its checkpoint needs
MAX_PAUSE_SECONDS = 60.0
MAX_BUFFERED = 500_000
MAX_METRICS_PER_BATCH = 1000  # mlflow.utils.validation
MAX_PARAMS_PER_BATCH = 100  # the same, for tags too
MAX_VALUE_LENGTH = 1000  # MLflow takes 6000; nobody reads more than this in a table

_log = logging.getLogger(__name__)

Status = Literal["FINISHED", "FAILED", "KILLED"]


@contextmanager
def open_run(root: Path, *, key: str, name: str, tags: Mapping[str, str] | None = None) -> "Iterator[Run]":
    """Open the run with this key, or a new one; close it as FINISHED, FAILED or KILLED.

    Never raises, also on a full disk, and never waits for MLflow, but for CLOSE_SECONDS at its end.
    DREAMBOOTH_TRACKING=off sends nothing.

    Args:
        root: of the project.
        key: hash of what the run works on: the stages of one model share one run.
        name: of a new run, for people.
        tags: set on a new and on an old run.
    """
    run = Run(root, key, name, tags or {})
    try:
        yield run
    except (KeyboardInterrupt, SystemExit, Interrupted):
        run.close("KILLED")
        raise
    except BaseException:
        run.close("FAILED")
        raise
    run.close("FINISHED")


@dataclass
class _Parcel:
    """What still has to reach one run; JSON once its process has ended."""

    key: str
    name: str
    tags: dict[str, str] = field(default_factory=dict)
    params: dict[str, str] = field(default_factory=dict)
    metrics: list[tuple[str, float, int, int]] = field(default_factory=list)  # name, value, milliseconds, step
    files: list[tuple[str, str]] = field(default_factory=list)  # file, folder in the run
    end: tuple[str, int] | None = None  # status, milliseconds

    def __bool__(self) -> bool:
        return bool(self.tags or self.params or self.metrics or self.files or self.end)

    def __str__(self) -> str:
        parts = {"metrics": self.metrics, "parameters": self.params, "tags": self.tags, "files": self.files}
        return ", ".join(f"{len(things)} {what}" for what, things in parts.items() if things) or "its end"


class Run:
    """A run of MLflow that takes everything at once and sends it later, from a thread of its own.

    Args:
        root: of the project.
        key: see `open_run`.
        name: see `open_run`.
        tags: see `open_run`.
    """

    def __init__(self, root: Path, key: str, name: str, tags: Mapping[str, str]) -> None:
        if not re.fullmatch(r"[\w.-]+", key):
            raise ValueError(f"the key of a run should be a hash (got {key!r})")
        self._root = root
        self._parcel = _Parcel(key, name, {_name_for_mlflow(k): _clip(v) for k, v in tags.items()})
        self._folder: Path | None = None
        self._lost = 0
        self._not_kept: list[str] = []
        self._error: Exception | None = None
        self._closing = False
        self._wake = threading.Event()
        self._off = os.environ.get("DREAMBOOTH_TRACKING") == "off"
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        if not self._off:
            self._thread.start()

    def params(self, values: Mapping[str, Any]) -> None:
        """Note parameters: a flat map of names to anything that `str` shows.

        A parameter that an earlier opening of the run has noted with another value becomes a tag `changed.<name>`:
        MLflow never changes a parameter.
        """
        self._parcel.params |= {_name_for_mlflow(name): _clip(value) for name, value in values.items()}
        self._wake.set()

    def tag(self, name: str, value: str) -> None:
        """Note a tag, in place of an earlier one of that name."""
        self._parcel.tags |= {_name_for_mlflow(name): _clip(value)}
        self._wake.set()

    def metrics(self, values: Mapping[str, float | None], step: int = 0) -> None:
        """Note one point of several curves: costs microseconds, sent within FLUSH_SECONDS."""
        if self._off:
            return
        now = int(time.time() * 1000)
        waiting = self._parcel.metrics
        if len(waiting) >= MAX_BUFFERED:
            self._lost += len(values)
            return
        waiting.extend((name, float(value), now, step) for name, value in values.items() if value is not None)
        if len(waiting) >= FLUSH_ENTRIES and self._error is None:
            self._wake.set()

    def file(self, path: Path, folder: str = "") -> None:
        """Note a file as it is now: it may be changed or moved afterwards."""
        if self._off:
            return
        try:
            kept = self._copy(path)
        except OSError as error:  # a disk that is full: what the run makes is worth more than its copy in MLflow
            self._not_kept.append(f"{path.name}: {explain(error)}")
            return
        self._parcel.files.append((str(kept), folder))
        self._wake.set()

    def close(self, status: Status = "FINISHED") -> None:
        """Send the rest for at most CLOSE_SECONDS; say in one line what could not be sent, and keep that.

        Args:
            status: KILLED waits for KILLED_SECONDS only.
        """
        if self._closing or self._off:
            return
        self._parcel.end = (status, int(time.time() * 1000))
        self._closing = True
        self._wake.set()
        self._thread.join(KILLED_SECONDS if status == "KILLED" else CLOSE_SECONDS)
        if self._parcel or self._thread.is_alive():
            try:
                self._keep_for_later()
            except OSError as error:
                lost = (self._parcel.name, self._parcel, explain(error))
                _log.warning("MLflow did not take all of %r, and %s cannot be kept for the next run: %s", *lost)
                self._remove_folder()
        else:
            self._remove_folder()
        if self._not_kept:
            lost_files = (len(self._not_kept), self._parcel.name, self._not_kept[0])
            _log.warning("%d files of %r were not sent to MLflow: no copy could be made (%s)", *lost_files)
        if self._lost:
            _log.warning("%d metrics of %r were dropped: MLflow did not answer", self._lost, self._parcel.name)

    def _copy(self, path: Path) -> Path:
        place = Path(tempfile.mkdtemp(dir=self._own_folder()))
        try:
            return shutil.copyfile(path, place / path.name)
        except OSError:
            shutil.rmtree(place)  # half a copy would keep the disk full
            raise

    def _remove_folder(self) -> None:
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _own_folder(self) -> Path:
        if self._folder is None:
            waiting = unsent(self._root)
            waiting.mkdir(mode=0o700, exist_ok=True)
            self._folder = Path(tempfile.mkdtemp(prefix=f"{self._parcel.key[:16]}-", dir=waiting))
        return self._folder

    def _work(self) -> None:
        """Send until closed; wait twice as long after every failure; give up when MLflow says no."""
        pause, target = FLUSH_SECONDS, None
        while True:
            closing = self._closing
            try:
                target = target or _Target(self._root, self._parcel)
                target.send(self._parcel)
                pause, self._error = FLUSH_SECONDS, None
            except Exception as error:  # whatever it is: a training is worth more than its curves
                pause, self._error = min(2 * pause, MAX_PAUSE_SECONDS), error
                if _is_final(error):
                    return
            if closing:
                return
            self._wake.wait(pause)
            self._wake.clear()

    def _keep_for_later(self) -> None:
        folder = self._own_folder()
        write_file(folder / PENDING, json.dumps(asdict(self._parcel)).encode())
        uri = redact(tracking_uri(self._root))
        reason = explain(self._error) if self._error else "no answer in time"
        _log.warning(
            "MLflow at %s did not take all of %r (%s): %s wait in %s; the next run sends them, "
            "or `python -m dreambooth.tracking` in the project",
            *(uri, self._parcel.name, reason, self._parcel, folder),
        )


class _Target:
    """A run in the store of MLflow, found or made."""

    def __init__(self, root: Path, parcel: _Parcel, resending: bool = False) -> None:
        self._client, experiment = connect(root)
        self._run_id = ensure_run(self._client, experiment, parcel.key, parcel.name)
        if not resending:
            self._client.update_run(self._run_id, status="RUNNING")
            resend(root)

    def send(self, parcel: _Parcel) -> None:
        """Send a parcel in order, and take out of it what has arrived."""
        if parcel.tags or parcel.params:
            self._send_names(parcel)
        while parcel.metrics:
            batch = parcel.metrics[:MAX_METRICS_PER_BATCH]
            self._send_metrics(batch)
            del parcel.metrics[: len(batch)]
        while parcel.files:
            path, folder = parcel.files[0]
            self._client.log_artifact(self._run_id, path, folder or None)
            shutil.rmtree(Path(path).parent, ignore_errors=True)
            del parcel.files[0]
        if parcel.end:
            status, end = parcel.end
            self._client.set_terminated(self._run_id, status, end)
            parcel.end = None

    def _send_metrics(self, batch: Sequence[tuple[str, float, int, int]]) -> None:
        from mlflow.entities import Metric

        self._client.log_batch(self._run_id, metrics=[Metric(_name_for_mlflow(name), *rest) for name, *rest in batch])

    def _send_names(self, parcel: _Parcel) -> None:
        from mlflow.entities import Param, RunTag

        tags, params = dict(parcel.tags), dict(parcel.params)
        known = self._client.get_run(self._run_id).data.params if params else {}
        changed = {f"changed.{name}": value for name, value in params.items() if known.get(name, value) != value}
        new = [Param(name, value) for name, value in params.items() if name not in known]
        for part in _parts(new, MAX_PARAMS_PER_BATCH):
            self._client.log_batch(self._run_id, params=part)
        for part in _parts([RunTag(*tag) for tag in (tags | changed).items()], MAX_PARAMS_PER_BATCH):
            self._client.log_batch(self._run_id, tags=part)
        _forget(parcel.tags, tags)
        _forget(parcel.params, params)


def resend(root: Path) -> list[str]:
    """Send what earlier runs could not; return a line for each that still waits, with the reason."""
    failed = []
    for pending in sorted(unsent(root).glob(f"*/{PENDING}")):
        try:
            with FileLock(pending.with_name(".lock"), timeout=0):
                parcel = _read_parcel(pending)
                _Target(root, parcel, resending=True).send(parcel)
                shutil.rmtree(pending.parent, ignore_errors=True)
        except (Timeout, FileNotFoundError):
            continue  # another process sends it, or has sent it
        except Exception as error:
            failed.append(f"{pending.parent} waits: {explain(error)}")
    return failed


def _read_parcel(path: Path) -> _Parcel:
    values = json.loads(path.read_text(encoding="utf-8"))
    return _Parcel(**values | {"files": [entry for entry in values["files"] if Path(entry[0]).exists()]})


def unsent(root: Path) -> Path:
    """Return the folder of what waits for MLflow, a folder with PENDING for each parcel."""
    return scratch_folder(root) / "unsent"


def _is_final(error: Exception) -> bool:
    """Tell whether trying again is useless: MLflow understood and said no."""
    status = http_status(error)
    return status is not None and 400 <= status < 500 and status not in (408, 429)


def _name_for_mlflow(name: str) -> str:
    """Replace what MLflow does not allow in a name."""
    return re.sub(r"[^\w\-. :/]", "_", name)[:250]


def _clip(value: Any) -> str:
    text = str(value)
    return text if len(text) <= MAX_VALUE_LENGTH else f"{text[: MAX_VALUE_LENGTH - 40]}... ({len(text)} characters)"


def _parts(things: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (things[start : start + size] for start in range(0, len(things), size))


def _forget(things: dict[str, str], sent: Mapping[str, str]) -> None:
    """Take out what was sent, unless it has got another value since."""
    for name, value in sent.items():
        if things.get(name) == value:
            del things[name]


def _main() -> int:
    failed = resend(Path())
    sys.stderr.writelines(f"{line}\n" for line in failed)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(_main())
