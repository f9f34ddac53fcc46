"""One optimizer step: what it needs, what it computes, and the state that the next one starts from.

B rows, C latent channels, H height and W width of the latents, L tokens, D text width.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, extract_model_from_parallel
from torch import Tensor

from dreambooth import dataset, loss, methods
from dreambooth.averaging import Average
from dreambooth.checkpoint import State, named_weights, restore_weights
from dreambooth.dataset import Batch, Row, Sample
from dreambooth.errors import OutOfMemoryError, TrainingError, first_line, is_out_of_memory
from dreambooth.families import SDXL, condition
from dreambooth.models import Model
from dreambooth.optimizers import make_optimizer
from dreambooth.params import Train
from dreambooth.sampling import make_scheduler
from dreambooth.teacher import Teacher
from dreambooth.texts import TextSource

_ADVICE = "lower train_batch_size and raise gradient_accumulation_steps, or set gradient_checkpointing (train: ...)"
_ADVICE_OPTIMIZER = "train fewer weights (train.method: lora), or with smaller moments (train.optimizer: adamw_8bit)"
_AVERAGE = "average"
_PATIENCE = timedelta(hours=2)  # of processes for the first one, which draws previews and writes checkpoints


@dataclass
class Trainer:
    """What a step needs, on its device."""

    accelerator: Accelerator
    model: Model
    modules: dict[str, torch.nn.Module]
    """UNet and text encoders by name, wrapped for precision and processes where that is needed."""
    optimizer: torch.optim.Optimizer
    trained: dict[str, torch.nn.Module]
    trainable: list[torch.nn.Parameter]
    text: TextSource
    teacher: Teacher | None
    """Of the rows that the base teaches."""
    average: Average | None
    """Of the trained weights, which it replaces in the end."""
    alphas_cumprod: Tensor
    prediction_type: loss.PredictionType
    settings: Train
    parts: int
    """Forward passes in a step: as set, or twice as many after memory ran out."""
    checkpointing: bool
    """Whether activations are computed again in the backward pass: as set, or after memory ran out."""

    @property
    def processes(self) -> int:
        """How many processes share the rows of a step."""
        return int(self.accelerator.num_processes)

    @property
    def rows_per_step(self) -> int:
        """Instance rows of a step, over all of its forward passes and processes."""
        return self.settings.train_batch_size * self.settings.gradient_accumulation_steps * self.processes

    @property
    def rows_per_pass(self) -> int:
        """Instance rows of a forward pass of this process: it is known that so many fit, with their gradients."""
        return self.rows_per_step // (self.parts * self.processes)


def prepare(model: Model, samples: Sequence[Sample], settings: Train) -> Trainer:
    """Put optimizer, precision and processes around a model's trainable parts.

    A model without an autoencoder draws no previews: text encoders that are frozen have then been asked for the last
    time, and leave the memory.
    """
    if settings.mixed_precision == "fp16" and model.device.type == "cpu":
        raise TrainingError('train.mixed_precision: fp16 needs a GPU; write "no" or "bf16"')
    accelerator = Accelerator(
        mixed_precision=settings.mixed_precision,
        cpu=model.device.type == "cpu",
        kwargs_handlers=[
            # SDXL reads the layer before the last of its first text encoder: the last one never gets a gradient.
            DistributedDataParallelKwargs(
                find_unused_parameters=model.family is SDXL and methods.reads_trained_text(settings),
                gradient_as_bucket_view=True,
            ),
            InitProcessGroupKwargs(timeout=_PATIENCE),
        ],
    )
    trained = methods.make_trainable(model, settings)
    reads_text = [name for name in model.encoders if name in trained]
    text = TextSource(model, [sample.prompt for sample in samples], trained=bool(reads_text))
    taught = [sample.prompt for sample in samples if sample.taught]
    teacher = Teacher(model, taught, settings) if taught else None
    if model.vae is None and not reads_text:
        for name in model.encoders:
            setattr(model, name, None)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = settings.allow_tf32
    if settings.gradient_checkpointing is True:
        model.unet.enable_gradient_checkpointing()
    trainable = [parameter for _, parameter in named_weights(trained)]
    require_float32(trainable)
    _leave_file(trainable)
    optimizer = make_optimizer(methods.parameter_groups(trained, settings), settings)
    scheduler = make_scheduler("ddim", model.scheduler_config)
    return Trainer(
        accelerator=accelerator,
        model=model,
        modules={
            # evaluation_mode: precision only; what is frozen has no gradients that processes could share
            name: accelerator.prepare_model(module, evaluation_mode=name not in trained)
            if name == "unet" or name in reads_text
            else module
            for name, module in {"unet": model.unet, **model.encoders}.items()
        },
        optimizer=accelerator.prepare(optimizer),
        trained=trained,
        trainable=trainable,
        text=text,
        teacher=teacher,
        average=Average(dict(named_weights(trained)), settings.ema_decay) if settings.ema_decay else None,
        alphas_cumprod=scheduler.alphas_cumprod.float().to(accelerator.device),
        prediction_type=_prediction_type(scheduler.config.prediction_type),
        settings=settings,
        parts=settings.gradient_accumulation_steps,
        checkpointing=settings.gradient_checkpointing is True,
    )


def _leave_file(weights: Sequence[Tensor]) -> None:
    """Copy weights out of the file that they are mapped from, on the CPU: each would be copied by its first update.

    As long as one of them is a view of the mapped file, all of it counts as memory of this process: 2.5 GB of SD1.5.
    """
    for weight in weights:
        if weight.device.type == "cpu":
            weight.data = weight.data.clone()


def release(model: Model) -> None:
    """Remove accelerate's mixed-precision wrapper, and put the parts into evaluation mode."""
    for name in ("unet", *model.encoders):
        module = extract_model_from_parallel(getattr(model, name), keep_fp32_wrapper=False)
        setattr(model, name, module.requires_grad_(False).eval())
    methods.settle(model)
    # Else the next training of this process could choose neither another precision nor another device.
    AcceleratorState._reset_state(reset_partial_state=True)


