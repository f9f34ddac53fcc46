"""Train a UNet, and its text encoder, on rows of a subject and of its class: one step, and the loop around it.

B rows, C latent channels, H height and W width of the latents, L tokens, D text width.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import extract_model_from_parallel
from torch import Tensor

from dreambooth import dataset, loss
from dreambooth.checkpoint import Checkpoints, State, named_weights, restore_weights
from dreambooth.dataset import Batch, Sample
from dreambooth.errors import TrainingError
from dreambooth.interruption import Interrupted, StopRequest, stop_request
from dreambooth.models import Model
from dreambooth.params import Train
from dreambooth.progress import progress_bar
from dreambooth.sampling import make_scheduler, tokenize

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
class Trainer:
    """What a step needs, on its device."""

    accelerator: Accelerator
    unet: torch.nn.Module
    text_encoder: torch.nn.Module
    optimizer: torch.optim.Optimizer
    trained: dict[str, torch.nn.Module]
    trainable: list[torch.nn.Parameter]
    text: "TextSource"
    alphas_cumprod: Tensor
    prediction_type: loss.PredictionType
    settings: Train


class TextSource:
    """The text side of a batch: the few prompts are tokenised once, and encoded once if their encoder is frozen."""

    def __init__(self, model: Model, prompts: Sequence[str], device: torch.device, trained: bool) -> None:
        self.prompts = list(dict.fromkeys(prompts))
        self.input_ids = tokenize(model, self.prompts).to(device)
        self.embeds: Tensor | None = None
        if not trained:
            with torch.no_grad():
                self.embeds = model.text_encoder(self.input_ids)[0]

    def encode(self, prompts: Sequence[str], text_encoder: torch.nn.Module) -> Tensor:
        """Return (B, L, D) prompt_embeds: each prompt of the batch goes through the encoder once, not once a row."""
        rows = [self.prompts.index(prompt) for prompt in prompts]
        if self.embeds is not None:
            return self.embeds[rows]
        used = sorted(set(rows))
        embeds: Tensor = text_encoder(self.input_ids[used])[0]
        return embeds[[used.index(row) for row in rows]]


def max_train_steps(settings: Train, num_photos: int) -> int:
    """Return the optimizer steps: as set, or 100 a photo between 400 and 1200."""
    if settings.max_train_steps is not None:
        return settings.max_train_steps
    return min(max(100 * num_photos, 400), 1200)


def learning_rate_at(step: int, settings: Train, steps: int) -> float:
    """Return the rate of optimizer step `step`, from 0: linear warm-up, then constant, or falling to 0 at the end."""
    warmup = settings.lr_warmup_steps
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(steps - warmup, 1)
    shape = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    return settings.learning_rate * shape[settings.lr_scheduler]


def train(
    model: Model,
    instance: Sequence[Sample],
    prior: Sequence[Sample],
    settings: Train,
    on_records: Callable[[list[StepRecord]], None] | None = None,
    checkpoints: Checkpoints | None = None,
) -> list[StepRecord]:
    """Train the weights of `model` in place, from the newest checkpoint if there is one.

    Args:
        model: in float32; its autoencoder is not used and may be gone.
        instance: samples of the subject.
        prior: samples of its class, none without a prior.
        settings: of the training.
        on_records: is called with the newest records every few steps.
        checkpoints: of this training alone; None writes none.

    Returns:
        One record for each optimizer step, those before the checkpoint too.

    Raises:
        TrainingError: the loss is not finite any more; the last checkpoint is from before.
        Interrupted: a signal asked to stop; the state is saved.
    """
    steps = max_train_steps(settings, len(instance))
    try:
        trainer = prepare(model, [*instance, *prior], settings)
        history = resume(trainer, checkpoints)
        with stop_request() as stop:
            for records in _loop(trainer, instance, prior, range(len(history), steps), stop):
                history += records
                if on_records:
                    on_records(records)
                if checkpoints and len(history) < steps and (stop or _is_due(len(history), settings)):
                    checkpoints.save(capture(trainer, history))
                if stop and len(history) < steps:
                    saved = "saved" if checkpoints else "lost"
                    raise Interrupted(f"stopped by {stop.signal!r} after step {len(history)} of {steps}, state {saved}")
    finally:
        _restore(model)
    return history


def capture(trainer: Trainer, history: Sequence[StepRecord]) -> State:
    """Return the state after the last step of `history`."""
    scaler = trainer.accelerator.scaler
    return State(
        step=len(history),
        weights={name: weight.detach().cpu().contiguous() for name, weight in named_weights(trainer.trained)},
        optimizer={
            "optimizer": trainer.optimizer.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else {},
        },
        records=[asdict(record) for record in history],
    )


def resume(trainer: Trainer, checkpoints: Checkpoints | None) -> list[StepRecord]:
    """Put a trainer where its newest checkpoint is; return the records up to there, none without a checkpoint."""
    state = checkpoints.newest() if checkpoints else None
    if state is None:
        return []
    restore_weights(trainer.trained, state.weights)
    trainer.optimizer.load_state_dict(state.optimizer["optimizer"])
    if trainer.accelerator.scaler is not None:
        trainer.accelerator.scaler.load_state_dict(state.optimizer["scaler"])
    return [StepRecord(**record) for record in state.records]


def _loop(
    trainer: Trainer, instance: Sequence[Sample], prior: Sequence[Sample], steps: range, stop: StopRequest
) -> Iterator[list[StepRecord]]:
    """Take the steps; yield the records of every few of them, once they are known to be finite."""
    settings, rows_per_step = trainer.settings, _rows_per_step(trainer.settings)
    pending: list[dict[str, Tensor | float | int]] = []
    with progress_bar(steps.stop, "train", unit="step", initial=steps.start) as bar:
        for step in steps:
            rows = dataset.rows_of_step(step, rows_per_step, instance, prior, settings.prior_loss_weight, settings.seed)
            parts = dataset.micro_batches(rows, settings.gradient_accumulation_steps)
            batches = (dataset.collate(part, step, len(trainer.alphas_cumprod), settings.seed) for part in parts)
            rate = learning_rate_at(step, settings, steps.stop)
            pending.append({"step": step, "learning_rate": rate} | train_step(trainer, batches, rate))
            bar.update()
            if len(pending) == FLUSH_EVERY or step == steps[-1] or stop or _is_due(step + 1, settings):
                records = [_to_record(entry) for entry in pending]
                pending.clear()
                _require_finite(records, settings)
                bar.set_postfix(loss=f"{records[-1].loss:.4f}", refresh=False)
                yield records


def prepare(model: Model, samples: Sequence[Sample], settings: Train) -> Trainer:
    """Put optimizer, precision and accumulation around a model's trainable parts."""
    if settings.mixed_precision == "fp16" and model.device.type == "cpu":
        raise TrainingError('train.mixed_precision: fp16 needs a GPU; write "no" or "bf16"')
    accelerator = Accelerator(
        mixed_precision=settings.mixed_precision,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        cpu=model.device.type == "cpu",
    )
    if accelerator.num_processes > 1:
        raise TrainingError(
            f"started as {accelerator.num_processes} processes; one trains, start it without a launcher"
        )
    trained = {"unet": model.unet} | ({"text_encoder": model.text_encoder} if settings.train_text_encoder else {})
    for module in trained.values():
        module.requires_grad_(True).train()
    if settings.gradient_checkpointing:
        model.unet.enable_gradient_checkpointing()
    trainable = [parameter for module in trained.values() for parameter in module.parameters()]
    require_float32(trainable)
    optimizer = torch.optim.AdamW(
        trainable,
        lr=settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        weight_decay=settings.adam_weight_decay,
        eps=settings.adam_epsilon,
        fused=True,
    )
    text = TextSource(model, [sample.prompt for sample in samples], model.device, settings.train_text_encoder)
    scheduler = make_scheduler("ddim", model.scheduler_config)
    return Trainer(
        accelerator=accelerator,
        unet=accelerator.prepare(model.unet),
        text_encoder=accelerator.prepare(model.text_encoder) if settings.train_text_encoder else model.text_encoder,
        optimizer=accelerator.prepare(optimizer),
        trained=trained,
        trainable=trainable,
        text=text,
        alphas_cumprod=scheduler.alphas_cumprod.float(),
        prediction_type=_prediction_type(scheduler.config.prediction_type),
        settings=settings,
    )


