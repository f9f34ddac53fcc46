"""Score models at the same prompts and seeds against the real photos, and compare one with another.

P prompts, S seeds of a prompt, M class images, N real photos, D and E embedding widths.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from dreambooth import fidelity, prompts, rng
from dreambooth.encoders import FeatureReader, ImageEncoder, ImageTextEncoder, lite0_pooled
from dreambooth.errors import EvaluationError
from dreambooth.fidelity import Interval
from dreambooth.images import both_hashes, hash_distance, perceptual_hash
from dreambooth.intervals import over_prompts
from dreambooth.params import MIN_PROMPTS

MIN_COUNTED = 2  # an interval needs a spread
PHOTO_SIDE = 1024
NOT_CHECKED = "not checked"
PROPERTY = "property"  # kind of the prompts that should change the subject ("a red ..."): they stay out of the identity
BASE = "base"  # name of the untouched model in what an evaluation writes
SECOND_OPINION = "identity, second opinion (decides nothing)"
COST = ".cost.json"  # hidden: no part of the content, which is the same whenever it is made
# What can change a score; their hash is the version of the evaluator (tests/test_pipeline.py compares with imports).
MODULES = (
    "adapters", "comparison", "drawings", "encoders", "evaluation", "families", "fidelity", "hub_encoders", "images",
    "lora", "models", "prompts", "rng", "sampling", "scorer", "vocabulary",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One prompt and seed, in the words of the base model: a personalised one has its own word for the subject."""

    kind: str
    template: str
    base_prompt: str
    seed: int
    """As in params.yaml: tells the pictures of one prompt apart."""
    noise_seed: int
    """Of the first latent: another one for each prompt and seed, else all prompts would share their luck."""


@dataclass(frozen=True)
class Encoders:
    """What looks at the pictures."""

    image: ImageEncoder
    text: ImageTextEncoder | None
    """None where no image-text encoder is installed: the prompt fidelity is missing then."""

    def describe(self) -> dict[str, Any]:
        """Return name, revision and transform of each, which stand beside every number."""
        used = {"encoder": self.image, "scorer": self.text}
        return {
            role: {"name": one.name, "revision": one.revision, "transform": one.transform}
            for role, one in used.items()
            if one is not None
        }


@dataclass(frozen=True)
class Reference:
    """The photos of a subject as the training saw them, and what pictures are compared with."""

    embeddings: torch.Tensor
    """(N, D)."""
    mirrored: torch.Tensor
    """(N, D), of the mirror images."""
    hashes: NDArray[np.bool_]
    """(N, 2, 63), perceptual hashes of photo and mirror image."""
    copy_cosine: float
    """Above it a picture is a copy."""
    second: torch.Tensor | None = None
    """(N, E), by an image-text encoder that can tell subjects too: CLIP gives the identity a second opinion."""


@dataclass(frozen=True)
class Scores:
    """What was measured of one model."""

    cases: pd.DataFrame
    """A row a case: kind, prompt (of the base), seed, noise_seed, identity, prompt_fidelity (NaN where it is missing),
    identity_second (where there is one), nearest_photo, nearest_cosine, nearest_distance, copy."""
    prompts: pd.DataFrame
    """A row a prompt: the means over seeds, and diversity (NaN at one seed)."""
    pres: list[float]
    """Mean cosine with the photos of each class image, in the order of their seeds."""
    class_embeddings: torch.Tensor
    """(M, D), of the class images."""


class Measured(Protocol):
    """What a comparison needs of a model's scores."""

    @property
    def prompts(self) -> pd.DataFrame:
        """A row a prompt: kind, prompt, identity, identity_second (where there is one), prompt_fidelity, diversity."""
        ...

    @property
    def pres(self) -> list[float]:
        """Of each class image, in the order of their seeds."""
        ...


