"""Do ours and diffusers' train_dreambooth.py learn the same? Loss curves and identity over several seeds.

    python -m benchmarks.equality --reference ~/diffusers [--seeds 0 1 2] [--steps 250]

For each seed both sides train on the same photos, class images (those that ours drew), prompt, batch, rate and
schedule, without weights of their own choice (no min-SNR). Of each curve the last half counts. Its losses are nearly
independent, so the standard error of a side is their deviation over the root of their number; the curves differ if the
interval of the difference leaves zero out. Both final models draw the same prompts from the same noise and are scored
by the same encoders. Finished trainings are kept in --scratch, so that the same command goes on after a stop.
"""

import argparse
import json
import shutil
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy import stats

from benchmarks.bench import add_recipe_options, comparison_key, hardware, recipe_of
from benchmarks.recipe import CLASS, ROOT, SUBJECT, Ours, Recipe, Reference, find_script
from dreambooth import evaluation
from dreambooth.fidelity import paired_interval
from dreambooth.folders import write_file
from dreambooth.intervals import in_interval
from dreambooth.models import model_hash
from dreambooth.params import load_params
from dreambooth.vocabulary import SCORER
from stages import evaluate

CONFIDENCE = 0.95
Losses = NDArray[np.float64]


@dataclass(frozen=True)
class Difference:
    """Ours less the reference, with the half width of its interval."""

    ours: float
    reference: float
    half_width: float

    @property
    def equal(self) -> bool:
        """Whether the interval holds zero."""
        return abs(self.ours - self.reference) <= self.half_width


