"""Turn a trained model into pictures beside those of the base model, their scores, and one table of metrics."""

import io
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from PIL import Image

from dreambooth import evaluation, prompts
from dreambooth.drawings import Picture, drawing_key, ensure_drawings, read_pngs
from dreambooth.encoders import Lite0Encoder
from dreambooth.errors import EvaluationError
from dreambooth.evaluation import Encoders, Reference, Scores
from dreambooth.folders import (
    cache_folder,
    code_hash,
    new_folder,
    read_manifest,
    scratch_folder,
    sha256_of,
    write_file,
)
from dreambooth.grid import comparison_grid
from dreambooth.hub_encoders import ClipEncoder, DinoEncoder
from dreambooth.images import png_bytes, read_prepared
from dreambooth.models import (
    DTYPES,
    default_device,
    device_name,
    library_versions,
    load_model,
    model_hash,
    peak_megabytes,
    resolve_model,
)
from dreambooth.params import Params
from dreambooth.sampling import SamplerSettings, settings_of
from dreambooth.scorer import BundledScorer
from dreambooth.tracking import open_run
from stages.entry import main, say

INPUTS = ("models/{id}", "build/{id}/instance", "data/base", "data/prompts")
OUTPUTS = ("build/{id}/evaluation", "metrics/{id}.json")
SCORER = "data/base/scorer"
COST = ".cost.json"  # hidden: no part of the content, which is the same whenever it is made


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
    def prompts(self) -> list[str]:
        """Of the personalised model, one for all seeds."""
        return list(dict.fromkeys(case.personalised_prompt for case in self.cases))

    @property
    def base_prompts(self) -> list[str]:
        """Of the base model and of the encoder of texts, one for all seeds."""
        return list(dict.fromkeys(case.base_prompt for case in self.cases))

    @property
    def noise_seeds(self) -> list[int]:
        """Of the cases, then of the class images."""
        return [case.noise_seed for case in self.cases] + self.class_seeds

    @property
    def base_texts(self) -> list[str]:
        """What the base model is asked for, and the encoder of texts: no identifier."""
        return [case.base_prompt for case in self.cases] + [self.class_prompt] * len(self.class_seeds)

    @property
    def texts(self) -> list[str]:
        """What a personalised model is asked for."""
        return [case.personalised_prompt for case in self.cases] + [self.class_prompt] * len(self.class_seeds)


