"""Turn a trained model into pictures beside those of the base model, their scores, and one table of metrics."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dreambooth import evaluation, prompts
from dreambooth.encoders import Lite0Encoder
from dreambooth.folders import code_hash, new_folder, read_manifest, sha256_of, write_file
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
from dreambooth.sampling import settings_of
from dreambooth.tracking import open_run
from stages.entry import main, say

INPUTS = ("models/{id}", "build/{id}/instance", "data/base", "data/prompts/bundled")
OUTPUTS = ("build/{id}/evaluation", "metrics/{id}.json")


def run(params: Params, subject_id: str, root: Path) -> None:
    """Write build/<id>/evaluation/ (base/, personalised/, grid.png, scores.csv, manifest) and metrics/<id>.json."""
    subject, class_noun = params.subject(subject_id), params.class_of(subject_id).class_noun
    base = resolve_model(params.base.pretrained_model_name_or_path, params.base.revision, root)
    trained = root / INPUTS[0].format(id=subject_id)
    manifest = read_manifest(trained)
    templates = prompts.load_templates(root / INPUTS[3] / f"{subject.kind}.csv")
    todo = evaluation.cases(templates, subject.identifier, class_noun, params.evaluate.seeds)
    settings = settings_of(params.evaluate, params.base.resolution)
    dtype = DTYPES[params.base.inference_dtype]
    base_texts, texts = [case.base_prompt for case in todo], [case.personalised_prompt for case in todo]
    before = evaluation.draw_cases(load_model(base, dtype), base_texts, todo, settings, "base")
    after = evaluation.draw_cases(load_model(base, dtype, trained=trained), texts, todo, settings, "personalised")
    prepared = root / INPUTS[1].format(id=subject_id)
    photos = [evaluation.shrink(photo) for _, photo in read_prepared(prepared)]
    encoder = Lite0Encoder()
    scores = evaluation.score(todo, before, after, photos, encoder)
    metrics = evaluation.summarise(scores, photos, encoder, params.evaluate.confidence)
    sheet = evaluation.comparison_grid(todo, before, after, photos, scores)
    how = {
        "base": model_hash(base),
        "cases": [asdict(case) for case in todo],
        "code": code_hash(),
        "device": device_name(default_device()),
        "dtype": params.base.inference_dtype,
        "encoder": metrics["encoder"],
        "photos": sha256_of(read_manifest(prepared)["files"]),
        "settings": asdict(settings),
        "versions": library_versions(),
    }
    about = {"fingerprint": sha256_of(how), "model": manifest["fingerprint"]}
    metrics |= about
    with new_folder(root / OUTPUTS[0].format(id=subject_id), about) as target:
        for name, images in (("base", before), ("personalised", after)):
            (target / name).mkdir()
            for number, image in enumerate(images):
                (target / name / f"{number:03d}.png").write_bytes(png_bytes(image))
        (target / "grid.png").write_bytes(png_bytes(sheet))
        scores.to_csv(target / "scores.csv", index=False)
    path = root / OUTPUTS[1].format(id=subject_id)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, json.dumps(metrics, indent=1).encode() + b"\n")
    _track(root, subject_id, manifest["fingerprint"], metrics)
    say(f"evaluate {subject_id}: {evaluation.verdict(metrics)}")


def _track(root: Path, subject_id: str, fingerprint: str, metrics: dict[str, Any]) -> None:
    with open_run(root, key=fingerprint, name=subject_id, tags={"subject": subject_id}) as tracked:
        values = {f"identity.{name}": value for name, value in metrics["identity"].items() if value is not None}
        tracked.metrics(values, step=0)
        tracked.file(root / OUTPUTS[0].format(id=subject_id) / "grid.png")
        tracked.file(root / OUTPUTS[0].format(id=subject_id) / "scores.csv")


if __name__ == "__main__":
    main(run)
