"""Turn a trained model into pictures beside those of the base model, their scores, and one table of metrics."""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from PIL import Image

from dreambooth import evaluation, prompts
from dreambooth.comparison import Candidate, Comparison, Plan, compare_models, write_comparison
from dreambooth.encoders import Lite0Encoder
from dreambooth.errors import EvaluationError
from dreambooth.evaluation import BASE, Encoders, Reference
from dreambooth.folders import (
    GENERATION,
    cache_folder,
    cache_of,
    new_folder,
    read_manifest,
    sha256_of,
    write_file,
)
from dreambooth.hardware import computes_on
from dreambooth.images import read_prepared
from dreambooth.locks import only_one_of
from dreambooth.mlflowstore import flat_metrics
from dreambooth.models import default_device, model_hash, resolve_model
from dreambooth.params import Params
from dreambooth.sampling import settings_of
from dreambooth.scorer import BundledScorer
from dreambooth.tracking import open_run
from dreambooth.vocabulary import SCORER
from stages.entry import main, say

INPUTS = ("models/{id}", "build/{id}/instance", "data/base", "data/prompts")
OUTPUTS = ("build/{id}/evaluation", "metrics/{id}.json")


def run(params: Params, subject_id: str, root: Path) -> None:
    """Write build/<id>/evaluation/ (pictures, grid.png, {scores,prompts,class_images}.csv) and metrics/<id>.json."""
    trained = root / INPUTS[0].format(id=subject_id)
    for line in computes_on(default_device()):
        say(f"evaluate {subject_id}: {line}")
    model, encoders = read_manifest(trained)["fingerprint"], encoders_of(params, root)
    with _alone_with_drawings(root, subject_id):
        found = compare(params, subject_id, root, {"personalised": (trained, model)}, encoders)
        confidence = params.evaluate.confidence
        metrics = evaluation.summarise(found.scores[BASE], found.scores["personalised"], found.photos, confidence)
        about = {"fingerprint": sha256_of(found.how), "model": model}
        metrics |= {"flat": {name: sum(flags) for name, flags in found.flat.items()}} | encoders.describe() | about
        with new_folder(root / OUTPUTS[0].format(id=subject_id), about) as target:
            write_comparison(target, found)
            if (checkpoints := _checkpoints(params, subject_id, trained, found.photos, encoders)) is not None:
                checkpoints.to_csv(target / "checkpoints.csv", index=False)
    path = root / OUTPUTS[1].format(id=subject_id)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, json.dumps(metrics, indent=1).encode() + b"\n")
    _track(root, subject_id, metrics)
    say(f"evaluate {subject_id}: {evaluation.headline(metrics)}")
    if remark := evaluation.flat_remark(metrics["flat"]):
        say(f"evaluate {subject_id}: warning: {remark}")


def beside_champion(
    params: Params, subject_id: str, root: Path, champion: Path, fingerprint: str, target: Path
) -> None:
    """Evaluate champion and challenger in one run, for scores that may be compared; no part of the DAG.

    Args:
        params: of the project.
        subject_id: whose models they are.
        root: of the project, with the challenger in models/<id>.
        champion: folder of the champion's parts, for example its export, downloaded.
        fingerprint: of the champion's training.
        target: a folder that gets what build/<id>/evaluation has, with the champion as one model more.
    """
    trained = root / INPUTS[0].format(id=subject_id)
    model, encoders = read_manifest(trained)["fingerprint"], encoders_of(params, root)
    models = {"champion": (champion, fingerprint), "personalised": (trained, model)}
    with (
        _alone_with_drawings(root, subject_id),
        new_folder(target, {"model": model, "champion": fingerprint}) as folder,
    ):
        write_comparison(folder, compare(params, subject_id, root, models, encoders))