def cases(templates: Sequence[prompts.Template], class_noun: str, seeds: Sequence[int]) -> list[Case]:
    """Cross the prompts with the seeds, seeds of one prompt beside each other.

    Raises:
        EvaluationError: fewer than two prompts count for the identity.
    """
    count = sum(kind != PROPERTY for kind, _ in templates)
    if count < MIN_COUNTED:
        raise EvaluationError(f"{count} prompts count for the identity, an interval needs {MIN_COUNTED}; add prompts")
    noun = prompts.with_article(class_noun)
    return [
        Case(
            kind,
            template,
            prompts.fill(template, noun),
            seed,
            rng.derive_seed(seed, "evaluation", number),
        )
        for number, (kind, template) in enumerate(templates)
        for seed in seeds
    ]


def class_seeds(count: int, seed: int) -> list[int]:
    """Return the noise seeds of the class images; those of the training's class images are others."""
    return [rng.derive_seed(seed, "evaluation-class", number) for number in range(count)]


def reference(photos: Sequence[Image.Image], encoders: Encoders) -> Reference:
    """Look at the photos once.

    Args:
        photos: N squares, N >= 2: what the training sees of each.
        encoders: for all of them.
    """
    encoder, text = encoders.image, encoders.text
    rows = encoder.embed([*photos, *map(ImageOps.mirror, photos)])
    embeddings, mirrored = rows[: len(photos)], rows[len(photos) :]
    threshold = fidelity.copy_cosine(embeddings, encoder.copy_cosine)
    second = text.embed(photos) if isinstance(text, ImageEncoder) else None
    return Reference(embeddings, mirrored, np.stack([both_hashes(photo) for photo in photos]), threshold, second)


def look(pictures: Sequence[Image.Image], encoders: Encoders) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Embed pictures for the identity (N, D) and for the prompts (N, E); in one pass if the two share a network."""
    if isinstance(encoders.image, FeatureReader) and isinstance(encoders.text, FeatureReader):
        features = lite0_pooled(pictures)
        return encoders.image.embed_features(features), encoders.text.embed_features(features)
    return encoders.image.embed(pictures), encoders.text.embed_images(pictures) if encoders.text else None


def score(
    todo: Sequence[Case],
    pictures: Sequence[Image.Image],
    class_pictures: Sequence[Image.Image],
    photos: Reference,
    encoders: Encoders,
    texts: torch.Tensor | None,
) -> Scores:
    """Score the pictures of one model, each embedded once.

    Args:
        todo: P x S cases, seeds of one prompt beside each other.
        pictures: one a case.
        class_pictures: M images of the class prompt.
        photos: of the subject.
        encoders: for all of them.
        texts: (P, E), embeddings of the base's prompts; None where they cannot be scored.
    """
    rows, text_rows = look([*pictures, *class_pictures], encoders)
    prompt_count = len(dict.fromkeys(case.template for case in todo))
    seeds = len(todo) // prompt_count
    generated = rows[: len(todo)].view(prompt_count, seeds, -1)
    faithful = torch.full(generated.shape[:2], torch.nan)
    if texts is not None and text_rows is not None:
        faithful = fidelity.prompt_fidelity(text_rows[: len(todo)].view(prompt_count, seeds, -1), texts)
    table = pd.DataFrame(
        {
            "kind": [case.kind for case in todo],
            "prompt": [case.base_prompt for case in todo],
            "seed": [case.seed for case in todo],
            "noise_seed": [case.noise_seed for case in todo],
            "identity": fidelity.identity(generated, photos.embeddings).flatten().tolist(),
            "prompt_fidelity": faithful.flatten().tolist(),
        }
    )
    if photos.second is not None and text_rows is not None:
        table["identity_second"] = fidelity.identity(text_rows[None, : len(todo)], photos.second)[0].tolist()
    table = table.join(nearest_photos(pictures, rows[: len(todo)], photos))
    varied = fidelity.diversity(generated) if seeds > 1 else torch.full((prompt_count,), torch.nan)
    class_rows = rows[len(todo) :]
    pres = fidelity.identity(class_rows[None], photos.embeddings)[0].tolist() if len(class_rows) else []
    return Scores(table, by_prompt(table).assign(diversity=varied.tolist()), pres, class_rows)


def by_prompt(table: pd.DataFrame) -> pd.DataFrame:
    """Average a table of cases over the seeds of each prompt, in their order."""
    averaged = [name for name in ("identity", "identity_second", "prompt_fidelity") if name in table]
    means = table.groupby(["kind", "prompt"], sort=False)[averaged].mean()
    worst = table.groupby(["kind", "prompt"], sort=False).agg({"nearest_cosine": "max", "copy": "sum"})
    return means.join(worst).rename(columns={"copy": "copies"}).reset_index()


def counted(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of a table of prompts that count for the identity: all but those of a property."""
    return table[table["kind"] != PROPERTY]