def compare_losses(ours: Sequence[Losses], reference: Sequence[Losses]) -> Difference:
    """Compare the means of the last halves of curves by the t interval of Welch (1947).

    Args:
        ours: a curve a seed, a loss a step.
        reference: likewise.
    """
    one, other = (np.concatenate([curve[len(curve) // 2 :] for curve in curves]) for curves in (ours, reference))
    interval = stats.ttest_ind(one, other, equal_var=False).confidence_interval(CONFIDENCE)
    return Difference(float(one.mean()), float(other.mean()), float(interval.high - interval.low) / 2)


def read_ours(project: Path) -> Losses:
    """Return the loss of each step of our training: both halves of equation 2, as the script adds them."""
    return pd.read_csv(project / f"models/{SUBJECT}/loss.csv")["loss"].to_numpy(dtype=np.float64)


def read_reference(folder: Path) -> Losses:
    """Return the loss of each step of the script, from what it told TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
        SCALARS,
        EventAccumulator,
    )

    events = next(folder.rglob("events.out.tfevents.*"))
    told = EventAccumulator(str(events.parent), size_guidance={SCALARS: 0})
    told.Reload()
    return np.array([one.value for one in told.Scalars("loss")])


def train_both(recipe: Recipe, script: Path, folder: Path, path: Sequence[Path]) -> None:
    """Train both sides with one seed, unless that was done before: on the same class images, those that ours drew."""
    ours, reference = Ours(recipe, folder / "ours"), Reference(recipe, script, folder / "reference", path)
    reference.more = ["--report_to", "tensorboard", "--logging_dir", "logs"]
    drawn = folder.parent / "cache"  # of one seed for all: class images do not depend on that of the training
    if not (folder / "ours/done").exists():
        if drawn.exists():
            shutil.copytree(drawn, folder / "ours/cache", dirs_exist_ok=True)
        ours.run("warm")
        shutil.copytree(folder / "ours/cache", drawn, dirs_exist_ok=True)
        (folder / "ours/done").touch()
    if not (folder / "reference/done").exists():
        given = folder / "reference/class"
        given.mkdir(exist_ok=True)  # the script draws none where there are enough
        for picture in (folder / f"ours/project/build/classes/{CLASS}").glob("*.png"):
            shutil.copyfile(picture, given / picture.name)
        reference.run("warm")
        (folder / "reference/done").touch()


def score_both(folder: Path) -> dict[str, float]:
    """Return the identity of both final models and of the base, from the same prompts and noise."""
    kept = folder / "identity.json"
    if not kept.exists():
        project = folder / "ours/project"
        for name in ("data/prompts", SCORER):
            place = project / name
            place.parent.mkdir(parents=True, exist_ok=True)
            if not place.exists():
                place.symlink_to(ROOT / name)
        params = load_params(project / "params.yaml")
        models = {"ours": folder / "ours/project/pipeline", "reference": folder / "reference/out"}
        found = evaluate.compare(
            params,
            SUBJECT,
            project,
            {name: (place, model_hash(place)) for name, place in models.items()},
            evaluate.encoders_of(params, project),
        )
        counted = {name: evaluation.mean_counted(scores.prompts) for name, scores in found.scores.items()}
        difference = evaluation.compare(found.scores["ours"], found.scores["reference"], CONFIDENCE)["identity"]
        write_file(kept, json.dumps(counted | {"low": difference["low"], "high": difference["high"]}).encode())
    values: dict[str, float] = json.loads(kept.read_text())
    return values


def report(recipe: Recipe, seeds: Sequence[int], losses: Difference, identity: Sequence[Mapping[str, float]]) -> str:
    """Write the results: the verdict first, then a row a seed."""
    rows = [
        f"| {seed} | {one['base']:.3f} | {one['ours']:.3f} | {one['reference']:.3f} | "
        f"{in_interval(one['ours'] - one['reference'], one['low'], one['high'])} |"
        for seed, one in zip(seeds, identity, strict=True)
    ]
    differences = [one["ours"] - one["reference"] for one in identity]
    mean = f"{statistics.mean(differences):+.3f}"
    if len(seeds) > 1:
        interval = paired_interval(torch.tensor(differences), CONFIDENCE)
        numbers = in_interval(interval.mean, interval.low, interval.high)
        mean = f"{numbers} (95 % over seeds): {_told(interval.low <= 0 <= interval.high)}"
    gap, share = losses.ours - losses.reference, losses.half_width / losses.reference
    return f"""# Do ours and diffusers' script learn the same?

{datetime.now(UTC):%Y-%m-%d}, {hardware()}. Base `{recipe.base.name}`, {recipe.steps} steps of twice
{recipe.train_batch_size} rows, rate {recipe.learning_rate:g}, {recipe.class_images} class images, {len(seeds)} seeds.

**Loss, mean of the last half of the steps: ours {losses.ours:.4f}, reference {losses.reference:.4f}, difference
{gap:+.4f} +- {losses.half_width:.4f} (95 %, {100 * share:.1f} % of the mean): {_told(losses.equal)}.**

**Identity, ours less the reference, mean of the seeds: {mean}.**

| seed | base | ours | reference | ours - reference [95 % over prompts] |
|---|---|---|---|---|
{chr(10).join(rows)}

Both sides trained on the same class images, which ours drew (DPM-Solver++ 2M, {recipe.sampler_steps} steps), and each
made its own noise, timesteps and order of rows.
"""


def _told(equal: bool) -> str:
    return "not told apart" if equal else "DIFFERENT"


def main(arguments: Sequence[str] | None = None) -> Path:
    """Train, score, write benchmarks/results/<date>-equality.md, and return its path."""
    given = _parser().parse_args(arguments)
    script = find_script(given.reference)
    recipe = recipe_of(given, "no")
    folder = Path(given.scratch) / comparison_key(recipe, script)
    ours, reference, identity = [], [], []
    for seed in given.seeds:
        place, own = folder / f"seed-{seed}", replace(recipe, seed=seed)
        train_both(own, script, place, given.reference_path)
        ours.append(read_ours(place / "ours/project"))
        reference.append(read_reference(place / "reference/out/logs"))
        identity.append(score_both(place))
    text = report(recipe, given.seeds, compare_losses(ours, reference), identity)
    path = Path(given.out) / f"{datetime.now(UTC):%Y-%m-%d}-equality.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    shutil.rmtree(folder)
    return path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, required=True, help="train_dreambooth.py, or a checkout of diffusers")
    add_recipe_options(parser, steps=250, learning_rate=5e-5)
    parser.add_argument("--scratch", type=Path, default=ROOT / ".scratch/equality", help="for runs, until the end")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    return parser


if __name__ == "__main__":
    main()
