"""Write the model card of an export, in the hub's format.

Names and prompts are what somebody wrote: in the front matter and in the snippet they are literals, elsewhere text.
"""

import html
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dreambooth.consent import Consent
from dreambooth.folders import sha256_of_file
from dreambooth.intervals import name_difference, over_prompts
from dreambooth.params import LORA_METHODS, TOKEN_METHODS, Params
from dreambooth.sampling import SCHEDULERS

# How the files of each format are loaded; words in capitals stand for names, BASE for a whole literal.
LOADING = {
    "single_file": '`PIPELINE.from_single_file("EXPORT/FILE", config="EXPORT")`, ComfyUI, A1111',
    "lora": 'pipeline of the base, then `.load_lora_weights("EXPORT/lora")`',
    "kohya": 'ComfyUI, A1111 (models/Lora), `.load_lora_weights("EXPORT/FILE")`',
    "embedding": "ComfyUI and A1111 (embeddings/), by the file's name; `.load_textual_inversion(path, token=...)`",
}
_WORDLESS = (
    '`PIPELINE.from_single_file("EXPORT/FILE", config=BASE)`, ComfyUI, A1111; it has the vocabulary of the base, so '
    "load the word from embedding/ as well"
)
# The configs of SDXL on the hub let text_encoder_2 pool at the largest number, which is that of a new word.
_EMBEDDING_SDXL = (
    "ComfyUI and A1111 (embeddings/), by the file's name; `.load_textual_inversion(rows, token=..., text_encoder=..., "
    "tokenizer=...)` with clip_l for the first and clip_g for the second encoder, after "
    "`pipeline.text_encoder_2.text_model.eos_token_id = pipeline.tokenizer_2.eos_token_id`"
)
_TOGETHER = "LoRA and embedding were trained together: load both, neither is the subject without the other."


