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
from dreambooth.evaluation import BASE
from dreambooth.folders import write_file
from dreambooth.grid import STRIP_TILE, grid
from dreambooth.images import png_bytes, read_prepared, to_square
from dreambooth.intervals import in_interval

if TYPE_CHECKING:
    from benchmarks.methods import Result

MAX_ROWS = 4  # of a subject in the picture
MAX_BYTES = 200_000  # of the picture: it lies in git
COLOURS = (256, 128, 64, 32)
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
    """Draw prompts of each subject by base and methods, at the first seed, beside its photos."""
    methods = list(dict.fromkeys(one.method for one in results))
    rows: list[list[Image.Image | None]] = []
    labels = []
    for subject in dict.fromkeys(one.subject for one in results):
        own = {one.method: one for one in results if one.subject == subject}
        first, *_ = own.values()
        photos = [photo for _, photo in read_prepared(first.project / "build" / subject / "instance")]
        drawn = {name: _pictures(one, values["evaluate"]["seeds"][0]) for name, one in own.items()}
        for number, prompt in enumerate(_spread(list(drawn[first.method]), MAX_ROWS)):
            photo = to_square(photos[number % len(photos)], values["base"]["resolution"])
            others = [drawn[name][prompt][1] if name in drawn else None for name in methods]
            rows.append([photo, drawn[first.method][prompt][0], *others])
            labels.append(f"{subject}: {prompt}")
    sheet = grid(rows, labels, ["photos", BASE, *(name.replace("_", " ") for name in methods)], tile=STRIP_TILE)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, small_png(sheet))


def small_png(sheet: Image.Image) -> bytes:
    """Encode a picture with as many colours of a palette as MAX_BYTES have room for."""
    for colours in COLOURS:
        content = png_bytes(sheet.quantize(colours, dither=Image.Dither.NONE))
        if len(content) <= MAX_BYTES:
            break
    return content


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
        "that repeat a photo. Training: the whole stage, with its start. Size: of what was trained, as it is stored; a "
        "LoRA and a word need the base beside them."
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
    return in_interval(measured[name], measured["low"], measured["high"])


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
