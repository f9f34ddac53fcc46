"""Compare the personalised model with the untouched one: the same prompts and seeds, scored against the real photos.

P prompts, S seeds of a prompt, N real photos, D embedding width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from PIL import Image

from dreambooth import fidelity, prompts, rng
from dreambooth.encoders import ImageEncoder
from dreambooth.errors import EvaluationError
from dreambooth.grid import grid
from dreambooth.models import Model
from dreambooth.sampling import SamplerSettings, draw

MIN_COUNTED = 2  # an interval needs a spread
MIN_PROMPTS = 6  # under this an interval over prompts says little, and no model is promoted on it
GRID_TILE = 128  # pixels
PHOTO_SIDE = 1024


@dataclass(frozen=True)
class Case:
    """One prompt and seed, in the words of the base model and of the personalised one."""

    kind: str
    template: str
    base_prompt: str
    personalised_prompt: str
    seed: int
    """As in params.yaml: tells the pictures of one prompt apart."""
    noise_seed: int
    """Of the first latent: another one for each prompt and seed, else all prompts would share their luck."""


def cases(templates: Sequence[prompts.Template], identifier: str, class_noun: str, seeds: Sequence[int]) -> list[Case]:
    """Cross the prompts with the seeds, seeds of one prompt beside each other.

    Raises:
        EvaluationError: fewer than two prompts count for the identity.
    """
    counted = sum(kind != "property" for kind, _ in templates)
    if counted < MIN_COUNTED:
        raise EvaluationError(f"{counted} prompts count for the identity, an interval needs {MIN_COUNTED}; add prompts")
    subject, noun = f"{identifier} {class_noun}", prompts.with_article(class_noun)
    return [
        Case(
            kind,
            template,
            prompts.fill(template, noun),
            prompts.fill(template, subject),
            seed,
            rng.derive_seed(seed, "evaluation", number),
        )
        for number, (kind, template) in enumerate(templates)
        for seed in seeds
    ]


def draw_cases(
    model: Model, texts: Sequence[str], todo: Sequence[Case], settings: SamplerSettings, name: str
) -> list[Image.Image]:
    """Draw one picture a case."""
    return draw(model, texts, [case.noise_seed for case in todo], settings, description=f"evaluation images, {name}")


def score(
    todo: Sequence[Case],
    base: Sequence[Image.Image],
    personalised: Sequence[Image.Image],
    photos: Sequence[Image.Image],
    encoder: ImageEncoder,
) -> pd.DataFrame:
    """Score every case.

    Args:
        todo: P x S cases, seeds of one prompt beside each other.
        base: pictures of the untouched model, one a case.
        personalised: pictures of the personalised model, one a case.
        photos: N real photos.
        encoder: for all of them.

    Returns:
        One row a case: kind, prompt, seed, identity of base and personalised (mean cosine with the photos), and the
        nearest photo of the personalised picture with its cosine.
    """
    real = encoder.embed(photos)
    floor = fidelity.identity(encoder.embed(base), real)
    embeddings = encoder.embed(personalised)
    identity, near = fidelity.identity(embeddings, real), fidelity.nearest(embeddings, real)
    return pd.DataFrame(
        {
            "kind": [case.kind for case in todo],
            "prompt": [case.personalised_prompt for case in todo],
            "seed": [case.seed for case in todo],
            "noise_seed": [case.noise_seed for case in todo],
            "identity_base": floor.tolist(),
            "identity": identity.tolist(),
            "nearest_photo": near.photo.tolist(),
            "nearest_cosine": near.cosine.tolist(),
        }
    )


def summarise(
    scores: pd.DataFrame, photos: Sequence[Image.Image], encoder: ImageEncoder, confidence: float
) -> dict[str, Any]:
    """Average the scores over seeds, then over prompts.

    Property prompts ("a red ...") should change the subject, so they stay out of the identity.

    Raises:
        EvaluationError: a number is missing.
    """
    counted = scores[scores["kind"] != "property"]
    by_prompt = counted.groupby("prompt", sort=False)[["identity_base", "identity"]].mean()
    gain = torch.tensor((by_prompt["identity"] - by_prompt["identity_base"]).to_numpy())
    try:
        interval = fidelity.paired_interval(gain, confidence)
        ceiling = fidelity.ceiling(encoder.embed(photos))
    except ValueError as error:
        raise EvaluationError(f"the identity cannot be measured: {error}") from error
    floor, identity = float(by_prompt["identity_base"].mean()), float(by_prompt["identity"].mean())
    return {
        "identity": {
            "base": floor,
            "personalised": identity,
            "gain": interval.mean,
            "low": interval.low,
            "high": interval.high,
            "ceiling": ceiling,
            "calibrated": fidelity.calibrated(identity, floor, ceiling) if ceiling > floor else None,
        },
        "nearest_cosine_max": float(scores["nearest_cosine"].max()),
        "prompts": len(by_prompt),
        "seeds": int(scores["seed"].nunique()),
        "photos": len(photos),
        "confidence": confidence,
        "encoder": {"name": encoder.name, "revision": encoder.revision, "transform": encoder.transform},
    }


def verdict(metrics: dict[str, Any]) -> str:
    """Say in one line what the interval says, and no more."""
    identity, prompts_counted = metrics["identity"], metrics["prompts"]
    numbers = (
        f"{identity['gain']:+.3f} [{identity['low']:+.3f}, {identity['high']:+.3f}] over {prompts_counted} prompts"
    )
    if prompts_counted < MIN_PROMPTS:
        return f"identity {numbers}: too few prompts to tell, at least {MIN_PROMPTS} are needed"
    if identity["low"] > 0:
        return f"identity {numbers}: nearer to the subject than the base model"
    if identity["high"] < 0:
        return f"identity {numbers}: farther from the subject than the base model"
    return f"identity {numbers}: not told apart from the base model"


def comparison_grid(
    todo: Sequence[Case],
    base: Sequence[Image.Image],
    personalised: Sequence[Image.Image],
    photos: Sequence[Image.Image],
    scores: pd.DataFrame,
) -> Image.Image:
    """Lay out the photos, then a row a prompt: base | personalised at the same seed, the score under each."""
    seeds = list(dict.fromkeys(case.seed for case in todo))
    columns = [f"{name}, seed {seed}" for seed in seeds for name in ("base", "personalised")]
    strip: list[Image.Image | None] = [*photos[: len(columns)]]
    blank = Image.new("RGB", (GRID_TILE, GRID_TILE), "white")
    rows, labels = [strip + [blank] * (len(columns) - len(strip))], ["photos of the subject"]
    captions = [[""] * len(columns)]
    for first in range(0, len(todo), len(seeds)):
        case_numbers = range(first, first + len(seeds))
        rows.append([image for i in case_numbers for image in (base[i], personalised[i])])
        captions.append([f"{scores[column][i]:.3f}" for i in case_numbers for column in ("identity_base", "identity")])
        labels.append(todo[first].personalised_prompt)
    return grid(rows, labels, columns, captions, tile=GRID_TILE)


def shrink(photo: Image.Image) -> Image.Image:
    """Return a photo of at most PHOTO_SIDE pixels a side: more is not looked at, and hundreds have to fit."""
    photo.thumbnail((PHOTO_SIDE, PHOTO_SIDE), Image.Resampling.LANCZOS)
    return photo