def train_step(trainer: Trainer, batches: Iterator[Batch], learning_rate: float) -> dict[str, Tensor]:
    """Take one optimizer step over its micro-batches.

    Returns:
        loss, loss_instance, loss_prior and grad_norm as tensors on the device, so that no step waits for them.
    """
    for group in trainer.optimizer.param_groups:
        group["lr"] = learning_rate
    results = []
    for batch in batches:
        with trainer.accelerator.accumulate(trainer.unet, trainer.text_encoder):
            step_loss, losses = forward(trainer, batch)
            trainer.accelerator.backward(step_loss)
            results.append(_means(step_loss, losses, batch.is_instance.to(losses.device)))
            if trainer.accelerator.sync_gradients:
                grad_norm = trainer.accelerator.clip_grad_norm_(trainer.trainable, trainer.settings.max_grad_norm)
            trainer.optimizer.step()
            trainer.optimizer.zero_grad(set_to_none=True)
    return {name: torch.stack([means[name] for means in results]).mean() for name in results[0]} | {
        "grad_norm": grad_norm
    }


def forward(trainer: Trainer, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the loss of a micro-batch, and the (B,) losses of its rows before any weight."""
    device = trainer.accelerator.device
    latents, noise = batch.latents.to(device), batch.noise.to(device)
    alpha_bar = trainer.alphas_cumprod[batch.timesteps].to(device)
    noisy_latents = loss.add_noise(latents, noise, alpha_bar).contiguous(memory_format=torch.channels_last)
    encoder_hidden_states = trainer.text.encode(batch.prompts, trainer.text_encoder)
    model_pred = trainer.unet(noisy_latents, batch.timesteps.to(device), encoder_hidden_states).sample
    target = loss.prediction_target(trainer.prediction_type, latents, noise, alpha_bar)
    losses = loss.row_losses(model_pred, target)
    snr_weights = loss.min_snr_weights(trainer.prediction_type, alpha_bar, trainer.settings.snr_gamma)
    weights = batch.weights.to(device) * snr_weights
    return loss.dreambooth_loss(losses, weights, batch.is_instance.to(device)), losses.detach()


def require_float32(parameters: Sequence[torch.nn.Parameter]) -> None:
    """Refuse trainable weights below float32: small steps would be rounded away."""
    kinds = {parameter.dtype for parameter in parameters} - {torch.float32}
    if kinds:
        raise TrainingError(f"trainable weights are {kinds}; load the model in float32 and set train.mixed_precision")


def _rows_per_step(settings: Train) -> int:
    return settings.train_batch_size * settings.gradient_accumulation_steps


def _is_due(steps_done: int, settings: Train) -> bool:
    """Whether a checkpoint follows after so many steps."""
    return settings.checkpointing_steps is not None and steps_done % settings.checkpointing_steps == 0


def _means(step_loss: Tensor, losses: Tensor, is_instance: Tensor) -> dict[str, Tensor]:
    """Means of the losses by role; NaN where a batch has no prior rows. Without indexing, which waits for a GPU."""
    mask = is_instance.to(losses.dtype)
    return {
        "loss": step_loss.detach(),
        "loss_instance": (losses * mask).sum() / mask.sum(),
        "loss_prior": (losses * (1 - mask)).sum() / (1 - mask).sum(),
    }


def _to_record(entry: dict[str, Tensor | float | int]) -> StepRecord:
    values: dict[str, Any] = {
        name: value.item() if isinstance(value, Tensor) else value for name, value in entry.items()
    }
    return StepRecord(**values)


def _require_finite(records: Sequence[StepRecord], settings: Train) -> None:
    """Refuse a loss or a gradient that is not finite; under fp16 the scaler skips such a gradient by itself."""
    for record in records:
        if not math.isfinite(record.loss) or not (
            math.isfinite(record.grad_norm) or settings.mixed_precision == "fp16"
        ):
            raise TrainingError(
                f"the loss is {record.loss}, the gradient's norm {record.grad_norm} at step {record.step}: "
                f'lower train.learning_rate (it was {record.learning_rate:g}) or set train.mixed_precision to "no"'
            )


def _restore(model: Model) -> None:
    """Take the wrapper of precision off again, and put the parts into evaluation mode."""
    model.unet = extract_model_from_parallel(model.unet, keep_fp32_wrapper=False)
    model.text_encoder = extract_model_from_parallel(model.text_encoder, keep_fp32_wrapper=False)
    for module in (model.unet, model.text_encoder):
        module.requires_grad_(False).eval()
    # Else the next training of this process could choose neither another precision nor another device.
    AcceleratorState._reset_state(reset_partial_state=True)


def _prediction_type(name: str) -> loss.PredictionType:
    if name == "epsilon":
        return "epsilon"
    if name == "v_prediction":
        return "v_prediction"
    raise TrainingError(f"the base model predicts {name!r}; only epsilon and v_prediction can be trained")
