"""What do checkpoints cost a training? The bundled base model, rounds with and without one, in turns.

    python -m benchmarks.checkpoints [--steps 100] [--rounds 5]

A round is a number of steps, with a checkpoint begun after the first half of them in every second round. The first one
of a training is not counted: it gets the memory that the next ones take again. Wall time is what a person waits for;
CPU time, of the training and of the writer, hardly depends on what else the machine does.
"""

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from dreambooth import dataset, rng
from dreambooth.checkpoint import Checkpoints
from dreambooth.dataset import Posterior, Role, Sample
from dreambooth.models import load_model
from dreambooth.params import Train, load_params
from dreambooth.schedule import learning_rate_at
from dreambooth.trainer import Trainer, capture, prepare, take_step

ROOT = Path(__file__).resolve().parents[1]
CLAIM = 0.03  # of the training time, at one checkpoint in PER_STEPS steps
PER_STEPS = 100


@dataclass(frozen=True)
class Round:
    """Seconds of some steps."""

    wall: float
    cpu: float
    pause: float
    """Wall seconds that the training stood still for the checkpoint."""


def make_trainer(settings: Train) -> tuple[Trainer, list[Sample], list[Sample]]:
    """Prepare the bundled base model to be trained on latents of noise: what they show changes no duration."""
    model = load_model(ROOT / "data/base/emoji64", device="cpu")
    side = model.unet.config.sample_size
    shape = (model.unet.config.in_channels, side, side)

    def samples(role: Role, prompt: str, count: int) -> list[Sample]:
        mean = rng.normal(shape, 0, f"benchmark-{role}", 0, range(count))
        return [Sample(f"{role}-{i}", Posterior(one, torch.zeros(shape)), prompt, role) for i, one in enumerate(mean)]

    instance, prior = samples("instance", "a photo of sks dog", 5), samples("prior", "a photo of a dog", 48)
    return prepare(model, [*instance, *prior], settings), instance, prior


def take_round(
    trainer: Trainer, instance: list[Sample], prior: list[Sample], steps: range, checkpoints: Checkpoints | None
) -> Round:
    """Take steps, with a checkpoint after the first half of them; its writing belongs to the round."""
    settings, pause = trainer.settings, 0.0
    wall, cpu = time.perf_counter(), time.process_time()
    for step in steps:
        rows = dataset.rows_of_step(step, trainer.rows_per_step, instance, prior, 1.0, settings.seed)
        take_step(trainer, rows, step, learning_rate_at(step, settings, steps.stop))["loss"].item()
        if checkpoints and step - steps.start == len(steps) // 2 - 1:
            began = time.perf_counter()
            checkpoints.begin_save(capture(trainer, step + 1, {}))
            pause = time.perf_counter() - began
    if checkpoints:
        checkpoints.wait()
    return Round(time.perf_counter() - wall, time.process_time() - cpu, pause)


def main() -> int:
    """Print a table; exit with 1 when the wall time is above the claim."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=PER_STEPS, help="of a round")
    parser.add_argument("--rounds", type=int, default=5, help="of each kind")
    given = parser.parse_args()
    trainer, instance, prior = make_trainer(load_params(ROOT / "params.yaml").train)
    take_round(trainer, instance, prior, range(2), None)  # moments are there afterwards
    without, with_one = [], []
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder), {}, lambda line: None, None)
        megabytes = capture(trainer, 0, {}).size / 1e6
        take_round(trainer, instance, prior, range(2), checkpoints)
        for number in range(given.rounds):
            first = 2 + 2 * number * given.steps
            without.append(take_round(trainer, instance, prior, range(first, first + given.steps), None))
            second = range(first + given.steps, first + 2 * given.steps)
            with_one.append(take_round(trainer, instance, prior, second, checkpoints))
    share = report(without, with_one, given.steps, megabytes)
    return int(share > CLAIM)


def report(without: list[Round], with_one: list[Round], steps: int, megabytes: float) -> float:
    """Write the table; return the wall time of a checkpoint as a share of PER_STEPS steps."""

    def median(rounds: list[Round], what: str) -> float:
        return float(statistics.median(getattr(one, what) for one in rounds))

    shares = {}
    lines = [f"{megabytes:.0f} MB a checkpoint, {len(without)} rounds of {steps} steps each, medians", ""]
    lines += ["| seconds | a step | a checkpoint | share at one in 100 steps |", "|---|---|---|---|"]
    for what in ("wall", "cpu"):
        step = median(without, what) / steps
        extra = statistics.median(
            getattr(one, what) - getattr(none, what) for one, none in zip(with_one, without, strict=True)
        )
        shares[what] = extra / (step * PER_STEPS)
        lines.append(f"| {what} | {step:.4f} | {extra:+.3f} | {shares[what]:+.2%} |")
    lines.append(f"\nthe training stands still for {median(with_one, 'pause'):.3f} s")
    sys.stdout.write("\n".join(lines) + "\n")
    return float(shares["wall"])


if __name__ == "__main__":
    raise SystemExit(main())
