"""Draw several models at the same prompts and seeds, score them against the same photos, and write it all down.

The base comes first; the others are trainings of one subject.
"""

import io
import json
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from PIL import Image

from dreambooth import evaluation
from dreambooth.drawings import Picture, drawing_key, ensure_drawings, is_flat, read_pngs
from dreambooth.evaluation import BASE, COST, Encoders, Reference, Scores
from dreambooth.folders import code_hash, write_file
from dreambooth.grid import comparison_grid
from dreambooth.images import png_bytes
from dreambooth.models import DTYPES, default_device, device_name, library_versions, load_model
from dreambooth.prompts import fill
from dreambooth.sampling import SamplerSettings


@dataclass(frozen=True)
class Plan:
    """What every model of a subject is asked to draw, and how: the same for all of them."""

    base: Path
    cases: list[evaluation.Case]
    class_prompt: str
    class_seeds: list[int]
    settings: SamplerSettings
    dtype: str

    @property
    def templates(self) -> list[str]:
        """Sentences with {} for the subject, one for all seeds."""
        return list(dict.fromkeys(case.template for case in self.cases))

    @property
    def base_prompts(self) -> list[str]:
        """Of the base model and of the encoder of texts, one for all seeds: no identifier."""
        return list(dict.fromkeys(case.base_prompt for case in self.cases))

    @property
    def noise_seeds(self) -> list[int]:
        """Of the cases, then of the class images."""
        return [case.noise_seed for case in self.cases] + self.class_seeds

    def texts(self, called: str) -> list[str]:
        """Return what a model is asked for that knows the subject by these words."""
        asked = [fill(case.template, called) for case in self.cases]
        return asked + [self.class_prompt] * len(self.class_seeds)


@dataclass(frozen=True)
class Candidate:
    """A model that takes part."""

    trained: Path | None
    """Folder with the parts that a training made of the base (models/<id>, an export); None is the base itself."""
    fingerprint: str
    """Of the training, or the hash of the base."""
    called: str
    """Words for the subject: sks dog, of the base a dog. A champion may have been trained with other ones."""
    store: Path
    """Folder of the folders of pictures; those of the base are shared by all subjects of a class."""


@dataclass(frozen=True)
class Comparison:
    """What was drawn and measured, by model."""

    plan: Plan
    models: Mapping[str, Candidate]
    squares: Sequence[Image.Image]
    """The photos as the training saw them."""
    photos: Reference
    drawn: Mapping[str, Sequence[Image.Image]]
    """Pictures of the cases, then the class images."""
    flat: Mapping[str, Sequence[bool]]
    """Whether each of them shows nothing: its score means nothing then, see `evaluation.flat_remark`."""
    scores: Mapping[str, Scores]
    how: Mapping[str, Any]
    """What scores depend on besides the model."""
    cost: Mapping[str, float]


def compare_models(
    plan: Plan,
    models: Mapping[str, Candidate],
    squares: Sequence[Image.Image],
    photos_hash: str,
    encoders: Encoders,
    texts: torch.Tensor | None,
) -> Comparison:
    """Draw and score the models, each picture embedded once.

    Args:
        plan: what each of them is asked for.
        models: by name, the base under BASE.
        squares: photos of the subject.
        photos_hash: what tells these photos from others.
        encoders: for all pictures.
        texts: embeddings of `plan.base_prompts`; None where they cannot be scored.
    """
    photos, cases, seconds = evaluation.reference(squares, encoders), len(plan.cases), {}
    drawn: dict[str, list[Image.Image]] = {}
    for name, model in models.items():
        begin = time.monotonic()
        drawn[name] = draw_pictures(plan, name, model)
        seconds[f"seconds_per_image_drawn_by_{name}"] = (time.monotonic() - begin) / len(plan.noise_seeds)
    begin = time.monotonic()
    scores = {
        name: evaluation.score(plan.cases, images[:cases], images[cases:], photos, encoders, texts)
        for name, images in drawn.items()
    }
    seconds["seconds_per_image_scored"] = (time.monotonic() - begin) / (len(models) * len(plan.noise_seeds))
    cost = seconds | {"megabytes_of_memory_at_the_peak": _peak_megabytes()}
    flat = {name: [is_flat(image) for image in images] for name, images in drawn.items()}
    how = conditions(plan, models[BASE].fingerprint, encoders, photos_hash)
    return Comparison(plan, models, squares, photos, drawn, flat, scores, how, cost)


