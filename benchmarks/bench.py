"""Compare the whole recipe with diffusers' train_dreambooth.py, in one run and in turns; ratios first.

    python -m benchmarks.bench --reference ~/diffusers [--steps 100] [--repeats 3]     # make bench REFERENCE=...

Both sides get the same base model, photos, batch, steps, resolution and precision, and do the same: class images,
training of UNet and text encoder with a prior, a pipeline folder at the end. Each repeat runs four variants of it, of
both sides in turns: cold (class images to draw), warm (class images there), short (warm, a tenth of the steps) and
checkpoint (warm, with one). All numbers follow from whole runs of the programs, by the same arithmetic for both:

    seconds a step = (warm - short) / (steps - short steps)      a class image = (cold - warm) / images
    start-up       = short - short steps x seconds a step        a checkpoint  = checkpoint - warm

The script needs torchvision; one that is installed elsewhere is given by --reference-path. Finished runs are kept in
--scratch until the results are written: the same command after a stop goes on with the first run that is missing.
"""

import argparse
import hashlib
import json
import platform
import re
import shutil
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks.floors import (
    BYTES_OF_MOMENTS_AND_WEIGHT,
    BYTES_OF_TRAINING,
    Peaks,
    Work,
    count_work,
    measure_peaks,
)
from benchmarks.recipe import REFERENCE_SAMPLER_STEPS, ROOT, Ours, Recipe, Reference, Side, Variant, find_script
from benchmarks.usage import Usage
from dreambooth.folders import code_hash, sha256_of, write_file
from dreambooth.interruption import on_stop
from dreambooth.models import default_device, device_name
from dreambooth.photos import PHOTO_SUFFIXES

VARIANTS: tuple[Variant, ...] = ("cold", "warm", "short", "checkpoint")
MEASURES = {  # name in `derive`: (what it is called, unit, better is less)
    "cold": ("whole recipe, cold", "s"),
    "warm": ("whole recipe, class images there", "s"),
    "step": ("a step", "s"),
    "image": ("a class image", "s"),
    "startup": ("start-up and end", "s"),
    "checkpoint": ("a checkpoint", "s"),
    "memory": ("most memory of a process", "MB"),
    "gpu_memory": ("most memory of the GPU", "MB"),
}
Numbers = dict[str, float]


@dataclass(frozen=True)
class Measured:
    """What one side cost in one repeat, by wall time and by CPU time."""

    wall: Numbers
    cpu: Numbers


def derive(runs: Mapping[Variant, Usage], recipe: Recipe, what: str) -> Numbers:
    """Return seconds a step, a class image, a start-up and a checkpoint from the times of four whole runs.

    Args:
        runs: by variant.
        recipe: says how many steps and class images.
        what: wall or cpu.
    """
    seconds = {variant: float(getattr(cost, what)) for variant, cost in runs.items()}
    step = (seconds["warm"] - seconds["short"]) / (recipe.steps - recipe.short_steps)
    return {
        "cold": seconds["cold"],
        "warm": seconds["warm"],
        "step": step,
        "image": (seconds["cold"] - seconds["warm"]) / recipe.class_images,
        "startup": seconds["short"] - recipe.short_steps * step,
        "checkpoint": seconds["checkpoint"] - seconds["warm"],
        "memory": max(cost.memory for cost in runs.values()),
        "gpu_memory": max(cost.gpu_memory for cost in runs.values()),
    }