def run(params: Params, subject_id: str, root: Path) -> None:
    """Write build/<id>/evaluation/ (pictures, grid.png, {scores,prompts,class_images}.csv) and metrics/<id>.json."""
    plan = _plan(params, subject_id, root)
    trained, prepared = (root / path.format(id=subject_id) for path in INPUTS[:2])
    manifest, encoders = read_manifest(trained), _encoders(params, root)
    squares = [evaluation.as_photo(photo) for _, photo in read_prepared(prepared)]
    photos, texts = evaluation.reference(squares, encoders), _embed_texts(plan.base_prompts, encoders, subject_id)
    shared, own = cache_folder() / "evaluation", scratch_folder(root) / "evaluation" / subject_id
    drawn = {"base": draw_pictures(plan, None, shared, model_hash(plan.base), "base")}
    begin = time.monotonic()
    drawn["personalised"] = draw_pictures(plan, trained, own, manifest["fingerprint"], "personalised")
    drawn_at = time.monotonic()
    scores = {
        name: evaluation.score(
            plan.cases, images[: len(plan.cases)], images[len(plan.cases) :], photos, encoders, texts
        )
        for name, images in drawn.items()
    }
    scored_at = time.monotonic()
    metrics = evaluation.summarise(scores["base"], scores["personalised"], photos, params.evaluate.confidence)
    how = fingerprint(plan, encoders, read_manifest(prepared)["files"])
    about = {"fingerprint": sha256_of(how), "model": manifest["fingerprint"]}
    metrics |= encoders.describe() | about
    models = {
        "base": {"model": how["base"], "is_base": True, "safety": evaluation.NOT_CHECKED},
        "personalised": {"model": manifest["fingerprint"], "is_base": False, "safety": evaluation.NOT_CHECKED},
    }
    with new_folder(root / OUTPUTS[0].format(id=subject_id), about) as target:
        write_file(target / "evaluation.json", json.dumps({"how": how, "models": models}, indent=1).encode() + b"\n")
        cost = {
            "seconds_per_image_drawn": (drawn_at - begin) / len(plan.texts),
            "seconds_per_image_scored": (scored_at - drawn_at) / (2 * len(plan.texts)),
            "megabytes_of_memory_at_the_peak": peak_megabytes(),
        }
        write_file(target / COST, json.dumps(cost).encode())
        _write_pictures(target, drawn, len(plan.cases))
        _write_scores(target, scores, plan)
        if (checkpoints := _checkpoints(params, subject_id, trained, photos, encoders)) is not None:
            checkpoints.to_csv(target / "checkpoints.csv", index=False)
        identities = {name: one.cases["identity"].to_list() for name, one in scores.items()}
        sheet = comparison_grid(squares, plan.prompts, params.evaluate.seeds, drawn, identities)
        (target / "grid.png").write_bytes(png_bytes(sheet))
    shutil.rmtree(own)  # only a drawing that was stopped needs it
    path = root / OUTPUTS[1].format(id=subject_id)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, json.dumps(metrics, indent=1).encode() + b"\n")
    _track(root, subject_id, manifest["fingerprint"], metrics)
    say(f"evaluate {subject_id}: {evaluation.headline(metrics)}")


def fingerprint(plan: Plan, encoders: Encoders, photos: Mapping[str, Any]) -> dict[str, Any]:
    """Say what scores depend on besides the model: only those with the same hash may be compared."""
    return {
        "base": model_hash(plan.base),
        "cases": [asdict(case) for case in plan.cases],
        "class_prompt": plan.class_prompt,
        "class_seeds": plan.class_seeds,
        "code": code_hash(evaluation.MODULES),
        "device": device_name(default_device()),
        "dtype": plan.dtype,
        "encoders": encoders.describe(),
        "photos": sha256_of(photos),
        "settings": asdict(plan.settings),
        "versions": library_versions(),
    }


def draw_pictures(plan: Plan, trained: Path | None, store: Path, model: str, name: str) -> list[Image.Image]:
    """Draw the cases, then the class images, or read those that were drawn before; a stopped drawing goes on.

    Args:
        plan: what to draw.
        trained: parts that a training made of the base; None for the base itself.
        store: folder of the folders of pictures; the pictures of the base are shared by all subjects of a class.
        model: fingerprint of the training, or hash of the base.
        name: of the model, for people.
    """
    texts, device = plan.base_texts if trained is None else plan.texts, device_name(default_device())
    about = {"model": model, "settings": asdict(plan.settings), "dtype": plan.dtype, "device": device}
    folder = store / drawing_key(about | {"texts": texts, "seeds": plan.noise_seeds})
    pictures = [Picture(text, (seed,)) for text, seed in zip(texts, plan.noise_seeds, strict=True)]
    load = partial(load_model, plan.base, DTYPES[plan.dtype], trained=trained)
    ensure_drawings(folder, pictures, load, plan.settings, f"evaluation images, {name}")
    pngs = read_pngs(folder, len(pictures))
    return [Image.open(io.BytesIO(png), formats=["PNG"]).convert("RGB") for png in pngs]