def mean_counted(table: pd.DataFrame, column: str = "identity") -> float:
    """Average a column over the prompts that count."""
    return float(counted(table)[column].mean())


def has_second_opinion(model: Measured) -> bool:
    """Whether an image-text encoder has scored the identity too: it is shown beside the first, and decides nothing."""
    return "identity_second" in model.prompts


def compare(model: Measured, other: Measured, confidence: float) -> dict[str, Any]:
    """Bound the differences of two models over the prompts that they share: model - other, at the same seeds.

    What is missing in one of them is missing here.

    Returns:
        By measure (identity, identity_second, prompt, diversity): mean, low, high, n and sd of the t interval over
        prompts; pres_rise: the same over class images.

    Raises:
        EvaluationError: the identity cannot be measured.
    """
    if not model.prompts[["kind", "prompt"]].equals(other.prompts[["kind", "prompt"]]):
        raise EvaluationError("the two models were given other prompts; evaluate both again: dreambooth run")
    differences = {
        "identity": counted(model.prompts)["identity"] - counted(other.prompts)["identity"],
        "prompt": model.prompts["prompt_fidelity"] - other.prompts["prompt_fidelity"],
        "diversity": model.prompts["diversity"] - other.prompts["diversity"],
    }
    if has_second_opinion(model) and has_second_opinion(other):
        seconds = [counted(one.prompts)["identity_second"] for one in (model, other)]
        differences["identity_second"] = seconds[0] - seconds[1]
    found = {name: _interval(values.to_numpy(), confidence) for name, values in differences.items()}
    if "identity" not in (found := {name: interval for name, interval in found.items() if interval}):
        gains = differences["identity"]
        raise EvaluationError(
            f"the identity cannot be measured: {np.isfinite(gains).sum()} of {len(gains)} prompts "
            "have a finite difference; look at the pictures in build/<id>/evaluation"
        )
    if len(model.pres) == len(other.pres) >= MIN_COUNTED:
        rise = _interval(np.subtract(model.pres, other.pres), confidence)
        found |= {"pres_rise": rise} if rise else {}
    return found