def compare(
    params: Params, subject_id: str, root: Path, models: dict[str, tuple[Path, str]], encoders: Encoders
) -> Comparison:
    """Draw and score the base and these models: by name, the folder of the trained parts and its fingerprint."""
    plan, prepared = _plan(params, subject_id, root), root / INPUTS[1].format(id=subject_id)
    shared, own = cache_folder() / "evaluation", _own_drawings(root, subject_id)
    identifier, class_noun = params.subject(subject_id).identifier, params.class_of(subject_id).class_noun
    candidates = {BASE: Candidate(None, model_hash(plan.base), prompts.with_article(class_noun), shared)}
    for name, (folder, fingerprint) in models.items():
        called = _words_of(folder) or f"{identifier} {class_noun}"
        candidates[name] = Candidate(folder, fingerprint, called, own)
    squares = [evaluation.as_photo(photo) for _, photo in read_prepared(prepared)]
    photos_hash, texts = (
        sha256_of(read_manifest(prepared)["files"]),
        _embed_texts(plan.base_prompts, encoders, subject_id),
    )
    return compare_models(plan, candidates, squares, photos_hash, encoders, texts)


def _words_of(trained: Path) -> str | None:
    """Return what an export or a training calls its subject: it may be from before params.yaml changed."""
    path = trained / GENERATION
    if path.is_file():
        told = json.loads(path.read_text(encoding="utf-8"))
    else:
        told = read_manifest(trained, verify=False).get("inputs", {})
    return f"{told['identifier']} {told['class_noun']}" if {"identifier", "class_noun"} <= told.keys() else None


def _own_drawings(root: Path, subject_id: str) -> Path:
    """Return the folder of what the trainings of one subject have drawn, until it is written down elsewhere."""
    return cache_of(root, "evaluation", subject_id)


@contextmanager
def _alone_with_drawings(root: Path, subject_id: str) -> Iterator[None]:
    """Let one evaluation at a time draw for a subject, then remove its drawings: another one would lose its own.

    A promotion evaluates too, and may begin at any moment: whoever comes second waits. An evaluation that is stopped
    leaves its drawings, and the next one goes on with them.
    """

    def wait(line: str) -> None:
        say(f"evaluate {subject_id}: {line}")

    with only_one_of(root, "evaluate", subject_id, f"an evaluation of {subject_id}", wait):
        yield
        shutil.rmtree(_own_drawings(root, subject_id))


def _plan(params: Params, subject_id: str, root: Path) -> Plan:
    class_noun = params.class_of(subject_id).class_noun
    templates = prompts.templates_of(root, params.prompts_file(subject_id))
    chosen = prompts.choose(templates, params.evaluate.max_prompts)
    return Plan(
        resolve_model(params.base.pretrained_model_name_or_path, params.base.revision, root),
        evaluation.cases(chosen, class_noun, params.evaluate.seeds),
        prompts.class_prompt(class_noun),
        evaluation.class_seeds(params.evaluate.num_class_images, params.evaluate.class_seed),
        settings_of(params.evaluate, params.base.resolution),
        params.base.inference_dtype,
    )


def encoders_of(params: Params, root: Path) -> Encoders:
    """Return what looks at the pictures, as params.yaml says."""
    if params.evaluate.encoders == "hub":
        from dreambooth.hub_encoders import ClipEncoder, DinoEncoder  # its import takes seconds

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


def _track(root: Path, subject_id: str, metrics: dict[str, Any]) -> None:
    """Send the scores to the run of the training; of the pictures the sheet, and those of the first seed one by one.

    The latter lie where the registration puts the scores: beside those of a later version, people choose by them.
    """
    folder = root / OUTPUTS[0].format(id=subject_id)
    with open_run(root, key=metrics["model"], name=subject_id, tags={"subject": subject_id}) as tracked:
        tracked.metrics(flat_metrics(metrics), step=0)
        for name in ("grid.png", "scores.csv", "prompts.csv"):
            tracked.file(folder / name)
        for name in (BASE, "personalised"):
            for path in _of_first_seed(folder / name, metrics["seeds"]):
                tracked.file(path, f"evaluation/{metrics['fingerprint']}/{name}")


def _of_first_seed(folder: Path, seeds: int) -> list[Path]:
    """Return the pictures of the first seed of each prompt: they are numbered, seeds of a prompt beside each other."""
    return sorted(folder.glob("*.png"), key=lambda path: int(path.stem))[::seeds]


if __name__ == "__main__":
    main(run)
