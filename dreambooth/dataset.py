"""Rows: which picture, in which role, with which weight, stands where in which step. A pure function of the step.

A row carries all that belongs to it, so that nothing is ever paired by its position in a batch. B rows, C latent
channels, H height, W width of the latents.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from dreambooth import rng
from dreambooth.families import Sizes

Role = Literal["instance", "prior"]
T = TypeVar("T")


@dataclass(frozen=True)
class Posterior:
    """What the autoencoder makes of a picture: a normal distribution of latents, in units of the UNet.

    Attributes:
        mean: (C, H, W) float32.
        std: (C, H, W) float32; zeros for latents that come from the sampler itself.
    """

    mean: Tensor
    std: Tensor


@dataclass(frozen=True)
class Sample:
    """A picture to train on."""

    id: str
    posterior: Posterior
    prompt: str
    role: Role
    sizes: Sizes | None = None
    """What SDXL is told of the picture."""
    taught: bool = False
    """Whether its target is what the untouched base predicts (teacher.py)."""
    variants: tuple[tuple[Posterior, Sizes | None], ...] = field(default=(), repr=False)
    """The same picture mirrored or cut out elsewhere, each encoded once; a row takes one of them all by chance."""


@dataclass(frozen=True)
class Row:
    """A sample in a step; `index` is its place in the whole step, whatever the micro-batches and processes."""

    sample: Sample
    weight: float
    index: int


@dataclass(frozen=True)
class Batch:
    """Rows as tensors, float32."""

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    weights: Tensor
    is_instance: Tensor
    instances: Tensor
    """Number of instance rows that the loss is a mean over: these, and those of other shapes that go with them."""
    prompts: tuple[str, ...]
    taught: tuple[int, ...]
    """Numbers of the rows whose target is the base's own prediction."""
    sizes: Tensor | None = None
    """(B, 6) of `families.Sizes`, where the samples have them."""

    def on(self, device: torch.device) -> "Batch":
        """Return the batch on a device, which is not waited for: it may be computing the step before."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        moved: dict[str, Any] = {name: value.to(device, non_blocking=True) for name, value in tensors.items()}
        return replace(self, **moved)


def as_posterior(latents: Tensor) -> Posterior:
    """Return latents (C, H, W) of the sampler as a distribution without spread: nothing is encoded again."""
    return Posterior(latents, latents.new_zeros(latents.shape))


def rows_of_step(
    step: int,
    rows_per_step: int,
    instance: Sequence[Sample],
    prior: Sequence[Sample],
    prior_loss_weight: float,
    seed: int,
) -> list[Row]:
    """Choose the rows of one optimizer step.

    Instance and class samples are shuffled apart, each anew when all of its kind were seen.

    Args:
        step: from 0.
        rows_per_step: instance rows; as many prior rows follow them when there are prior samples.
        instance: at least one sample of the subject.
        prior: samples of the class, or none.
        prior_loss_weight: weight of each prior row; an instance row weighs 1.
        seed: of the order.
    """
    first = step * rows_per_step
    rows = [Row(_nth(instance, first + i, seed, "instance-order"), 1.0, i) for i in range(rows_per_step)]
    if prior:
        rows += [
            Row(_nth(prior, first + i, seed, "prior-order"), prior_loss_weight, rows_per_step + i)
            for i in range(rows_per_step)
        ]
    return rows


def micro_batches(rows: Sequence[Row], count: int) -> list[list[Row]]:
    """Deal the rows of a step into `count` equal parts, each with its share of instance and of prior rows."""
    by_role = [[row for row in rows if row.sample.role == role] for role in ("instance", "prior")]
    parts = []
    for part in range(count):
        shares = [
            role_rows[part * len(role_rows) // count : (part + 1) * len(role_rows) // count] for role_rows in by_role
        ]
        parts.append([row for share in shares for row in share])
    return parts


def by_shape(items: Sequence[T], latents: Callable[[T], Tensor]) -> list[list[T]]:
    """Part items so that those of one part have latents of one shape, the shapes in the order of their first."""
    parts: dict[torch.Size, list[T]] = {}
    for item in items:
        parts.setdefault(latents(item).shape, []).append(item)
    return list(parts.values())


def collate(
    rows: Sequence[Row],
    step: int,
    num_train_timesteps: int,
    seed: int,
    noise_offset: float,
    instances: int,
) -> Batch:
    """Draw what is random in a step's rows and stack them; each row's draws follow from (seed, step, index) alone.

    Args:
        rows: B of them, of one shape.
        step: from 0.
        num_train_timesteps: T.
        seed: of the training.
        noise_offset: standard deviation of what is added to the noise of a whole channel (Guttenberg 2023).
        instances: see `Batch`.
    """
    indices = [row.index for row in rows]
    views = [_view(row, step, seed) for row in rows]
    shape = views[0][0].mean.shape
    mean = torch.stack([posterior.mean for posterior, _ in views])
    std = torch.stack([posterior.std for posterior, _ in views])
    noise = rng.normal(shape, seed, "noise", step, indices)
    if noise_offset:
        noise = noise + noise_offset * rng.normal((shape[0], 1, 1), seed, "noise-offset", step, indices)
    return Batch(
        latents=mean + std * rng.normal(shape, seed, "posterior", step, indices),
        noise=noise,
        timesteps=rng.integers(num_train_timesteps, seed, "timestep", step, indices),
        weights=torch.tensor([row.weight for row in rows]),
        is_instance=torch.tensor([row.sample.role == "instance" for row in rows]),
        instances=torch.tensor(instances),
        prompts=tuple(row.sample.prompt for row in rows),
        taught=tuple(number for number, row in enumerate(rows) if row.sample.taught),
        sizes=stack_sizes([sizes for _, sizes in views]),
    )


def stack_sizes(sizes: Sequence[Sizes | None]) -> Tensor | None:
    """Return (B, 6) float32; None where a row has none."""
    known = [size for size in sizes if size is not None]
    return torch.tensor(known, dtype=torch.float32) if len(known) == len(sizes) else None


def _view(row: Row, step: int, seed: int) -> tuple[Posterior, Sizes | None]:
    """Choose between a sample and its variants."""
    views = [(row.sample.posterior, row.sample.sizes), *row.sample.variants]
    if len(views) == 1:
        return views[0]
    return views[int(rng.integers(len(views), seed, "variant", step, [row.index]))]


def _nth(samples: Sequence[Sample], n: int, seed: int, purpose: str) -> Sample:
    """Return the n-th sample of an endless sequence of shuffled epochs."""
    epoch, position = divmod(n, len(samples))
    return samples[rng.permutation(len(samples), seed, purpose, epoch)[position]]