def summarise(base: Scores, personalised: Scores, photos: Reference, confidence: float) -> dict[str, Any]:
    """Reduce the scores of base and personalised model to the numbers of metrics/<id>.json.

    Raises:
        EvaluationError: the identity cannot be measured.
    """
    differences = compare(personalised, base, confidence)
    floor, identity = (mean_counted(one.prompts) for one in (base, personalised))
    ceiling = fidelity.ceiling(photos.embeddings)
    metrics: dict[str, Any] = {
        "identity": {"base": floor, "personalised": identity}
        | _gain(differences["identity"])
        | {
            "ceiling": ceiling,
            "calibrated": fidelity.calibrated(identity, floor, ceiling) if ceiling > floor else None,
            "by_kind": _by_kind(base, personalised, "identity"),
        },
    }
    if photos.second is not None and "identity_second" in differences:
        second, ours = (mean_counted(one.prompts, "identity_second") for one in (base, personalised))
        values = {"base": second, "personalised": ours, "ceiling": fidelity.ceiling(photos.second)}
        metrics["identity_second"] = values | _gain(differences["identity_second"])
    for measure, column in (("prompt", "prompt_fidelity"), ("diversity", "diversity")):
        if measure in differences:
            values = {
                "base": float(base.prompts[column].mean()),
                "personalised": float(personalised.prompts[column].mean()),
            }
            metrics[measure] = values | _gain(differences[measure])
    if "prompt" in metrics:
        metrics["prompt"]["by_kind"] = _by_kind(base, personalised, "prompt_fidelity")
    metrics["copying"] = {
        "rate": float(personalised.cases["copy"].mean()),
        "rate_base": float(base.cases["copy"].mean()),
        "nearest_cosine_max": float(personalised.cases["nearest_cosine"].max()),
        "threshold": photos.copy_cosine,
    }
    if "pres_rise" in differences:
        rise, values = (
            differences["pres_rise"],
            {"base": float(np.mean(base.pres)), "personalised": float(np.mean(personalised.pres))},
        )
        metrics["prior"] = values | {
            "rise": rise["mean"],
            "low": rise["low"],
            "high": rise["high"],
            "images": rise["n"],
        }
        metrics["prior"] |= fidelity.discrepancy(base.class_embeddings, personalised.class_embeddings)._asdict()
    return metrics | {
        "safety": NOT_CHECKED,
        "prompts": differences["identity"]["n"],
        "seeds": int(personalised.cases["seed"].nunique()),
        "photos": len(photos.embeddings),
        "confidence": confidence,
    }


def score_checkpoints(
    previews: Mapping[int, Sequence[Image.Image]],
    photos: Reference,
    encoders: Encoders,
    texts: torch.Tensor | None,
    confidence: float,
) -> pd.DataFrame:
    """Score the previews of a training: cheap, for "which step?", and no part of the evaluation set.

    Args:
        previews: by step, one picture for each of P prompts, always with the same noise.
        photos: of the subject.
        encoders: for all of them.
        texts: (P, E), embeddings of the prompts without the identifier; None where they cannot be scored.
        confidence: of the intervals over prompts.

    Returns:
        A row a step: step, prompts (P), identity, identity_error, prompt, prompt_error. The errors are half widths of
        the interval of the difference from the last step at the same prompts and noise: the spread of the prompts
        themselves would hide every difference. NaN at one prompt, and for a prompt fidelity that is missing.
    """
    steps = sorted(previews)
    rows, text_rows = look([image for step in steps for image in previews[step]], encoders)
    identity = fidelity.identity(rows.view(len(steps), -1, rows.shape[1]), photos.embeddings)
    faithful = torch.full(identity.shape, torch.nan)
    if texts is not None and text_rows is not None:
        by_step = text_rows.view(len(steps), -1, text_rows.shape[1])
        faithful = fidelity.prompt_fidelity(by_step.transpose(0, 1), texts).T
    table = pd.DataFrame({"step": steps, "prompts": identity.shape[1]})
    for name, values in (("identity", identity.double().numpy()), ("prompt", faithful.double().numpy())):
        intervals = [_interval(one - values[-1], confidence) for one in values]
        table[name] = values.mean(axis=1)
        table[f"{name}_error"] = [(one["high"] - one["low"]) / 2 if one else math.nan for one in intervals]
    return table


def choose_step(points: pd.DataFrame, drop: float) -> int | None:
    """Return the step with the most identity among those within `drop` of the best prompt fidelity.

    Args:
        points: of `score_checkpoints`.
        drop: of the prompt fidelity that identity is worth.

    Returns:
        The first of equals; None where the prompt fidelity is missing.
    """
    if points.empty or points["prompt"].isna().any():
        return None
    allowed = points[points["prompt"] >= points["prompt"].max() - drop]
    return int(allowed["step"][allowed["identity"].idxmax()])


