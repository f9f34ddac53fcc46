"""Turn the trained parts and the base model into the forms that other programs load, with a card."""

import json
from pathlib import Path
from typing import Any

from dreambooth.consent import RECORD, read_consent
from dreambooth.errors import EvaluationError, ExportError
from dreambooth.export import write_export
from dreambooth.folders import new_folder, read_manifest
from dreambooth.models import model_hash, resolve_model
from dreambooth.params import Params
from stages.entry import main, say

INPUTS = ("models/{id}", "metrics/{id}.json", "data/base", "data/subjects/{id}")
OUTPUTS = ("export/{id}",)


def run(params: Params, subject_id: str, root: Path) -> None:
    """Write export/<id>/: a pipeline in safetensors, the other export.formats, generation.json, README.md, manifest."""
    base = resolve_model(params.base.pretrained_model_name_or_path, params.base.revision, root)
    trained = root / INPUTS[0].format(id=subject_id)
    manifest = read_manifest(trained)
    if "class_images" not in manifest:
        raise ExportError(f"{trained} was made by an older version; train again: dvc repro train@{subject_id}")
    fingerprint, method = manifest["fingerprint"], manifest["method"]
    metrics = json.loads((root / INPUTS[1].format(id=subject_id)).read_text(encoding="utf-8"))
    if metrics["model"] != fingerprint:
        raise EvaluationError(
            f"{INPUTS[1].format(id=subject_id)} was measured on another model than {INPUTS[0].format(id=subject_id)}; "
            f"run the evaluation first: dvc repro evaluate@{subject_id}"
        )
    base_hash = model_hash(base)
    consent = read_consent(root / INPUTS[3].format(id=subject_id) / RECORD)
    about: dict[str, Any] = {"base": base_hash, "model": fingerprint, "subject": subject_id}
    about |= {"consent": consent.as_text()} if consent else {}
    with new_folder(root / OUTPUTS[0].format(id=subject_id), about) as target:
        write_export(
            target, base, trained, subject_id, params, base_hash, metrics, consent, method, manifest["class_images"]
        )
    say(f"export {subject_id}: {OUTPUTS[0].format(id=subject_id)}")


if __name__ == "__main__":
    main(run)