def take_step(trainer: Trainer, rows: Sequence[Row], step: int, learning_rate: float) -> dict[str, Tensor]:
    """Take one optimizer step; where memory runs out, again with less need of it, as far as that is allowed.

    The rows and their noise are the same however they are dealt, so the step is the same within rounding.

    Raises:
        OutOfMemoryError: it does not fit, and nothing is left that could be saved.
    """
    while True:
        try:
            return train_step(trainer, rows, step, learning_rate)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = first_line(error)
        # Not in the except block: the traceback would keep alive what has to be freed. What the failed parts left too.
        trainer.optimizer.zero_grad(set_to_none=True)
        _save_memory(trainer, reason, step)
        if trainer.accelerator.device.type == "cuda":
            torch.cuda.empty_cache()


def train_step(trainer: Trainer, rows: Sequence[Row], step: int, learning_rate: float) -> dict[str, Tensor]:
    """Take one optimizer step over this process's share of its rows.

    Returns:
        loss, loss_instance, loss_prior and grad_norm as tensors on the device, so that no step waits for them; the
        losses are of this process's rows.
    """
    for group in trainer.optimizer.param_groups:
        group["lr"] = learning_rate * group["factor"]
    parts = dataset.micro_batches(rows, trainer.parts * trainer.processes)
    own = parts[trainer.accelerator.process_index :: trainer.processes]
    results = [_accumulate(trainer, part, step, len(own), number == len(own) - 1) for number, part in enumerate(own)]
    grad_norm = _update(trainer, step)
    if trainer.average is not None:
        trainer.average.update(trainer.trainable, step)
    means = {name: torch.stack([result[name] for result in results]).mean() for name in results[0]}
    return means | {"grad_norm": grad_norm}


def _update(trainer: Trainer, step: int) -> Tensor:
    """Clip the gradients, move the weights, and return the norm from before.

    Raises:
        OutOfMemoryError: some weights may have moved, so that the step cannot be taken again.
    """
    try:
        grad_norm: Tensor = trainer.accelerator.clip_grad_norm_(trainer.trainable, trainer.settings.max_grad_norm)
        trainer.optimizer.step()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = first_line(error)
        raise OutOfMemoryError(f"{reason} in the optimizer at step {step}; {_ADVICE_OPTIMIZER}") from error
    trainer.optimizer.zero_grad(set_to_none=True)
    return grad_norm