def headline(metrics: dict[str, Any]) -> str:
    """Say in one line what the interval of the identity says, and no more."""
    identity, prompts_counted = metrics["identity"], metrics["prompts"]
    numbers = f"{over_prompts(identity, prompts_counted)} over {prompts_counted} prompts"
    if prompts_counted < MIN_PROMPTS:
        return f"identity {numbers}: too few prompts to tell, under {MIN_PROMPTS} an interval says little"
    if identity["low"] > 0:
        return f"identity {numbers}: nearer to the subject than the base model"
    if identity["high"] < 0:
        return f"identity {numbers}: farther from the subject than the base model"
    return f"identity {numbers}: not told apart from the base model"


def flat_remark(counts: Mapping[str, int]) -> str:
    """Say which models have drawn pictures that show nothing, and what to do; empty if none has.

    An overflow of float16 decodes to black. Scored like any other picture it makes a good model look bad, and the base
    worse than it is.

    Args:
        counts: of flat pictures, by what the model is called.
    """
    told = ", ".join(f"{name} {count}" for name, count in counts.items() if count)
    if not told:
        return ""
    return (
        f"pictures that show nothing, black or of one colour: {told}; their scores mean nothing; set "
        "base.inference_dtype to float32, or look whether the model draws anything, and evaluate again: dreambooth run"
    )


def as_photo(photo: Image.Image) -> Image.Image:
    """Return the middle square of a photo, at most PHOTO_SIDE pixels a side: more is not looked at."""
    side = min(*photo.size, PHOTO_SIDE)
    return ImageOps.fit(photo, (side, side), method=Image.Resampling.LANCZOS)


def nearest_photos(pictures: Sequence[Image.Image], rows: torch.Tensor, photos: Reference) -> pd.DataFrame:
    """Find the photo, or the mirror image of one, that each picture is nearest to; tell whether it is a copy.

    Args:
        pictures: M of them.
        rows: (M, D), their embeddings.
        photos: of the subject.

    Returns:
        A row a picture: nearest_photo (by hash where the hash alone says copy, else by cosine), nearest_cosine,
        nearest_distance (bits), copy.
    """
    cosines = torch.maximum(fidelity.cosine(rows, photos.embeddings), fidelity.cosine(rows, photos.mirrored))
    best = cosines.max(dim=-1)
    distances = np.array(
        [[hash_distance(both, one) for both in photos.hashes] for one in map(perceptual_hash, pictures)]
    )
    by_hash = (distances.min(axis=1) <= fidelity.COPY_DISTANCE) & (best.values.numpy() <= photos.copy_cosine)
    return pd.DataFrame(
        {
            "nearest_photo": np.where(by_hash, distances.argmin(axis=1), best.indices.numpy()),
            "nearest_cosine": best.values.tolist(),
            "nearest_distance": distances.min(axis=1).tolist(),
            "copy": fidelity.copies(best.values, distances.min(axis=1), photos.copy_cosine).tolist(),
        }
    )


def _interval(differences: NDArray[np.float64], confidence: float) -> dict[str, Any] | None:
    """Bound paired differences, or None where one is missing."""
    if len(differences) < MIN_COUNTED or not np.isfinite(differences).all():
        return None
    interval: Interval = fidelity.paired_interval(torch.tensor(differences), confidence)
    return interval._asdict() | {"sd": float(differences.std(ddof=1))}


def _gain(interval: dict[str, Any]) -> dict[str, Any]:
    bounds = {name: interval[name] for name in ("low", "high", "sd")}
    return {"gain": interval["mean"], **bounds, "prompts": interval["n"]}


def _by_kind(base: Scores, personalised: Scores, column: str) -> dict[str, dict[str, float]]:
    return {
        str(kind): {
            "base": float(base.prompts[column][rows.index].mean()),
            "personalised": float(rows[column].mean()),
            "prompts": len(rows),
        }
        for kind, rows in personalised.prompts.groupby("kind", sort=False)
    }