class Kept:
    """Finished runs in a file, so that a benchmark that was stopped goes on; None keeps nothing."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._runs: dict[str, dict[str, float]] = json.loads(path.read_text()) if path and path.exists() else {}

    def run(self, name: str, work: Callable[[], Usage]) -> Usage:
        """Return what a run cost, from the file if it was finished before."""
        if name not in self._runs:
            self._runs[name] = asdict(work())
            if self._path:
                write_file(self._path, json.dumps(self._runs, indent=1).encode())
        return Usage(**self._runs[name])


def measure(sides: Sequence[Side], recipe: Recipe, repeats: int, kept: Path | None = None) -> dict[str, list[Measured]]:
    """Run every variant of every side so many times, the sides in turns and each second time in the other order.

    Args:
        sides: one or two.
        recipe: of all of them.
        repeats: how many times.
        kept: file of the runs that were finished before.
    """
    before = Kept(kept)
    found: dict[str, list[Measured]] = {side.name: [] for side in sides}
    for repeat in range(repeats):
        runs: dict[str, dict[Variant, Usage]] = {side.name: {} for side in sides}
        for variant in VARIANTS:
            for side in sides if repeat % 2 == 0 else sides[::-1]:
                name = f"{repeat + 1} {variant} {side.name}"
                runs[side.name][variant] = before.run(name, partial(side.run, variant))
                _say(f"{repeat + 1}/{repeats} {variant} {side.name}: {runs[side.name][variant].wall:.1f} s")
        for name, own in runs.items():
            found[name].append(Measured(derive(own, recipe, "wall"), derive(own, recipe, "cpu")))
    return found


def floors(work: Work, peaks: Peaks, recipe: Recipe, sampler_steps: int) -> Numbers:
    """Return the least that each number could be: arithmetic over the peak, bytes over the disk, imports alone."""
    return {
        "cold": work.recipe(recipe, recipe.class_images, sampler_steps) / peaks.flops + peaks.imports,
        "warm": work.recipe(recipe, 0, sampler_steps) / peaks.flops + peaks.imports,
        "step": work.step / peaks.flops,
        "image": work.image(sampler_steps) / peaks.flops,
        "startup": peaks.imports,
        "checkpoint": work.trained_weights * BYTES_OF_MOMENTS_AND_WEIGHT / peaks.write,
        "memory": work.trained_weights * BYTES_OF_TRAINING / 1e6,
        "gpu_memory": work.trained_weights * BYTES_OF_TRAINING / 1e6,
    }


def table(found: Mapping[str, Sequence[Measured]], least: Mapping[str, Numbers], what: str) -> str:
    """Lay the numbers of one clock out: ratios first, then each side's median, range, and distance from its floor."""
    names = list(found)
    head = ["", *(["reference / ours"] if len(names) == 2 else [])]
    head += [f"{name}{suffix}" for name in names for suffix in ("", " / floor")]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for measure_name, (label, unit) in MEASURES.items():
        values = {name: [getattr(one, what)[measure_name] for one in found[name]] for name in names}
        if measure_name == "gpu_memory" and not any(any(one) for one in values.values()):
            continue
        median = {name: statistics.median(one) for name, one in values.items()}
        cells = [label]
        if len(names) == 2:
            cells.append(_ratio(median["reference"], median["ours"]))
        for name in names:
            low, high = min(values[name]), max(values[name])
            cells.append(f"{median[name]:.3g} {unit} [{low:.3g}, {high:.3g}]")
            cells.append(_ratio(median[name], least[name][measure_name]))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def second_subject(found: Mapping[str, Sequence[Measured]], what: str) -> str:
    """Say what the next subject of a class costs: the script draws class images for each, ours finds them in a store.

    Its user may point --class_data_dir at another run's folder by hand; then the row "class images there" is the one.
    """
    if len(found) < 2:
        return ""
    medians = {
        name: statistics.median(getattr(one, what)[variant] for one in found[name])
        for name, variant in (("ours", "warm"), ("reference", "cold"))
    }
    ratio = _ratio(medians["reference"], medians["ours"])
    return f"\nThe next subject of the class, reference cold / ours with class images there: **{ratio}**.\n"


def report(
    found: Mapping[str, Sequence[Measured]],
    least: Mapping[str, Numbers],
    recipe: Recipe,
    peaks: Peaks,
    script: Path | None,
) -> str:
    """Write the results file."""
    device = default_device()
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "transformers", "accelerate"))
    reference = "The reference was not measured: no --reference."
    if script:
        digest = hashlib.sha256(script.read_bytes()).hexdigest()
        reference = f"Reference: `train_dreambooth.py` of diffusers, sha256 {digest}, as it is."
    gpu = device_name(device) if device.type == "cuda" else "not measured"
    return f"""# Whole recipe: ours and diffusers' script

{datetime.now(UTC):%Y-%m-%d}, {hardware()}. GPU: {gpu}.

{_told(recipe, len(next(iter(found.values()))))}
{reference}

## Wall time
{table(found, least, "wall")}
{second_subject(found, "wall")}
## CPU time (hardly depends on what else the machine does; no floor is meant for it)
{table(found, least, "cpu")}
{second_subject(found, "cpu")}
Floors, for each side's own work: arithmetic counted by torch over {peaks.flops / 1e9:.4g} GFLOP/s, a measured
product of matrices; a checkpoint's bytes over {peaks.write / 1e6:.4g} MB/s to the disk; {peaks.imports:.2f} s of
imports; 16 bytes a trained weight. A class image and a checkpoint are differences of whole runs: what is smaller than
the range was not seen.

{versions}; Python {platform.python_version()}; {torch.get_num_threads()} threads.
"""


