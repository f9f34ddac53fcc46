"""Put what a training made into the forms that other programs load, with a card that says what it is.

Each format beside the pipeline of diffusers has a folder of its own name in the export.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dreambooth import lora_formats, prompts
from dreambooth.adapters import CLIP_KEYS, EMBEDDINGS_FILE, LORA_FILE, METADATA
from dreambooth.bases import read_json
from dreambooth.card import card
from dreambooth.consent import Consent
from dreambooth.errors import ExportError, ModelError
from dreambooth.families import SDXL
from dreambooth.folders import GENERATION
from dreambooth.layouts import UNetShape, is_open_clip, prediction_marks, single_file
from dreambooth.lora import read_lora
from dreambooth.models import DTYPES, write_pipeline
from dreambooth.params import Params, format_faults
from dreambooth.weight_files import cast_weights, kohya_header, modelspec, read_weights, write_weights

CARD = "README.md"


def write_export(
    folder: Path,
    base: Path,
    trained: Path,
    subject_id: str,
    params: Params,
    base_hash: str,
    metrics: dict[str, Any],
    consent: Consent | None,
    method: str,
    class_images: int,
) -> None:
    """Fill a folder with a pipeline of diffusers, the other formats, the defaults of generation, and its card.

    Args:
        folder: is filled.
        base: the untouched pipeline.
        trained: folder of the training.
        subject_id: whose model it is.
        params: of the project.
        base_hash: sha256 of the base.
        metrics: of the evaluation.
        consent: of a person.
        method: how it was trained.
        class_images: how many it was trained on.

    Raises:
        ExportError: the training made nothing that a format of export.formats could hold.
    """
    require_formats(params, method)
    write_pipeline(base, trained, folder, _merged_dtype(params))
    defaults = generation_defaults(params, subject_id)
    work = _Work(folder, base, trained, subject_id, params, metrics["photos"], class_images)
    for name in params.export.formats:
        if name != "diffusers":
            _WRITERS[name](work)
    (folder / GENERATION).write_text(json.dumps(defaults, indent=2) + "\n", encoding="utf-8")
    text = card(folder, subject_id, params, base_hash, metrics, defaults, consent, method, class_images)
    (folder / CARD).write_text(text, encoding="utf-8")


def require_formats(params: Params, method: str) -> None:
    """Refuse formats that the training that was done, by this method, does not fill."""
    if faults := [*format_faults(params.export, method, params.train.use_dora)]:
        raise ExportError("; ".join(faults))


def _merged_dtype(params: Params) -> torch.dtype:
    """Return the precision of parts that a LoRA or a word is merged into.

    An evaluation in float32 drew with sums that no smaller one holds; one in half precision rounded them too.
    """
    return DTYPES["float32" if params.base.inference_dtype == "float32" else params.train.save_dtype]


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


@dataclass(frozen=True)
class _Work:
    """What the formats are written from: `folder` holds the pipeline of diffusers already."""

    folder: Path
    base: Path
    trained: Path
    subject_id: str
    params: Params
    photos: int
    class_images: int

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return DTYPES[self.params.export.dtype]

    @property
    def about(self) -> dict[str, str]:
        """Entries of a header that tell of the model."""
        defaults = generation_defaults(self.params, self.subject_id)
        called = self.word if (self.trained / EMBEDDINGS_FILE).is_file() else defaults["identifier"]
        return {
            "description": f"a {defaults['class_noun']} called {defaults['identifier']}, personalised with DreamBooth",
            "trigger_phrase": f"{called} {defaults['class_noun']}",
            "prediction_type": "v" if self.scheduler.get("prediction_type") == "v_prediction" else "epsilon",
        }

    @property
    def scheduler(self) -> dict[str, Any]:
        """Return what the pipeline says of its noise."""
        return read_json(self.folder / "scheduler/scheduler_config.json")

    @property
    def word(self) -> str:
        """Return what a new word is called where its file's name is the word."""
        identifier = self.params.subject(self.subject_id).identifier
        return "".join(one for one in identifier if one.isalnum() or one in "-_") or self.subject_id

    def spec(self, kind: str) -> dict[str, str]:
        """Return the header of a format."""
        return modelspec(kind, family_of(self.folder), self.subject_id, self.params, self.about)


def _write_single_file(work: _Work) -> None:
    """Write the pipeline of diffusers that stands in the export as one file in the original layout.

    A new word has a file of its own beside it: programs expect the vocabulary of the base in a single file.
    """
    folder = work.folder
    parts = {part: read_weights(folder / part) for part in SDXL.weighted if (folder / part).is_dir()}
    if (work.trained / EMBEDDINGS_FILE).is_file():
        parts |= {part: _cut_vocabulary(parts[part], work.base / part) for part in SDXL.encoders if part in parts}
        _write_embedding(work)
    weights = single_file(
        {part: cast_weights(of_part, work.dtype) for part, of_part in parts.items()},
        {part: _config(folder, part) for part in parts},
    )
    if family_of(folder) == "sdxl":
        weights |= prediction_marks(work.scheduler)
    write_weights(folder / f"single_file/{work.subject_id}.safetensors", weights, work.spec("single_file"))


def _cut_vocabulary(weights: Mapping[str, torch.Tensor], base: Path) -> dict[str, torch.Tensor]:
    """Return the weights of a text encoder with the rows of the base's words alone."""
    rows = _config(base.parent, base.name).get("vocab_size", 49408)  # that of CLIP, which a config may leave out
    return {
        name: tensor[:rows] if name.endswith("token_embedding.weight") else tensor for name, tensor in weights.items()
    }


def _write_lora(work: _Work) -> None:
    lora, adapter = read_lora(work.trained / LORA_FILE)
    weights = cast_weights(lora_formats.to_diffusers(lora), work.dtype)
    for part in {module.partition(".")[0] for module in lora}:  # the weights hold alpha: see `to_diffusers`
        adapter[f"{part}.lora_alpha"] = adapter[f"{part}.r"]
    header = work.spec("lora") | {METADATA: json.dumps(adapter, sort_keys=True)}
    write_weights(work.folder / "lora" / LORA_FILE, weights, header)


def _write_kohya(work: _Work) -> None:
    lora, _ = read_lora(work.trained / LORA_FILE)
    family, first = family_of(work.folder), next(iter(lora.values()))
    shape = UNetShape.of(_config(work.folder, "unet")) if family == "sdxl" else None
    weights = cast_weights(lora_formats.to_kohya(lora, shape), work.dtype)
    header = work.spec("kohya")
    counts = (work.photos, work.class_images)
    header |= kohya_header(family, first.rank, first.alpha, work.subject_id, work.params, *counts, work.about)
    write_weights(work.folder / f"kohya/{work.subject_id}.safetensors", weights, header)


def _write_embedding(work: _Work) -> None:
    learned = cast_weights(read_weights(work.trained / EMBEDDINGS_FILE), work.dtype)
    write_weights(work.folder / f"embedding/{work.word}.safetensors", a1111_embedding(learned), work.spec("embedding"))


_WRITERS = {
    "single_file": _write_single_file,
    "lora": _write_lora,
    "kohya": _write_kohya,
    "embedding": _write_embedding,
}


def _config(folder: Path, part: str) -> dict[str, Any]:
    return read_json(folder / part / "config.json")
