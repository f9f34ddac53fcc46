"""Write the model card of an export, in the hub's format."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dreambooth.consent import Consent
from dreambooth.folders import sha256_of_file
from dreambooth.params import Params

# How the files of each format are loaded.
LOADING = {
    "single_file": '`PIPELINE.from_single_file("EXPORT/FILE", config="EXPORT")`, ComfyUI, A1111',
    "lora": 'pipeline of the base, then `.load_lora_weights("EXPORT/lora")`',
    "kohya": 'ComfyUI, A1111 (models/Lora), `.load_lora_weights("EXPORT/FILE")`',
    "embedding": "ComfyUI and A1111 (embeddings/), by the file's name; `.load_textual_inversion(path, token=...)`",
}


def card(
    folder: Path,
    subject_id: str,
    params: Params,
    base_hash: str,
    metrics: dict[str, Any],
    defaults: Mapping[str, Any],
    consent: Consent | None = None,
    method: str = "full",
) -> str:
    """Return the card: what it is, how to call it, its files, what was measured, what was not, from what it was made.

    Args:
        folder: of the export; its files of weights are listed with their hashes.
        subject_id: whose model it is.
        params: of the project.
        base_hash: sha256 of the base.
        metrics: of the evaluation.
        defaults: how pictures are drawn, see `export.generation_defaults`.
        consent: of a person.
        method: how it was trained.
    """
    base, prompt = params.base.pretrained_model_name_or_path, defaults["instance_prompt"]
    pipeline = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))["_class_name"]
    parts = [
        _front_matter(base, params.export.license, prompt),
        f"# {subject_id}: a {defaults['class_noun']} called {defaults['identifier']}",
        f"A {pipeline}, personalised with DreamBooth (Ruiz et al. 2022; method: {method}). Say `{prompt}`.",
        _usage(subject_id, pipeline, defaults),
        _files(folder, f"export/{subject_id}", pipeline),
        _scores(metrics),
        f"Trained from `{base}` (sha256 {base_hash}) on {metrics['photos']} photos with these parameters:",
        _parameters(params),
        _licence(params.export.license, base),
        _consent(consent),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(base: str, license_id: str | None, prompt: str) -> str:
    lines = [f"base_model: {base}", "library_name: diffusers", "pipeline_tag: text-to-image"]
    lines += [f"license: {license_id}"] if license_id else []
    lines += ["tags: [dreambooth, text-to-image]", f'instance_prompt: "{prompt}"']
    return "\n".join(["---", *lines, "---"])


def _usage(subject_id: str, pipeline: str, defaults: Mapping[str, Any]) -> str:
    return f"""```python
from diffusers import {pipeline}
pipeline = {pipeline}.from_pretrained("export/{subject_id}")
pipeline("{defaults["instance_prompt"]}", num_inference_steps={defaults["num_inference_steps"]},
         guidance_scale={defaults["guidance_scale"]}, height={defaults["resolution"]}, width={defaults["resolution"]})
```"""


def _files(folder: Path, place: str, pipeline: str) -> str:
    """List every file of weights with its hash, and how it is loaded."""
    lines = ["| file | sha256 | loaded by |", "|---|---|---|"]
    for path in sorted(folder.rglob("*.safetensors")):
        name = path.relative_to(folder).as_posix()
        how = LOADING.get(name.split("/")[0], "from_pretrained")
        how = how.replace("PIPELINE", pipeline).replace("FILE", name).replace("EXPORT", place)
        lines.append(f"| {name} | {sha256_of_file(path)} | {how} |")
    return "\n".join(lines)


def _scores(metrics: dict[str, Any]) -> str:
    identity = metrics["identity"]
    interval = f"{metrics['confidence']:.0%} interval over {metrics['prompts']} prompts"
    lines = [
        "| measured | value |",
        "|---|---|",
        f"| identity (mean cosine with the photos) | {identity['personalised']:.3f} |",
        f"| identity of the base model, same prompts and seeds | {identity['base']:.3f} |",
        f"| difference, {interval} | {_interval(identity)} |",
        f"| photos against each other | {identity['ceiling']:.3f} |",
    ]
    if prompt := metrics.get("prompt"):
        lines.append(f"| prompt fidelity against the base | {_interval(prompt)} |")
    if copying := metrics.get("copying"):
        lines.append(f"| pictures that repeat a photo | {copying['rate']:.0%} |")
    lines.append(f"| encoder | {metrics['encoder']['name']} {metrics['encoder']['revision']} |")
    lines.append("| safety | not checked; no safety checker is part of this pipeline |")
    return "\n".join(lines)


def _interval(gain: Mapping[str, Any]) -> str:
    return f"{gain['gain']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}]"


def _parameters(params: Params) -> str:
    """List every parameter of the training by its name in params.yaml."""
    values = params.train.model_dump(mode="json", exclude={"preview_prompts"})
    return "\n".join(["| train | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in values.items())])


def _licence(license_id: str | None, base: str) -> str:
    named = f"Licence: {license_id}." if license_id else "Licence: not stated (export.license)."
    return f"{named} The licence of the base `{base}` holds for what was made from it as well."


def _consent(consent: Consent | None) -> str:
    if consent is None:
        return ""
    return (
        f"Consent: given by {consent.who} on {consent.given}, for {consent.purpose}, until {consent.until}. "
        "Do not use this model for anything else, or after that day."
    )
