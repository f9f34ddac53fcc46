"""Tell trackers beside MLflow of a training, through those of accelerate: TensorBoard, Weights & Biases.

Their logs lie in the scratch folder, so that `dreambooth forget` finds them: `tensorboard --logdir .scratch/trackers`.
"""

import importlib.util
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker
from PIL import Image

from dreambooth.errors import TrackerError

PROJECT = "dreambooth"
_log = logging.getLogger(__name__)


def require_trackers(names: Sequence[str]) -> None:
    """Refuse trackers whose package is missing, before anything is loaded."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise TrackerError(
                f"tracking.report_to: {name} is not installed; pip install 'dreambooth[{name}]', or take it out"
            )


class Trackers:
    """Several trackers as one; one that fails is left out from then on, with a warning: a training is worth more."""

    def __init__(self) -> None:
        self._open: list[GeneralTracker] = []

    def add(self, tracker: GeneralTracker) -> None:
        """Take one that has been started."""
        self._open.append(tracker)

    def params(self, values: Mapping[str, Any]) -> None:
        """Note parameters; what is no number or text is noted as text."""
        plain = {key: one if isinstance(one, bool | int | float | str) else str(one) for key, one in values.items()}
        self._each(lambda tracker: tracker.store_init_configuration(dict(plain)))

    def metrics(self, values: Mapping[str, float | None], step: int = 0) -> None:
        """Note one point of several curves, at once."""
        known = {name: float(value) for name, value in values.items() if value is not None}
        self._each(lambda tracker: tracker.log(dict(known), step=step))

    def pictures(self, images: Sequence[Image.Image], name: str, step: int) -> None:
        """Note N pictures of one size."""
        arrays = np.stack([np.asarray(image.convert("RGB")) for image in images])
        self._each(lambda tracker: tracker.log_images({name: arrays}, step=step, **_layout(tracker)))

    def close(self) -> None:
        """Close those that are still open."""
        for tracker in self._open:
            with suppress(Exception):  # nothing can be mended any more
                _close(tracker)
        self._open.clear()

    def _each(self, tell: Callable[[GeneralTracker], object]) -> None:
        for tracker in tuple(self._open):
            try:
                tell(tracker)
            except Exception as error:  # whatever it is: a training is worth more than its curves
                _log.warning("%s is told nothing more of this training: %s", tracker.name, error)
                self._open.remove(tracker)


@contextmanager
def open_trackers(names: Sequence[str], folder: Path, key: str, name: str) -> Iterator[Trackers]:
    """Start trackers, and close them at the end.

    Args:
        names: tensorboard, wandb; none is fine.
        folder: where their logs lie.
        key: hash of the training: the same one goes on in the same run.
        name: of the run, for people.

    Raises:
        TrackerError: one is missing or does not start.
    """
    require_trackers(names)
    if names:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        PartialState(cpu=not torch.cuda.is_available())  # where the log of accelerate looks up which process this is
    trackers = Trackers()
    try:
        for one in names:
            trackers.add(_start(one, folder, key, name))
        yield trackers
    finally:
        trackers.close()


def _start(kind: str, folder: Path, key: str, name: str) -> GeneralTracker:
    tracker = (
        TensorBoardTracker(key[:16], folder)
        if kind == "tensorboard"
        else WandBTracker(PROJECT, dir=str(folder), id=key[:16], name=name, resume="allow")
    )
    try:
        tracker.start()
    except Exception as error:  # of wandb: no account, no network, an old server
        reason = " ".join(str(error).split()) or type(error).__name__
        raise TrackerError(
            f"tracking.report_to: {kind} does not start ({reason}); "
            + ("wandb login, or WANDB_MODE=offline" if kind == "wandb" else f"look at {folder}")
        ) from error
    return tracker


def _layout(tracker: GeneralTracker) -> dict[str, str]:
    return {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}


def _close(tracker: GeneralTracker) -> None:
    """Close what the tracker writes into: by then the state of accelerate may be gone."""
    if tracker.name == "tensorboard":
        tracker.writer.close()
    else:
        tracker.run.finish()
