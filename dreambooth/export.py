"""Put what a training made into the forms that other programs load, with a card that says what it is.

Each format beside the pipeline of diffusers has a folder of its own name in the export.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dreambooth import lora_formats, prompts
from dreambooth.adapters import CLIP_KEYS, EMBEDDINGS_FILE, LORA_FILE, METADATA
from dreambooth.card import card
from dreambooth.consent import Consent
from dreambooth.errors import ExportError, ModelError
from dreambooth.families import SDXL
from dreambooth.layouts import UNetShape, is_open_clip, single_file
from dreambooth.lora import read_lora
from dreambooth.models import DTYPES, write_pipeline
from dreambooth.params import METHODS_OF_FORMAT, Params
from dreambooth.weight_files import cast_weights, kohya_header, modelspec, read_weights, write_weights

GENERATION = "generation.json"
CARD = "README.md"


def write_export(
    folder: Path,
    base: Path,
    trained: Path,
    subject_id: str,
    params: Params,
    base_hash: str,
    metrics: dict[str, Any],
    consent: Consent | None = None,
    method: str = "full",
) -> None:
    """Fill a folder with a pipeline of diffusers, the other formats, the defaults of generation, and its card.

    Raises:
        ExportError: the training made nothing that a format of export.formats could hold.
    """
    require_formats(params, method)
    write_pipeline(base, trained, folder, DTYPES[params.train.save_dtype])
    defaults = generation_defaults(params, subject_id)
    for name in params.export.formats:
        if name != "diffusers":
            _WRITERS[name](folder, trained, subject_id, params, metrics["photos"])
    (folder / GENERATION).write_text(json.dumps(defaults, indent=2) + "\n", encoding="utf-8")
    text = card(folder, subject_id, params, base_hash, metrics, defaults, consent, method)
    (folder / CARD).write_text(text, encoding="utf-8")


def require_formats(params: Params, method: str) -> None:
    """Refuse formats that a training by this method does not fill."""
    for name in params.export.formats:
        methods = METHODS_OF_FORMAT.get(name)
        if methods and method not in methods:
            raise ExportError(
                f"export.formats: {name} holds what train.method {' or '.join(methods)} makes, and this model was "
                f"trained by {method}; take it out of export.formats, or train again"
            )


def generation_defaults(params: Params, subject_id: str) -> dict[str, Any]:
    """Return how pictures of a subject are drawn when nothing else is asked for: as they were evaluated."""
    subject, class_noun = params.subject(subject_id), params.class_of(subject_id).class_noun
    return {
        "subject": subject_id,
        "identifier": subject.identifier,
        "class_noun": class_noun,
        "instance_prompt": prompts.instance_prompt(subject.identifier, class_noun),
        "resolution": params.base.resolution,
        "inference_dtype": params.base.inference_dtype,
        "scheduler": params.evaluate.scheduler,
        "num_inference_steps": params.evaluate.num_inference_steps,
        "guidance_scale": params.evaluate.guidance_scale,
        "negative_prompt": "",
    }


def family_of(pipeline: Path) -> str:
    """Return sd1, sd2 or sdxl by the parts of a pipeline folder."""
    if (pipeline / "text_encoder_2").is_dir():
        return "sdxl"
    return "sd2" if is_open_clip(_config(pipeline, "text_encoder")) else "sd1"


def a1111_embedding(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Name the (N, D) vectors of a word as the web UI does: emb_params, for SDXL clip_l and clip_g.

    AUTOMATIC1111/stable-diffusion-webui, modules/textual_inversion/textual_inversion.py. The word is the file's name.

    Raises:
        ModelError: neither one entry nor the two of SDXL.
    """
    rows = {name: tensor.reshape(-1, tensor.shape[-1]) for name, tensor in weights.items()}
    if set(rows) == set(CLIP_KEYS):
        return rows
    if len(rows) != 1:
        raise ModelError(f"{EMBEDDINGS_FILE} holds {', '.join(rows)}; it should hold one word, or clip_l and clip_g")
    return {"emb_params": next(iter(rows.values()))}


def _write_single_file(folder: Path, trained: Path, subject_id: str, params: Params, photos: int) -> None:
    """Write the pipeline of diffusers that stands in the export as one file in the original layout."""
    parts = [part for part in SDXL.weighted if (folder / part).is_dir()]
    dtype = DTYPES[params.export.dtype]
    weights = single_file(
        {part: cast_weights(read_weights(folder / part), dtype) for part in parts},
        {part: _config(folder, part) for part in parts},
    )
    write_weights(
        folder / f"single_file/{subject_id}.safetensors", weights, _spec("single_file", folder, subject_id, params)
    )


def _write_lora(folder: Path, trained: Path, subject_id: str, params: Params, photos: int) -> None:
    lora, adapter = read_lora(trained / LORA_FILE)
    weights = lora_formats.to_diffusers(lora_formats.cast(lora, DTYPES[params.export.dtype]))
    header = _spec("lora", folder, subject_id, params) | {METADATA: json.dumps(adapter, sort_keys=True)}
    write_weights(folder / "lora" / LORA_FILE, weights, header)


def _write_kohya(folder: Path, trained: Path, subject_id: str, params: Params, photos: int) -> None:
    lora, _ = read_lora(trained / LORA_FILE)
    family, first = family_of(folder), next(iter(lora.values()))
    shape = UNetShape.of(_config(folder, "unet")) if family == "sdxl" else None
    weights = lora_formats.to_kohya(lora_formats.cast(lora, DTYPES[params.export.dtype]), shape)
    header = _spec("kohya", folder, subject_id, params)
    header |= kohya_header(family, first.rank, first.alpha, subject_id, params, photos)
    write_weights(folder / f"kohya/{subject_id}.safetensors", weights, header)


def _write_embedding(folder: Path, trained: Path, subject_id: str, params: Params, photos: int) -> None:
    learned = cast_weights(read_weights(trained / EMBEDDINGS_FILE), DTYPES[params.export.dtype])
    word = "".join(one for one in params.subject(subject_id).identifier if one.isalnum() or one in "-_")
    header = _spec("embedding", folder, subject_id, params)
    write_weights(folder / f"embedding/{word or subject_id}.safetensors", a1111_embedding(learned), header)


_WRITERS = {
    "single_file": _write_single_file,
    "lora": _write_lora,
    "kohya": _write_kohya,
    "embedding": _write_embedding,
}


def _spec(kind: str, folder: Path, subject_id: str, params: Params) -> dict[str, str]:
    defaults = generation_defaults(params, subject_id)
    scheduler = json.loads((folder / "scheduler/scheduler_config.json").read_text(encoding="utf-8"))
    about = {
        "description": f"a {defaults['class_noun']} called {defaults['identifier']}, personalised with DreamBooth",
        "trigger_phrase": f"{defaults['identifier']} {defaults['class_noun']}",
        "prediction_type": "v" if scheduler.get("prediction_type") == "v_prediction" else "epsilon",
    }
    return modelspec(kind, family_of(folder), subject_id, params, about)


def _config(folder: Path, part: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / part / "config.json").read_text(encoding="utf-8"))
    return config
