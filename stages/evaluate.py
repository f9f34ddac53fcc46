"""Turn a trained model into pictures beside those of the base model, their scores, and one table of metrics."""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from PIL import Image

from dreambooth import evaluation, prompts
from dreambooth.encoders import Lite0Encoder
from dreambooth.errors import EvaluationError
from dreambooth.evaluation import Encoders, Scores
from dreambooth.folders import cache_folder, code_hash, new_folder, read_manifest, sha256_of, write_file
from dreambooth.grid import comparison_grid
from dreambooth.images import png_bytes, read_prepared
from dreambooth.models import (
    DTYPES,
    default_device,
    device_name,
    library_versions,
    load_model,
    model_hash,
    resolve_model,
)
from dreambooth.params import Params
from dreambooth.sampling import SamplerSettings, draw, settings_of
from dreambooth.tracking import open_run
from stages.entry import main, say

INPUTS = ("models/{id}", "build/{id}/instance", "data/base", "data/prompts")
OUTPUTS = ("build/{id}/evaluation", "metrics/{id}.json")


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
    manifest, encoders = read_manifest(trained), _encoders(root)
    squares = [evaluation.as_photo(photo) for _, photo in read_prepared(prepared)]
    photos, texts = evaluation.reference(squares, encoders.image), _embed_texts(plan, encoders, subject_id)
    drawn = {"base": _base_pictures(plan), "personalised": draw_pictures(plan, trained, "personalised")}
    scores = {
        name: evaluation.score(
            plan.cases, images[: len(plan.cases)], images[len(plan.cases) :], photos, encoders, texts
        )
        for name, images in drawn.items()
    }
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
        _write_pictures(target, drawn, len(plan.cases))
        _write_scores(target, scores, plan)
        identities = {name: one.cases["identity"].to_list() for name, one in scores.items()}
        sheet = comparison_grid(squares, plan.prompts, params.evaluate.seeds, drawn, identities)
        (target / "grid.png").write_bytes(png_bytes(sheet))
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


def draw_pictures(plan: Plan, trained: Path | None, name: str) -> list[Image.Image]:
    """Draw the cases, then the class images, with the base or with the parts that a training made of it."""
    texts = plan.base_texts if trained is None else plan.texts
    model = load_model(plan.base, DTYPES[plan.dtype], trained=trained)
    return draw(model, texts, plan.noise_seeds, plan.settings, description=f"evaluation images, {name}")


def _plan(params: Params, subject_id: str, root: Path) -> Plan:
    subject, class_noun = params.subject(subject_id), params.class_of(subject_id).class_noun
    templates = prompts.load_templates(root / params.evaluate.prompts / f"{subject.prompt_kind}.csv")
    chosen = prompts.choose(templates, params.evaluate.max_prompts)
    return Plan(
        resolve_model(params.base.pretrained_model_name_or_path, params.base.revision, root),
        evaluation.cases(chosen, subject.identifier, class_noun, params.evaluate.seeds),
        prompts.class_prompt(class_noun),
        evaluation.class_seeds(params.evaluate.num_class_images, params.evaluate.class_seed),
        settings_of(params.evaluate, params.base.resolution),
        params.base.inference_dtype,
    )


def _encoders(root: Path) -> Encoders:
    return Encoders(Lite0Encoder(), None)


def _embed_texts(plan: Plan, encoders: Encoders, subject_id: str) -> torch.Tensor | None:
    """Embed the prompts without the identifier; None, said aloud, where the encoder refuses to judge one."""
    if encoders.text is None:
        say(f"evaluate {subject_id}: no image-text encoder in data/base/scorer: prompt fidelity is not measured")
        return None
    try:
        return encoders.text.embed_texts(list(dict.fromkeys(case.base_prompt for case in plan.cases)))
    except EvaluationError as error:
        say(f"evaluate {subject_id}: prompt fidelity is not measured: {error}")
        return None


def _base_pictures(plan: Plan) -> list[Image.Image]:
    """Return the pictures of the untouched model, drawn once for all subjects of a class."""
    key = {
        "base": model_hash(plan.base),
        "device": device_name(default_device()),
        "dtype": plan.dtype,
        "seeds": plan.noise_seeds,
        "settings": asdict(plan.settings),
        "texts": plan.base_texts,
        "versions": library_versions(),
    }
    store = cache_folder() / "evaluation" / sha256_of(key)
    if not store.is_dir():
        with new_folder(store, key) as target:
            for number, image in enumerate(draw_pictures(plan, None, "base")):
                (target / f"{number:05d}.png").write_bytes(png_bytes(image))
    files = sorted(read_manifest(store)["files"])
    return [Image.open(io.BytesIO((store / name).read_bytes()), formats=["PNG"]).convert("RGB") for name in files]


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
            for measure in ("identity", "prompt", "diversity", "copying", "prior")
            for name, value in metrics.get(measure, {}).items()
            if isinstance(value, int | float)
        }
        tracked.metrics(values, step=0)
        for name in ("grid.png", "scores.csv", "prompts.csv"):
            tracked.file(root / OUTPUTS[0].format(id=subject_id) / name)


if __name__ == "__main__":
    main(run)