def _peak_megabytes() -> float:
    """Return the most memory that this process has held so far: of the GPU when there is one, else of the machine."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def write_comparison(target: Path, found: Comparison) -> None:
    """Fill a folder with evaluation.json, {scores,prompts,class_images}.csv, the pictures, and a grid of them.

    `gate.read_scorecard` and `report.write_report` read it.
    """
    models = {name: {"model": model.fingerprint, "is_base": name == BASE} for name, model in found.models.items()}
    about = {"how": found.how, "models": models}
    write_file(target / "evaluation.json", json.dumps(about, indent=1).encode() + b"\n")
    write_file(target / COST, json.dumps(found.cost).encode())
    _write_pictures(target, found.drawn, len(found.plan.cases))
    _write_scores(target, found)
    identities = {name: one.cases["identity"].to_list() for name, one in found.scores.items()}
    seeds = list(dict.fromkeys(case.seed for case in found.plan.cases))
    called = {name: model.called for name, model in found.models.items()}
    sheet = comparison_grid(found.squares, found.plan.templates, called, seeds, found.drawn, identities)
    (target / "grid.png").write_bytes(png_bytes(sheet))


def conditions(plan: Plan, base_hash: str, encoders: Encoders, photos_hash: str) -> dict[str, Any]:
    """Say what scores depend on besides the model: only those made under the same conditions may be compared."""
    return {
        "base": base_hash,
        "cases": [asdict(case) for case in plan.cases],
        "class_prompt": plan.class_prompt,
        "class_seeds": plan.class_seeds,
        "code": code_hash(evaluation.MODULES),
        "device": device_name(default_device()),
        "dtype": plan.dtype,
        "encoders": encoders.describe(),
        "photos": photos_hash,
        "settings": asdict(plan.settings),
        "versions": library_versions(),
    }


def draw_pictures(plan: Plan, name: str, model: Candidate) -> list[Image.Image]:
    """Draw the cases, then the class images, or read those that were drawn before; a stopped drawing goes on.

    Args:
        plan: what to draw.
        name: of the model, for people.
        model: who draws.
    """
    texts, device = plan.texts(model.called), device_name(default_device())
    about = {"model": model.fingerprint, "settings": asdict(plan.settings), "dtype": plan.dtype, "device": device}
    folder = model.store / drawing_key(about | {"texts": texts, "seeds": plan.noise_seeds})
    pictures = [Picture(text, (seed,)) for text, seed in zip(texts, plan.noise_seeds, strict=True)]
    load = partial(load_model, plan.base, DTYPES[plan.dtype], trained=model.trained)
    ensure_drawings(folder, pictures, load, plan.settings, f"evaluation images, {name}")
    pngs = read_pngs(folder, len(pictures))
    return [Image.open(io.BytesIO(png), formats=["PNG"]).convert("RGB") for png in pngs]


def _write_pictures(target: Path, drawn: Mapping[str, Sequence[Image.Image]], cases: int) -> None:
    """Write <model>/000.png ... in the order of scores.csv, and class/<model>/000.png ... in that of their seeds."""
    for name, images in drawn.items():
        for folder, part in ((target / name, images[:cases]), (target / "class" / name, images[cases:])):
            folder.mkdir(parents=True)
            for number, image in enumerate(part):
                (folder / f"{number:03d}.png").write_bytes(png_bytes(image))


def _write_scores(target: Path, found: Comparison) -> None:
    cases, plan = len(found.plan.cases), found.plan
    tables = {
        "scores": {name: one.cases.assign(flat=found.flat[name][:cases]) for name, one in found.scores.items()},
        "prompts": {name: one.prompts for name, one in found.scores.items()},
        "class_images": {
            name: pd.DataFrame({"noise_seed": plan.class_seeds, "pres": one.pres, "flat": found.flat[name][cases:]})
            for name, one in found.scores.items()
        },
    }
    for file, parts in tables.items():
        table = pd.concat([part.assign(model=name) for name, part in parts.items()])
        table.to_csv(target / f"{file}.csv", index=False)
