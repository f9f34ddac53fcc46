"""What `benchmarks.methods` measured, for people: a table with intervals, and the same prompts by every method."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from PIL import Image

from benchmarks.bench import hardware
from dreambooth.comparison import BASE
from dreambooth.folders import write_file
from dreambooth.grid import grid
from dreambooth.images import png_bytes

if TYPE_CHECKING:
    from benchmarks.methods import Result

MAX_ROWS = 6  # of a subject in the picture
TILE = 96  # pixels
COLOURS = 256  # a palette keeps the picture under 200 kB
COLUMNS = (
    "method", "identity", "prompt fidelity", "prior (PRES rise)", "copies", "training, s", "of CPU, s", "memory, MB",
    "size, MB",
)  # fmt: skip


def write_page(path: Path, results: Sequence[Result], values: Mapping[str, Any], shown: Path) -> None:
    """Write the page: what was done, a table for each subject, what each method was told."""
    subjects = list(dict.fromkeys(one.subject for one in results))
    link = os.path.relpath(shown, path.parent)
    parts = [
        "# Every method at the same budget",
        "Written by `python -m benchmarks.methods`.",
        _budget(values),
        *(_of_subject([one for one in results if one.subject == subject]) for subject in subjects),
        f"![prompts by method]({link})",
        _told(results),
        f"{datetime.now(UTC):%Y-%m-%d}, {hardware()}; torch {version('torch')}, diffusers {version('diffusers')}, "
        f"Python {platform.python_version()}. Seconds compare only within one table.",
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, ("\n\n".join(parts) + "\n").encode())


def picture(path: Path, results: Sequence[Result], values: Mapping[str, Any]) -> None:
    """Draw the first prompts of each subject by base and methods, at the first seed: what the table is about."""
    seed, rows, labels = values["evaluate"]["seeds"][0], [], []
    methods = list(dict.fromkeys(one.method for one in results))
    for subject in dict.fromkeys(one.subject for one in results):
        own = {one.method: _pictures(one, seed) for one in results if one.subject == subject}
        prompts = _spread(list(next(iter(own.values()))), MAX_ROWS)
        rows += [
            [next(iter(own.values()))[prompt][0], *(own[name][prompt][1] if name in own else None for name in methods)]
            for prompt in prompts
        ]
        labels += [f"{subject}: {prompt}" for prompt in prompts]
    sheet = grid(rows, labels, [BASE, *(name.replace("_", " ") for name in methods)], tile=TILE)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, png_bytes(sheet.quantize(COLOURS, dither=Image.Dither.NONE)))


def _pictures(result: Result, seed: int) -> dict[str, tuple[Image.Image, Image.Image]]:
    """Return base's and personalised picture of each prompt, as the base was asked for it."""
    folder = result.project / "build" / result.subject / "evaluation"
    table = pd.read_csv(folder / "scores.csv")
    cases = table[table["model"] == BASE].reset_index(drop=True)
    found = {}
    for number in cases.index[cases["seed"] == seed]:
        pair = []
        for model in (BASE, "personalised"):
            with Image.open(folder / model / f"{number:03d}.png", formats=["PNG"]) as image:
                pair.append(image.convert("RGB"))
        found[str(cases["prompt"][number])] = (pair[0], pair[1])
    return found


def _spread(values: Sequence[str], count: int) -> list[str]:
    """Choose up to `count` values from all along a list, the first among them."""
    return [values[number * len(values) // count] for number in range(count)] if len(values) > count else [*values]


def _budget(values: Mapping[str, Any]) -> str:
    train, judged, prior, base = values["train"], values["evaluate"], values["prior"], values["base"]
    rows = f"{train['train_batch_size'] * train['gradient_accumulation_steps']} photo rows"
    if prior["kind"] != "none" and train["prior_loss_weight"] > 0:
        rows += f" and as many class rows (`prior.kind: {prior['kind']}`, weight {train['prior_loss_weight']:g})"
    return (
        f"Base `{base['pretrained_model_name_or_path']}` at {base['resolution']} px. Every method: "
        f"{train['max_train_steps'] or '100 a photo'} steps of {rows}, the same rows and noise; "
        f"{judged['max_prompts'] or 'all'} prompts x {len(judged['seeds'])} seeds, guidance "
        f"{judged['guidance_scale']:g}, {judged['num_class_images']} class images a side. Numbers are differences "
        f"from the base on the same prompts and seeds, with {judged['confidence']:.0%} intervals over prompts (PRES: "
        "over class images); more identity and prompt fidelity are better, less PRES is. Copies: share of pictures "
        "that repeat a photo. Size: of what was trained, as it is stored; a LoRA and a word need the base beside them."
    )


def _of_subject(results: Sequence[Result]) -> str:
    first = results[0].metrics
    base = f"identity {first['identity']['base']:.3f} (ceiling {first['identity']['ceiling']:.3f})"
    base += f", prompt fidelity {first['prompt']['base']:.3f}" if "prompt" in first else ""
    base += f", PRES {first['prior']['base']:.3f}" if "prior" in first else ""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS), *map(_line, results)]
    return f"## {results[0].subject}\n\nThe base: {base}; {first['photos']} photos.\n\n" + "\n".join(lines)


def _line(one: Result) -> str:
    metrics = one.metrics
    cells = [
        one.method,
        _difference(metrics["identity"], "gain"),
        _difference(metrics.get("prompt"), "gain"),
        _difference(metrics.get("prior"), "rise"),
        f"{metrics['copying']['rate']:.0%}",
        f"{one.train.wall:.0f}",
        f"{one.train.cpu:.0f}",
        f"{one.train.memory:.0f}",
        f"{one.size / 1e6:.3g}",
    ]
    return "| " + " | ".join(cells) + " |"


def _difference(measured: Mapping[str, Any] | None, name: str) -> str:
    if measured is None:
        return "not measured"
    return f"{measured[name]:+.3f} [{measured['low']:+.3f}, {measured['high']:+.3f}]"


def _told(results: Sequence[Result]) -> str:
    """List what each method was told besides the common budget."""
    lines = ["## What each method was told", "", "| method | `train` |", "|---|---|"]
    for one in {one.method: one for one in results}.values():
        lines.append(
            f"| {one.method} | " + ", ".join(f"`{name}: {value}`" for name, value in one.changes.items()) + " |"
        )
    lines += [
        "",
        "All else as in params.yaml. `pivotal` and `textual_inversion` need a new word, so their subjects are called "
        "`<id>` in place of the identifier of params.yaml. `textual_inversion` reads no class rows: its steps have "
        "half the rows of the others.",
    ]
    return "\n".join(lines)
