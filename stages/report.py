"""Turn an evaluation into a page that people read, with the verdict of the gate on it."""

import json
from pathlib import Path
from typing import Any

from dreambooth import prompts
from dreambooth.errors import EvaluationError
from dreambooth.folders import new_folder, read_manifest
from dreambooth.gate import decide, read_scorecard
from dreambooth.params import Params
from dreambooth.report import Sources, write_report
from dreambooth.tracking import open_run
from stages.entry import main, say

INPUTS = (
    "build/{id}/evaluation",
    "build/{id}/instance",
    "data/subjects/{id}",
    "dreambooth/templates",
    "metrics/{id}.json",
    "models/{id}",
)
OUTPUTS = ("reports/{id}",)
LICENCES = ("LICENSE", "LICENSE.txt", "LICENSE.md")


def run(params: Params, subject_id: str, root: Path) -> None:
    """Write reports/<id>/: index.html, report.json, scores.csv, prompts.csv, grid.png, the curves, manifest."""
    evaluation, instance, photos, _, metrics_path, trained = (root / path.format(id=subject_id) for path in INPUTS)
    training = read_manifest(trained)
    model = training["fingerprint"]
    metrics = _metrics(metrics_path, model, subject_id)
    cards = [read_scorecard(evaluation, name) for name in ("personalised", "base")]
    decision = decide(cards[0], cards[1], params.gate, params.evaluate.confidence)
    subject, class_noun = params.subject(subject_id), params.class_of(subject_id).class_noun
    title = f"{subject_id}: {prompts.instance_prompt(subject.identifier, class_noun)}"
    sources = Sources(evaluation, instance, trained, _licence(photos), training)
    with new_folder(root / OUTPUTS[0].format(id=subject_id), {"model": model}) as target:
        write_report(target, title, sources, metrics, decision, params.gate.first_prompt_drop)
    _track(root, subject_id, model)
    say(f"report {subject_id}: {decision.line}")
    say(f"report {subject_id}: {OUTPUTS[0].format(id=subject_id)}/index.html")


def _metrics(path: Path, model: str, subject_id: str) -> dict[str, Any]:
    metrics: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if metrics["model"] != model:
        raise EvaluationError(
            f"{path} was measured on another model than models/{subject_id}; run the evaluation first: "
            f"dvc repro evaluate@{subject_id}"
        )
    return metrics


def _licence(photos: Path) -> str:
    """Return the first line of a licence file among the photos."""
    for path in (photos / name for name in LICENCES):
        if path.is_file():
            lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            return lines[0][:200] if lines else "not stated"
    return "not stated; put a LICENSE.txt beside the photos"


def _track(root: Path, subject_id: str, model: str) -> None:
    folder = root / OUTPUTS[0].format(id=subject_id)
    with open_run(root, key=model, name=subject_id, tags={"subject": subject_id}) as tracked:
        for path in sorted(folder.iterdir()):
            if path.name != "manifest.json":
                tracked.file(path, "report")


if __name__ == "__main__":
    main(run)