def _told(recipe: Recipe, repeats: int) -> str:
    """Say what both sides were told, and what each chose itself."""
    photos = sum(path.suffix.lower() in PHOTO_SUFFIXES for path in recipe.photos.iterdir())
    rows = f"{recipe.train_batch_size} + {recipe.train_batch_size} rows at {recipe.resolution} px"
    return f"""Base `{recipe.base.name}`, {photos} photos, {recipe.class_images} class images, {recipe.steps} steps of
{rows}, UNet and text encoder, precision {recipe.mixed_precision}. Medians of {repeats} repeats in turns, [least, most].
A ratio above 1 means that the reference needs more. It draws class images with {REFERENCE_SAMPLER_STEPS} steps of the
base's own scheduler, which cannot be told; ours take {recipe.sampler_steps} of DPM-Solver++."""


def hardware() -> str:
    """Name the machine: its GPU, else its processor and cores."""
    device = default_device()
    if device.type == "cuda":
        return device_name(device)
    cpu = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"model name\s*: (.+)", cpu)
    return f"{model[1] if model else platform.machine()}, {torch.get_num_threads()} threads"


def main(arguments: Sequence[str] | None = None) -> Path:
    """Measure, write benchmarks/results/<date>-<hardware>.md, and print it."""
    parser = _parser()
    given = parser.parse_args(arguments)
    if given.class_images % given.sample_batch_size:
        parser.error("--class-images must be a multiple of --sample-batch-size: ours draws whole batches only")
    if given.reference and (given.base / "text_encoder_2").is_dir():
        parser.error(f"--reference: train_dreambooth.py knows one text encoder, {given.base} has two; leave it out")
    script = find_script(given.reference) if given.reference else None
    recipe = recipe_of(given, given.mixed_precision)
    folder = Path(given.scratch) / comparison_key(recipe, script)
    sides: list[Side] = [Ours(recipe, folder / "ours")]
    if script:
        sides.append(Reference(recipe, script, folder / "reference", given.reference_path))
    with on_stop(lambda number, frame: sys.exit(128 + number)):  # and so end the run that is being measured
        found = measure(sides, recipe, given.repeats, folder / "runs.json")
    work, peaks = (
        count_work(recipe.base, recipe.train_batch_size, recipe.resolution),
        measure_peaks(recipe.mixed_precision, folder, given.peak_size),
    )
    own_steps = {"ours": recipe.sampler_steps, "reference": REFERENCE_SAMPLER_STEPS}
    least = {side.name: floors(work, peaks, recipe, own_steps[side.name]) for side in sides}
    text = report(found, least, recipe, peaks, script)
    slug = re.sub(r"[^a-z0-9]+", "-", hardware().lower()).strip("-")
    path = Path(given.out) / f"{datetime.now(UTC):%Y-%m-%d}-{slug}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    shutil.rmtree(folder)
    _say(text)
    return path


def comparison_key(recipe: Recipe, script: Path | None) -> str:
    """Name the folder of a comparison: runs of another recipe, script or code are not its own."""
    values = {name: str(value) for name, value in asdict(recipe).items()}
    digest = hashlib.sha256(script.read_bytes()).hexdigest() if script else None
    return sha256_of({"recipe": values, "script": digest, "code": code_hash()})[:16]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--reference", type=Path, help="train_dreambooth.py, or a checkout of diffusers; else ours alone"
    )
    add_recipe_options(parser, steps=100, learning_rate=1e-5)
    parser.add_argument("--scratch", type=Path, default=ROOT / ".scratch/bench", help="for runs, until the end")
    parser.add_argument("--mixed-precision", choices=("no", "bf16", "fp16"), default="no")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peak-size", type=int, help="side of the matrices that the peak is measured with")
    return parser


def add_recipe_options(parser: argparse.ArgumentParser, steps: int, learning_rate: float) -> None:
    """Add what says how both sides train, and where results go."""
    parser.add_argument(
        "--reference-path", type=Path, nargs="*", default=[], help="PYTHONPATH of the reference alone, for torchvision"
    )
    parser.add_argument("--base", type=Path, default=ROOT / "data/base/emoji64", help="see benchmarks/architectures.py")
    parser.add_argument("--photos", type=Path, default=ROOT / "data/subjects/biscuit")
    parser.add_argument("--class-noun", default="dog")
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--class-images", type=int, default=48)
    parser.add_argument("--train-batch-size", type=int, default=4)
    parser.add_argument("--sample-batch-size", type=int, default=16)
    parser.add_argument("--sampler-steps", type=int, default=20, help="of our class images")
    parser.add_argument("--learning-rate", type=float, default=learning_rate)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")


def recipe_of(given: argparse.Namespace, mixed_precision: str) -> Recipe:
    """Return the recipe that the options say."""
    return Recipe(
        given.base, given.photos, given.class_noun, given.resolution, given.steps, given.class_images,
        given.train_batch_size, given.sample_batch_size, given.learning_rate, mixed_precision, given.sampler_steps,
    )  # fmt: skip


def _ratio(one: float, other: float) -> str:
    return f"{one / other:.2f}" if one > 0 and other > 0 else "-"


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
