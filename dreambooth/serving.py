"""Serve an export through MLflow: prompts in, PNG bytes out; over HTTP the bytes are base64 text.

MLflow stores this file beside the export and runs it to get the model ("models from code": nothing is pickled).
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature, set_model
from mlflow.protos.databricks_pb2 import PERMISSION_DENIED
from mlflow.pyfunc import PythonModel
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
from mlflow.types.schema import AnyType

from dreambooth import __version__
from dreambooth.consent import Consent, require_lasting
from dreambooth.errors import ConsentError
from dreambooth.folders import GENERATION, read_manifest
from dreambooth.images import png_bytes
from dreambooth.models import DTYPES, load_model
from dreambooth.params import GUIDANCE, SAMPLER_STEPS, SIDE, SIDE_UNIT, scheduler_fault
from dreambooth.pointer import resolve_whole
from dreambooth.sampling import SCHEDULERS, SamplerSettings, draw

ARTIFACT = "pipeline"
MAX_PICTURES = 64  # of one call
MAX_STEPS = 100 * MAX_PICTURES  # of the sampler in one call, counted at the model's own size
PARAM_TYPES = {
    "seed": DataType.long,
    "num_inference_steps": DataType.long,
    "guidance_scale": DataType.double,
    "scheduler": DataType.string,
    "resolution": DataType.long,
    "negative_prompt": DataType.string,
    "batch_size": DataType.long,
}
CALL = {"seed": 0, "batch_size": 1}  # what a call may say besides generation.json


def signature(folder: Path) -> ModelSignature:
    """Return what the model of an export takes and gives: every parameter has a default, that of the export."""
    defaults = _generation(folder) | CALL
    params = [ParamSpec(name, kind, kind.to_python()(defaults[name])) for name, kind in PARAM_TYPES.items()]
    return ModelSignature(
        inputs=Schema([ColSpec(AnyType(), "prompt"), ColSpec(AnyType(), "negative_prompt", required=False)]),
        outputs=Schema([ColSpec(DataType.binary)]),
        params=ParamSchema(params),
    )


class PictureModel(PythonModel):  # type: ignore[misc]  # mlflow has no types
    """Draw pictures with an export; the same prompt, seed and parameters give the same bytes on one machine."""

    def load_context(self, context: Any) -> None:
        """Load the export after every file of it was found whole."""
        folder, self._export_hash = resolve_whole(Path(context.artifacts[ARTIFACT]))
        self._defaults = _generation(folder)
        agreed = read_manifest(folder, verify=False).get("consent")  # just verified
        self._consent = Consent.model_validate(agreed) if agreed else None
        self._model = load_model(folder, DTYPES[self._defaults.get("inference_dtype", "float32")])

    @property
    def generation(self) -> Mapping[str, Any]:
        """What generation.json of the export says: whose it is, in which words, and how it is drawn by default."""
        return self._defaults

    def predict(self, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> list[bytes]:
        """Draw prompt i with seed + i, by default each picture alone, so that it does not depend on what else is asked.

        Args:
            model_input: rows with `prompt`, a sentence or a list of them, and maybe `negative_prompt`; a dictionary
                or a list of either does as well.
            params: seed, and what stands in generation.json: num_inference_steps, guidance_scale, scheduler,
                resolution, negative_prompt. batch_size: how many pictures at once; faster, and their last bits differ.

        Returns:
            A PNG for each prompt, which says itself how it was made (`images.read_provenance`).

        Raises:
            MlflowException: INVALID_PARAMETER_VALUE; PERMISSION_DENIED where the consent of a person has ended.
        """
        self._require_consent()
        wanted = self._defaults | CALL | {k: v for k, v in (params or {}).items() if v is not None}
        settings = _settings(wanted)
        fault = scheduler_fault(settings.scheduler, self._model.scheduler_config)
        _require(fault is None, str(fault))
        prompts = list(_prompts(model_input))
        _require(1 <= len(prompts) <= MAX_PICTURES, f"prompt: give 1 to {MAX_PICTURES} (got {len(prompts)})")
        self._require_work(len(prompts), settings)
        seeds = range(wanted["seed"], wanted["seed"] + len(prompts))
        _require(seeds.start >= 0 and seeds.stop <= 2**63, f"seed: should be in 0..2^63-1 (got {wanted['seed']})")
        asked = [
            (prompt, settings.negative_prompt if negative is None else negative, seed)
            for (prompt, negative), seed in zip(prompts, seeds, strict=True)
        ]
        pictures = []
        for negative, same in groupby(asked, key=lambda one: one[1]):
            group = list(same)
            own = replace(settings, negative_prompt=negative)
            drawn = draw(self._model, [prompt for prompt, _, _ in group], [seed for _, _, seed in group], own)
            pictures += [png_bytes(one, self._about(own, *how)) for one, how in zip(drawn, group, strict=True)]
        return pictures

    def _require_consent(self) -> None:
        """Refuse to draw a person whose consent has ended since the export was made."""
        if self._consent is not None:
            try:
                require_lasting(self._consent, self._defaults["subject"])
            except ConsentError as error:
                raise MlflowException(str(error), PERMISSION_DENIED) from None

    def _require_work(self, pictures: int, settings: SamplerSettings) -> None:
        """Refuse a call whose bounds are kept one by one and whose product is days of work."""
        own, steps, size = self._defaults["resolution"], settings.num_inference_steps, settings.resolution
        work = pictures * steps * (size / own) ** 2
        _require(
            work <= MAX_STEPS,
            f"prompt, num_inference_steps, resolution: {pictures} pictures of {steps} steps at {size} px are "
            f"{work:,.0f} steps at the {own} px of this model, and one call may ask for {MAX_STEPS:,}; lower the "
            "number of pictures (batch_size, where the command asks), the steps, or the size",
        )

    def _about(self, settings: SamplerSettings, prompt: str, negative_prompt: str, seed: int) -> dict[str, Any]:
        """Say how a picture is made, completely: with this the same one can be drawn again."""
        asked = {"prompt": prompt, "negative_prompt": negative_prompt, "seed": seed}
        subject = {"subject": self._defaults.get("subject"), "export_hash": self._export_hash}
        return asdict(settings) | asked | subject | {"dreambooth": __version__}


def _settings(wanted: Mapping[str, Any]) -> SamplerSettings:
    """Check what may come from anyone: a request must not occupy the server for days."""
    steps = _in_range(wanted, "num_inference_steps", *SAMPLER_STEPS)
    resolution = _in_range(wanted, "resolution", *SIDE)
    _require(resolution % SIDE_UNIT == 0, f"resolution: should be a multiple of {SIDE_UNIT} (got {resolution})")
    guidance = _in_range(wanted, "guidance_scale", *GUIDANCE)
    _require(
        wanted["scheduler"] in SCHEDULERS,
        f"scheduler: should be one of {', '.join(SCHEDULERS)} (got {wanted['scheduler']!r})",
    )
    batch_size = _in_range(wanted, "batch_size", 1, MAX_PICTURES)
    return SamplerSettings(wanted["scheduler"], steps, guidance, resolution, wanted["negative_prompt"], batch_size)


def _prompts(model_input: Any) -> Iterator[tuple[str, str | None]]:
    """Yield each prompt with its negative prompt, None where the row has none."""
    if isinstance(model_input, pd.DataFrame):
        model_input = model_input.to_dict("records")
    for row in [model_input] if isinstance(model_input, str | Mapping) else model_input:
        cells = row if isinstance(row, Mapping) else {"prompt": row}
        cell, negative = cells.get("prompt"), cells.get("negative_prompt")
        for prompt in cell if isinstance(cell, Sequence | np.ndarray) and not isinstance(cell, str) else [cell]:
            _require(isinstance(prompt, str), f"prompt: should be a sentence or a list of them (got {prompt!r})")
            yield str(prompt), negative if isinstance(negative, str) else None


def _generation(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / GENERATION).read_text(encoding="utf-8"))
    return content


def _in_range(wanted: Mapping[str, Any], name: str, least: int, most: int) -> Any:
    value = wanted[name]
    _require(least <= value <= most, f"{name}: should be {least} to {most} (got {value})")  # false for NaN
    return value


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise MlflowException.invalid_parameter_value(message)


if __name__ != "dreambooth.serving":  # run by MLflow under a name of its own
    set_model(PictureModel())
