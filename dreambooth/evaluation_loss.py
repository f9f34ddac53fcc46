"""The loss at fixed noise and fixed timesteps: a curve that shows the training, not the luck of its draws.

B rows, T training timesteps.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch

from dreambooth import rng
from dreambooth.dataset import Batch, Sample, by_shape, stack_sizes
from dreambooth.trainer import Trainer, row_losses

PLACES = (0.125, 0.375, 0.625, 0.875)  # of the noise schedule, the middles of its quarters
MAX_SAMPLES = 8  # of each role; more say little more about a mean over so many draws of one noise


@dataclass(frozen=True)
class EvaluationRecord:
    """The means after `step` steps, before any weight; `score` is equation 2 of them, the lower the better."""

    step: int
    loss_instance: float
    loss_prior: float
    score: float


def evaluate_loss(trainer: Trainer, instance: Sequence[Sample], prior: Sequence[Sample], step: int) -> EvaluationRecord:
    """Measure both roles; nothing of the training changes, no random number is spent.

    Every process measures all of it. Different cards may differ in a last bit, so `training` takes the numbers of the
    first process for all: they have to decide alike.
    """
    means = {
        role: _mean_loss(trainer, samples[:MAX_SAMPLES], role)
        for role, samples in (("instance", instance), ("prior", prior))
    }
    weighted = trainer.settings.prior_loss_weight * means["prior"] if prior else 0.0
    return EvaluationRecord(step, means["instance"], means["prior"], means["instance"] + weighted)


def fixed_batches(
    samples: Sequence[Sample], role: str, num_train_timesteps: int, seed: int, batch_size: int
) -> Iterator[Batch]:
    """Yield every sample at every one of the fixed timesteps, each with a noise of its own that is always the same."""
    rows = list(enumerate(product(samples, PLACES)))
    for same in by_shape(rows, lambda row: row[1][0].posterior.mean):
        for start in range(0, len(same), batch_size):
            numbers, part = zip(*same[start : start + batch_size], strict=True)
            mean = torch.stack([sample.posterior.mean for sample, _ in part])
            is_instance = torch.full((len(part),), role == "instance")
            yield Batch(
                latents=mean,
                noise=rng.normal(mean.shape[1:], seed, f"evaluation-noise-{role}", 0, numbers),
                timesteps=torch.tensor([int(place * num_train_timesteps) for _, place in part]),
                weights=torch.ones(len(part)),
                is_instance=is_instance,
                instances=is_instance.sum(),
                prompts=tuple(sample.prompt for sample, _ in part),
                taught=tuple(number for number, (sample, _) in enumerate(part) if sample.taught),
                sizes=stack_sizes([sample.sizes for sample, _ in part]),
            )


def is_best(records: Sequence[EvaluationRecord]) -> bool:
    """Whether the last score is lower than all before it."""
    return bool(records) and all(records[-1].score < record.score for record in records[:-1])


def patience_is_out(records: Sequence[EvaluationRecord], patience: int | None) -> bool:
    """Whether the last `patience` scores brought nothing better."""
    if patience is None or not records:
        return False
    best = min(range(len(records)), key=lambda number: records[number].score)
    return len(records) - 1 - best >= patience


@torch.no_grad()
def _mean_loss(trainer: Trainer, samples: Sequence[Sample], role: str) -> float:
    """Return the mean over rows; NaN without samples."""
    model, timesteps, seed = trainer.model, len(trainer.alphas_cumprod), trainer.settings.seed
    batches = fixed_batches(samples, role, timesteps, seed, trainer.rows_per_pass)
    modules = list(trainer.trained.values())
    for module in modules:
        module.eval()
    own = {"unet": model.unet, **model.encoders}  # without the wrapper of several processes: each measures all
    losses = [row_losses(trainer, batch.on(trainer.accelerator.device), own) for batch in batches]
    for module in modules:
        module.train()
    return torch.cat(losses).mean().item() if losses else float("nan")
