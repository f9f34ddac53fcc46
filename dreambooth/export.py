"""Put what a training made into the forms that other programs load, with a card that says what it is."""

import json
from pathlib import Path
from typing import Any

from dreambooth import prompts
from dreambooth.consent import Consent
from dreambooth.models import write_pipeline
from dreambooth.params import Params

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
) -> None:
    """Fill a folder with a pipeline of diffusers, its defaults of generation, and its card."""
    write_pipeline(base, trained, folder)
    defaults = generation_defaults(params, subject_id)
    (folder / GENERATION).write_text(json.dumps(defaults, indent=2) + "\n", encoding="utf-8")
    (folder / CARD).write_text(card(subject_id, params, base_hash, metrics, consent), encoding="utf-8")


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


def card(
    subject_id: str, params: Params, base_hash: str, metrics: dict[str, Any], consent: Consent | None = None
) -> str:
    """Write the model card in the hub's format: what it is, how to call it, what was measured, what was not."""
    defaults, identity, train = generation_defaults(params, subject_id), metrics["identity"], params.train
    base = params.base.pretrained_model_name_or_path
    return f"""---
base_model: {base}
library_name: diffusers
pipeline_tag: text-to-image
tags: [dreambooth, text-to-image]
---
# {subject_id}: a {defaults["class_noun"]} called {defaults["identifier"]}

A StableDiffusionPipeline, personalised with DreamBooth (Ruiz et al. 2022). Say `{defaults["instance_prompt"]}`.

```python
from diffusers import StableDiffusionPipeline
pipeline = StableDiffusionPipeline.from_pretrained("export/{subject_id}")
pipeline("{defaults["instance_prompt"]}", num_inference_steps={defaults["num_inference_steps"]},
         guidance_scale={defaults["guidance_scale"]}, height={defaults["resolution"]}, width={defaults["resolution"]})
```

| measured | value |
|---|---|
| identity (mean cosine with the photos) | {identity["personalised"]:.3f} |
| identity of the base model, same prompts and seeds | {identity["base"]:.3f} |
| difference, {metrics["confidence"]:.0%} interval over {metrics["prompts"]} prompts | \
{identity["gain"]:+.3f} [{identity["low"]:+.3f}, {identity["high"]:+.3f}] |
| photos against each other | {identity["ceiling"]:.3f} |
| encoder | {metrics["encoder"]["name"]} {metrics["encoder"]["revision"]} |
| safety | not checked; no safety checker is part of this pipeline |

Trained from `{base}` (sha256 {base_hash}) on {metrics["photos"]} photos, rate {train.learning_rate:g}, prior weight \
{train.prior_loss_weight:g}, {"with" if train.train_text_encoder else "without"} the text encoder, seed {train.seed}.
{_consent_line(consent)}"""


def _consent_line(consent: Consent | None) -> str:
    if consent is None:
        return ""
    return (
        f"\nConsent: given by {consent.who} on {consent.given}, for {consent.purpose}, until {consent.until}. "
        "Do not use this model for anything else, or after that day.\n"
    )