def card(
    folder: Path,
    subject_id: str,
    params: Params,
    base_hash: str,
    metrics: dict[str, Any],
    defaults: Mapping[str, Any],
    consent: Consent | None,
    method: str,
    class_images: int,
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
        class_images: how many it was trained on.
    """
    base, prompt = params.base.pretrained_model_name_or_path, defaults["instance_prompt"]
    pipeline = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))["_class_name"]
    parts = [
        _front_matter(base, params.export.license, prompt),
        f"# {subject_id}: a {_text(defaults['class_noun'])} called {_text(defaults['identifier'])}",
        f"A {pipeline}, personalised with DreamBooth (Ruiz et al. 2022; method: {method}). Say {_code(prompt)}.",
        _usage(subject_id, pipeline, defaults),
        _files(folder, f"export/{subject_id}", pipeline, params, method),
        _TOGETHER if method in LORA_METHODS and method in TOKEN_METHODS else "",
        _scores(metrics),
        f"Trained from {_code(base)} ({_revision(params)}sha256 {base_hash}) on {metrics['photos']} photos with these "
        "parameters:",
        _parameters(params, class_images),
        _licence(params.export.license, base),
        _consent(consent),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(base: str, license_id: str | None, prompt: str) -> str:
    lines = [f"base_model: {_literal(base)}", "library_name: diffusers", "pipeline_tag: text-to-image"]
    lines += [f"license: {_literal(license_id)}"] if license_id else []
    lines += ["tags: [dreambooth, text-to-image]", f"instance_prompt: {_literal(prompt)}"]
    return "\n".join(["---", *lines, "---"])


def _usage(subject_id: str, pipeline: str, defaults: Mapping[str, Any]) -> str:
    """Show how to draw as the evaluation did: its solver, steps and precision."""
    scheduler, options = SCHEDULERS[defaults["scheduler"]]
    given = "".join(f", {name}={value!r}" for name, value in options.items())
    dtype = defaults["inference_dtype"]
    place = "" if dtype == "float32" else '.to("cuda")'
    return f"""```python
import torch
from diffusers import {scheduler}, {pipeline}
pipeline = {pipeline}.from_pretrained("export/{subject_id}", dtype=torch.{dtype}){place}
pipeline.scheduler = {scheduler}.from_config(pipeline.scheduler.config{given})
pipeline({_literal(defaults["instance_prompt"])}, num_inference_steps={defaults["num_inference_steps"]},
         guidance_scale={defaults["guidance_scale"]}, height={defaults["resolution"]}, width={defaults["resolution"]})
```"""


def _files(folder: Path, place: str, pipeline: str, params: Params, method: str) -> str:
    """List every file of weights with its hash, and how it is loaded."""
    lines = ["| file | sha256 | loaded by |", "|---|---|---|"]
    base = params.base.pretrained_model_name_or_path
    names = {"PIPELINE": pipeline, "EXPORT": place, "BASE": _literal(base).replace("|", r"\|")}
    for path in sorted(folder.rglob("*.safetensors")):
        name = path.relative_to(folder).as_posix()
        how = _loading(name.split("/")[0], pipeline, params, method).replace("`", _fence(base))
        how = _filled(how, names | {"FILE": name})
        lines.append(f"| {name} | {sha256_of_file(path)} | {how} |")
    return "\n".join(lines)


def _loading(kind: str, pipeline: str, params: Params, method: str) -> str:
    """Say how a file of a format is loaded, with what this training makes different."""
    if kind == "single_file" and method in TOKEN_METHODS:
        return _WORDLESS
    if kind == "embedding" and "XL" in pipeline:
        return _EMBEDDING_SDXL
    return LOADING.get(kind, "from_pretrained")


def _filled(how: str, names: Mapping[str, str]) -> str:
    """Put names in the places of words, in one go: a name may have such a word in it."""
    return re.sub("|".join(names), lambda found: names[found[0]], how)


def _scores(metrics: dict[str, Any]) -> str:
    identity = metrics["identity"]
    counted = identity["prompts"]
    lines = [
        "| measured | value |",
        "|---|---|",
        f"| identity (mean cosine with the photos) | {identity['personalised']:.3f} |",
        f"| identity of the base model, same prompts and seeds | {identity['base']:.3f} |",
        f"| {name_difference(counted, metrics['confidence'])} | {over_prompts(identity, counted)} |",
        f"| photos against each other | {identity['ceiling']:.3f} |",
    ]
    if second := metrics.get("identity_second"):
        name, difference = metrics["scorer"]["name"], over_prompts(second, second["prompts"])
        lines.append(f"| identity by {name}, which decided nothing | {second['personalised']:.3f}, {difference} |")
    if prompt := metrics.get("prompt"):
        count = prompt["prompts"]
        lines.append(f"| prompt fidelity against the base, over {count} prompts | {over_prompts(prompt, count)} |")
    if copying := metrics.get("copying"):
        lines.append(f"| pictures that repeat a photo | {copying['rate']:.0%} |")
    lines.append(f"| encoder | {metrics['encoder']['name']} {metrics['encoder']['revision']} |")
    lines.append("| safety | not checked; no safety checker is part of this pipeline |")
    return "\n".join(lines)


def _parameters(params: Params, class_images: int) -> str:
    """List every parameter of the training by its name in params.yaml, and those beside them that shaped it."""
    beside: dict[str, Any] = {"base.resolution": params.base.resolution}
    beside["prior.kind"] = params.prior.kind if params.has_prior else "none"
    if class_images:
        beside["class images"] = class_images
    values = params.train.model_dump(mode="json", exclude={"preview_prompts"})
    rows = [f"| {name} | {value} |" for name, value in (values | beside).items()]
    return "\n".join(["| train | value |", "|---|---|", *rows])


def _licence(license_id: str | None, base: str) -> str:
    named = f"Licence: {_text(license_id)}." if license_id else "Licence: not stated (export.license)."
    return f"{named} The licence of the base {_code(base)} holds for what was made from it as well."


def _consent(consent: Consent | None) -> str:
    if consent is None:
        return ""
    return (
        f"Consent: given by {_text(consent.who)} on {consent.given}, for {_text(consent.purpose)}, until "
        f"{consent.until}. Do not use this model for anything else, or after that day."
    )


def _revision(params: Params) -> str:
    return f"revision {params.base.revision}, " if params.base.revision else ""


def _literal(text: str) -> str:
    """Return a text of one line as a literal of JSON, which is one of YAML and of Python as well."""
    return json.dumps(text, ensure_ascii=False)


def _text(text: str) -> str:
    """Return a text as it is to be read: nothing in it is HTML or Markdown."""
    return re.sub(r"([\\`*_\[\]|~#$])", r"\\\1", html.escape(text, quote=False))


def _code(text: str) -> str:
    """Return a text as a span of code, in more backticks than it has itself."""
    blank = " " if "`" in text else ""  # which Markdown takes away: the text may begin with a backtick
    return f"{_fence(text)}{blank}{text}{blank}{_fence(text)}"


def _fence(text: str) -> str:
    return "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