def _plan(params: Params, subject_id: str, root: Path) -> Plan:
    subject, class_noun = params.subject(subject_id), params.class_of(subject_id).class_noun
    templates = prompts.load_templates(root / params.evaluate.prompts / f"{subject.kind}.csv")
    chosen = prompts.choose(templates, params.evaluate.max_prompts)
    return Plan(
        resolve_model(params.base.pretrained_model_name_or_path, params.base.revision, root),
        evaluation.cases(chosen, subject.identifier, class_noun, params.evaluate.seeds),
        prompts.class_prompt(class_noun),
        evaluation.class_seeds(params.evaluate.num_class_images, params.evaluate.class_seed),
        settings_of(params.evaluate, params.base.resolution),
        params.base.inference_dtype,
    )


def _encoders(params: Params, root: Path) -> Encoders:
    if params.evaluate.encoders == "hub":
        return Encoders(DinoEncoder(), ClipEncoder())
    folder = root / SCORER
    return Encoders(Lite0Encoder(), BundledScorer(folder) if folder.is_dir() else None)


def _embed_texts(texts: Sequence[str], encoders: Encoders, subject_id: str) -> torch.Tensor | None:
    """Embed the prompts without the identifier; None, said aloud, where the encoder refuses to judge one."""
    if encoders.text is None:
        say(f"evaluate {subject_id}: no image-text encoder in {SCORER}: prompt fidelity is not measured")
        return None
    try:
        return encoders.text.embed_texts(texts)
    except EvaluationError as error:
        say(f"evaluate {subject_id}: prompt fidelity is not measured: {error}")
        return None


def _checkpoints(
    params: Params, subject_id: str, trained: Path, photos: Reference, encoders: Encoders
) -> pd.DataFrame | None:
    """Score the previews that the training left, if it drew any."""
    previews: dict[int, list[Image.Image]] = {}
    for path in sorted((trained / "previews").glob("step-*.png")):
        with Image.open(path, formats=["PNG"]) as image:
            previews.setdefault(int(path.stem.split("-")[1]), []).append(image.convert("RGB"))
    noun = prompts.with_article(params.class_of(subject_id).class_noun)
    asked = [prompts.fill(template, noun) for template in params.train.preview_prompts]
    whole = {step: images for step, images in previews.items() if len(images) == len(asked)}
    if not whole:
        return None
    texts = _embed_texts(asked, encoders, subject_id)
    return evaluation.score_checkpoints(whole, photos, encoders, texts, params.evaluate.confidence)


def _write_pictures(target: Path, drawn: Mapping[str, Sequence[Image.Image]], cases: int) -> None:
    """Write <model>/000.png ... in the order of scores.csv, and class/<model>/000.png ... in that of their seeds."""
    for name, images in drawn.items():
        for folder, part in ((target / name, images[:cases]), (target / "class" / name, images[cases:])):
            folder.mkdir(parents=True)
            for number, image in enumerate(part):
                (folder / f"{number:03d}.png").write_bytes(png_bytes(image))


def _write_scores(target: Path, scores: Mapping[str, Scores], plan: Plan) -> None:
    tables = {
        "scores": {name: one.cases for name, one in scores.items()},
        "prompts": {name: one.prompts for name, one in scores.items()},
        "class_images": {
            name: pd.DataFrame({"noise_seed": plan.class_seeds, "pres": one.pres}) for name, one in scores.items()
        },
    }
    for file, parts in tables.items():
        table = pd.concat([part.assign(model=name) for name, part in parts.items()])
        table.to_csv(target / f"{file}.csv", index=False)


def _track(root: Path, subject_id: str, fingerprint: str, metrics: dict[str, Any]) -> None:
    with open_run(root, key=fingerprint, name=subject_id, tags={"subject": subject_id}) as tracked:
        values = {
            f"{measure}.{name}": float(value)
            for measure in ("identity", "identity_second", "prompt", "diversity", "copying", "prior")
            for name, value in metrics.get(measure, {}).items()
            if isinstance(value, int | float)
        }
        tracked.metrics(values, step=0)
        for name in ("grid.png", "scores.csv", "prompts.csv"):
            tracked.file(root / OUTPUTS[0].format(id=subject_id) / name)


if __name__ == "__main__":
    main(run)
