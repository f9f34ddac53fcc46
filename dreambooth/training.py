"""Train a UNet, and its text encoder, on rows of a subject and of its class: the loop around the step."""

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor

from dreambooth import dataset
from dreambooth.checkpoint import Checkpoints, restore_weights
from dreambooth.dataset import Sample
from dreambooth.errors import DivergedError
from dreambooth.evaluation_loss import EvaluationRecord, evaluate_loss, is_best, patience_is_out
from dreambooth.interruption import Interrupted, StopRequest, stop_request
from dreambooth.models import Model
from dreambooth.params import Train
from dreambooth.previews import Previews
from dreambooth.progress import progress_bar
from dreambooth.schedule import learning_rate_at, max_train_steps
from dreambooth.trainer import Trainer, capture, prepare, release, restore, take_step

FLUSH_EVERY = 10  # steps between two reads of the losses: reading one waits for the device


@dataclass(frozen=True)
class StepRecord:
    """The numbers of one optimizer step: the weighted loss, and the means of the losses by role, before any weight."""

    step: int
    loss: float
    loss_instance: float
    loss_prior: float
    grad_norm: float
    learning_rate: float


@dataclass
class History:
    """The numbers of a training so far."""

    steps: list[StepRecord] = field(default_factory=list)
    evaluations: list[EvaluationRecord] = field(default_factory=list)
    shipped_step: int | None = None
    """Whose weights are in the model, known at the end; None for the average over the steps."""

    @classmethod
    def of(cls, records: Any) -> "History":
        """Build it from what a checkpoint keeps, the result of `asdict`."""
        steps = [StepRecord(**record) for record in records["steps"]]
        return cls(steps, [EvaluationRecord(**record) for record in records["evaluations"]])


@dataclass(frozen=True)
class Listeners:
    """Who is told what while a training goes on; only the first of several processes tells."""

    records: Callable[[list[StepRecord]], object] = lambda records: None
    evaluation: Callable[[EvaluationRecord], object] = lambda record: None
    previews: Previews | None = None


def train(
    model: Model,
    instance: Sequence[Sample],
    prior: Sequence[Sample],
    settings: Train,
    listeners: Listeners | None = None,
    checkpoints: Checkpoints | None = None,
) -> History:
    """Train the weights of `model` in place, from the newest checkpoint if there is one.

    Args:
        model: in float32; its autoencoder is used for previews only. Where it is gone, frozen text encoders go too.
        instance: samples of the subject.
        prior: samples of its class, none without a prior.
        settings: of the training.
        listeners: are told the newest numbers every few steps.
        checkpoints: of this training alone; None writes none.

    Returns:
        One record for each optimizer step, those before the checkpoint too, and the evaluations.

    Raises:
        DivergedError: the loss is not finite any more; the last checkpoint is from before.
        OutOfMemoryError: a step does not fit; the last checkpoint is from before.
        DiskFullError: a checkpoint does not fit; the last one is whole.
        Interrupted: a signal asked to stop; the state is saved.
    """
    steps = max_train_steps(settings, len(instance))
    try:
        trainer = prepare(model, [*instance, *prior], settings)
        history = resume(trainer, checkpoints)
        with stop_request() as stop:
            _loop(trainer, instance, prior, history, steps, stop, listeners or Listeners(), checkpoints)
        if checkpoints:
            checkpoints.finish()
        history.shipped_step = _ship(trainer, history, checkpoints)
    except BaseException:
        if checkpoints:
            with suppress(Exception):  # what is being written may still end well; the first error is the one to tell
                checkpoints.finish()
        raise
    finally:
        release(model)
    return history


def resume(trainer: Trainer, checkpoints: Checkpoints | None) -> History:
    """Put a trainer where its newest checkpoint is; return the numbers up to there, none without a checkpoint.

    The first process chooses the checkpoint; every one reads and verifies it.
    """
    if checkpoints is None:
        return History()
    first = trainer.accelerator.is_main_process
    state = checkpoints.newest() if first else None
    if trainer.processes > 1:
        chosen = [state.step if state else None]
        broadcast_object_list(chosen)
        if not first and chosen[0] is not None:
            state = checkpoints.load_step(chosen[0])
    if state is None:
        return History()
    restore(trainer, state)
    return History.of(state.records)