def _accumulate(trainer: Trainer, part: Sequence[Row], step: int, share: int, is_last: bool) -> dict[str, Tensor]:
    """Add the gradients of a micro-batch, a forward pass for each shape of its rows, usually one.

    Args:
        trainer: gets the gradients.
        part: rows of the micro-batch.
        step: from 0.
        share: how many micro-batches this process has in the step.
        is_last: of them.
    """
    passes = dataset.by_shape(part, lambda row: row.sample.posterior.mean)
    instances = sum(row.sample.role == "instance" for row in part)
    found = []
    for number, rows in enumerate(passes):
        batch = _collate(trainer, rows, step, instances)
        with ExitStack() as stack:
            if not (is_last and number == len(passes) - 1):  # gradients meet those of other processes once a step
                for module in trainer.modules.values():
                    stack.enter_context(trainer.accelerator.no_sync(module))
            step_loss, losses = forward(trainer, batch)
            trainer.accelerator.backward(step_loss / share)
        found.append((step_loss.detach(), losses, batch.is_instance))
    step_losses, row_losses, are_instance = zip(*found, strict=True)
    return _means(torch.stack(step_losses).sum(), torch.cat(row_losses), torch.cat(are_instance))


def forward(trainer: Trainer, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the loss of a micro-batch on its device, and the (B,) losses of its rows before any weight."""
    losses = row_losses(trainer, batch, trainer.modules)
    alpha_bar = trainer.alphas_cumprod[batch.timesteps]
    snr_weights = loss.min_snr_weights(trainer.prediction_type, alpha_bar, trainer.settings.snr_gamma)
    return loss.dreambooth_loss(losses, batch.weights * snr_weights, batch.instances), losses.detach()


def row_losses(trainer: Trainer, batch: Batch, modules: Mapping[str, torch.nn.Module]) -> Tensor:
    """Return the (B,) losses of rows before any weight, by the UNet and text encoders that are given."""
    alpha_bar = trainer.alphas_cumprod[batch.timesteps]
    noisy_latents = loss.add_noise(batch.latents, batch.noise, alpha_bar)
    text = trainer.text.encode(batch.prompts, [modules[name] for name in trainer.model.encoders])
    model_pred = modules["unet"](noisy_latents, batch.timesteps, **condition(text, batch.sizes)).sample
    target = loss.prediction_target(trainer.prediction_type, batch.latents, batch.noise, alpha_bar)
    if trainer.teacher is not None:
        with trainer.accelerator.autocast():
            target = trainer.teacher.replace(target, noisy_latents, batch)
    return loss.row_losses(model_pred, target, trainer.settings.huber_c)


def _collate(trainer: Trainer, rows: Sequence[Row], step: int, instances: int) -> Batch:
    settings = trainer.settings
    batch = dataset.collate(rows, step, len(trainer.alphas_cumprod), settings.seed, settings.noise_offset, instances)
    return batch.on(trainer.accelerator.device)


def capture(trainer: Trainer, step: int, records: Mapping[str, Any]) -> State:
    """Return the state after `step` optimizer steps, in the trainer's own tensors, which the next step changes."""
    moments: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for name, parameter in named_weights(trainer.trained):
        for key, value in trainer.optimizer.state[parameter].items():
            if isinstance(value, Tensor):
                moments[f"{name}/{key}"] = value
            else:
                plain[f"{name}/{key}"] = value
    if trainer.average is not None:
        moments |= {f"{name}/{_AVERAGE}": value for name, value in trainer.average.values.items()}
    scaler = trainer.accelerator.scaler
    return State(
        step=step,
        weights=dict(named_weights(trainer.trained)),
        moments=moments,
        plain={
            "optimizer": plain,
            "groups": [_numbers(group) for group in trainer.optimizer.param_groups],
            "scaler": scaler.state_dict() if scaler is not None else {},
            "parts": trainer.parts,
            "checkpointing": trainer.checkpointing,
        },
        records=dict(records),
    )


def restore(trainer: Trainer, state: State) -> None:
    """Put weights, optimizer, scaler and accumulation where they were.

    Raises:
        TrainingError: the state is of other weights.
    """
    restore_weights(trainer.trained, state.weights)
    for name, parameter in named_weights(trainer.trained):
        entry = trainer.optimizer.state[parameter]
        prefix = f"{name}/"
        for key, value in state.plain["optimizer"].items():
            if key.startswith(prefix):
                entry[key.removeprefix(prefix)] = value
        for key in [key for key in state.moments if key.startswith(prefix)]:
            saved = state.moments[key]
            if key == prefix + _AVERAGE:
                if trainer.average is not None:
                    trainer.average.values[name].copy_(saved)
                continue
            # In the weight's own memory format: the fused kernel reads both in the order of memory.
            place = torch.empty_like(parameter) if saved.shape == parameter.shape else torch.empty_like(saved)
            entry[key.removeprefix(prefix)] = place.detach().to(parameter.device, saved.dtype).copy_(saved)
    if trainer.accelerator.scaler is not None:
        trainer.accelerator.scaler.load_state_dict(state.plain["scaler"])
    for group, numbers in zip(trainer.optimizer.param_groups, state.plain["groups"], strict=True):
        group.update(numbers)
    trainer.parts = state.plain["parts"]
    if state.plain["checkpointing"] and not trainer.checkpointing:
        trainer.model.unet.enable_gradient_checkpointing()
        trainer.checkpointing = True


def require_float32(parameters: Sequence[torch.nn.Parameter]) -> None:
    """Refuse trainable weights below float32: small steps would be rounded away."""
    kinds = {parameter.dtype for parameter in parameters} - {torch.float32}
    if kinds:
        raise TrainingError(f"trainable weights are {kinds}; load the model in float32 and set train.mixed_precision")


def _save_memory(trainer: Trainer, reason: str, step: int) -> None:
    """Find a way that needs less memory: compute activations again, then deal the step into twice as many parts.

    Raises:
        OutOfMemoryError: neither is allowed, or both were done before.
    """
    if trainer.settings.gradient_checkpointing == "auto" and not trainer.checkpointing and trainer.processes == 1:
        trainer.model.unet.enable_gradient_checkpointing()
        trainer.checkpointing = True
        return
    _require_halving(trainer, reason, step)
    trainer.parts *= 2


def _require_halving(trainer: Trainer, reason: str, step: int) -> None:
    """Refuse to deal a step into twice as many parts where that is not allowed, not possible, or was done before."""
    settings, share = trainer.settings, trainer.settings.train_batch_size
    if trainer.processes > 1 or not settings.halve_batch_on_out_of_memory:
        allowed = "" if trainer.processes > 1 else ", or allow train.halve_batch_on_out_of_memory: true"
        raise OutOfMemoryError(f"{reason} at step {step}; {_ADVICE}{allowed}")
    if trainer.parts > settings.gradient_accumulation_steps or share % 2:
        again = "at half the batch too" if share % 2 == 0 else f"and a batch of {share} has no half"
        raise OutOfMemoryError(f"{reason} at step {step}, {again}; {_ADVICE}")


def _numbers(group: Mapping[str, Any]) -> dict[str, float]:
    """Return what an optimizer counts in a group besides tensors: Prodigy keeps its rate there."""
    return {key: value for key, value in group.items() if type(value) in (int, float) and key != "lr"}


def _means(step_loss: Tensor, losses: Tensor, is_instance: Tensor) -> dict[str, Tensor]:
    """Means of the losses by role; NaN where a batch has no prior rows. Without indexing, which waits for a GPU."""
    mask = is_instance.to(losses.dtype)
    return {
        "loss": step_loss,
        "loss_instance": (losses * mask).sum() / mask.sum(),
        "loss_prior": (losses * (1 - mask)).sum() / (1 - mask).sum(),
    }


def _prediction_type(name: str) -> loss.PredictionType:
    if name == "epsilon":
        return "epsilon"
    if name == "v_prediction":
        return "v_prediction"
    raise TrainingError(f"the base model predicts {name!r}; only epsilon and v_prediction can be trained")