def _loop(
    trainer: Trainer,
    instance: Sequence[Sample],
    prior: Sequence[Sample],
    history: History,
    steps: int,
    stop: StopRequest,
    listeners: Listeners,
    checkpoints: Checkpoints | None,
) -> None:
    """Take the steps, and after each what is due: numbers, evaluation, previews, checkpoint, the answer to a stop."""
    settings, first = trainer.settings, trainer.accelerator.is_main_process
    pending: list[dict[str, Any]] = []
    with progress_bar(steps, "train" if first else None, unit="step", initial=len(history.steps)) as bar:
        for step in range(len(history.steps), steps):
            if patience_is_out(history.evaluations, settings.early_stopping_patience):
                break
            rows = dataset.rows_of_step(
                step, trainer.rows_per_step, instance, prior, settings.prior_loss_weight, settings.seed
            )
            rate = learning_rate_at(step, settings, steps)
            pending.append({"step": step, "learning_rate": rate} | take_step(trainer, rows, step, rate))
            bar.update()
            done, stopping = step + 1, _agree(trainer, bool(stop))
            evaluating, drawing, saving = (
                every is not None and done % every == 0
                for every in (settings.evaluation_steps, settings.preview_steps, settings.checkpointing_steps)
            )
            if not (stopping or evaluating or drawing or saving or len(pending) == FLUSH_EVERY or done == steps):
                continue
            records = _to_records(trainer, pending)
            pending.clear()
            _require_finite(records, trainer)
            history.steps += records
            bar.set_postfix(loss=f"{records[-1].loss:.4f}", refresh=False)
            if first:
                listeners.records(records)
            if evaluating:
                history.evaluations.append(_shared(trainer, evaluate_loss(trainer, instance, prior, done)))
                if first:
                    listeners.evaluation(history.evaluations[-1])
            if drawing and first and listeners.previews:
                listeners.previews.draw(trainer.model, done, settings)
            better = evaluating and settings.load_best_model_at_end and is_best(history.evaluations)
            if checkpoints and first and done < steps and (saving or better or stopping):
                score = history.evaluations[-1].score if better else None
                checkpoints.begin_save(capture(trainer, done, asdict(history)), score)
            if stopping and done < steps:
                _stop(trainer, stop, done, steps, checkpoints)


def _stop(trainer: Trainer, stop: StopRequest, done: int, steps: int, checkpoints: Checkpoints | None) -> None:
    """Answer a stop: wait for the checkpoint, say how far it went."""
    if checkpoints:
        checkpoints.finish()
    trainer.accelerator.wait_for_everyone()  # a launcher ends the others when the first process has ended
    saved = "saved" if checkpoints else "lost"
    why = stop.signal.name if stop.signal else "a signal to another process"
    raise Interrupted(f"stopped by {why} after step {done} of {steps}, state {saved}")


def _ends_with_best(history: History) -> bool:
    """Whether the last step was measured, and nothing before it was better."""
    return is_best(history.evaluations) and history.evaluations[-1].step == len(history.steps)


def _ship(trainer: Trainer, history: History, checkpoints: Checkpoints | None) -> int | None:
    """Put the weights in place that are shipped; return their step, None for the average over the steps."""
    if trainer.average is not None:
        restore_weights(trainer.trained, trainer.average.values)
        return None
    ships_best = trainer.settings.load_best_model_at_end and not _ends_with_best(history)
    if checkpoints and ships_best and trainer.accelerator.is_main_process:  # who alone reads them, and what is made
        best = checkpoints.best()
        if best is not None:
            restore_weights(trainer.trained, best.weights)
            return best.step
        if history.evaluations:
            lowest = min(history.evaluations, key=lambda record: record.score)
            checkpoints.say(
                f"warning: ships the last weights: the checkpoint of the best step {lowest.step} is not in "
                f"{checkpoints.folder}"
            )
    return len(history.steps)


def _shared(trainer: Trainer, record: EvaluationRecord) -> EvaluationRecord:
    """Return what the first process measured: different cards may differ in a last bit, and decide differently."""
    records = [record]
    if trainer.processes > 1:
        broadcast_object_list(records)
    return records[0]


def _agree(trainer: Trainer, stop: bool) -> bool:
    """Whether any process was told to stop: all of them stop after the same step, or none."""
    if trainer.processes == 1:
        return stop
    told: Tensor = trainer.accelerator.reduce(torch.tensor([float(stop)], device=trainer.accelerator.device))
    return bool(told.item())


def _to_records(trainer: Trainer, pending: Sequence[dict[str, Any]]) -> list[StepRecord]:
    """Read the numbers of a few steps, averaged over the processes."""
    names = ("loss", "loss_instance", "loss_prior", "grad_norm")
    table = torch.stack([torch.stack([torch.as_tensor(entry[name]) for name in names]) for entry in pending])
    rows: list[list[float]] = trainer.accelerator.reduce(table, "mean").tolist()
    return [
        StepRecord(step=entry["step"], learning_rate=entry["learning_rate"], **dict(zip(names, row, strict=True)))
        for entry, row in zip(pending, rows, strict=True)
    ]


def _require_finite(records: Sequence[StepRecord], trainer: Trainer) -> None:
    """Refuse a loss or a gradient that is not finite; under fp16 the scaler skips such a gradient by itself."""
    skips = trainer.settings.mixed_precision == "fp16"
    for record in records:
        if not math.isfinite(record.loss) or not (math.isfinite(record.grad_norm) or skips):
            raise DivergedError(
                f"the loss is {record.loss}, the gradient's norm {record.grad_norm} at step {record.step}: "
                f'lower train.learning_rate (it was {record.learning_rate:g}) or set train.mixed_precision to "no"'
            )
    # The step that follows a finite gradient may still have been too large for a float.
    if not torch.stack(torch._foreach_norm(list(trainer.trainable))).isfinite().all():
        last = records[-1]
        raise DivergedError(
            f"weights are not finite after step {last.step}: lower train.learning_rate (it was {last.learning_rate:g})"
        )
