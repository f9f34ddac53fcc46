"""Measure what the base model draws: is the noun right, is the background right.

The judge is not part of the model: features of EfficientNet-Lite0, made Gaussian classes with one covariance (linear
discriminant analysis) fitted on composed pictures, encoded and decoded by the autoencoder. Its own accuracy on such
pictures that it was not fitted on is reported beside the model's: no model can be expected above it.

N pictures, D features, K classes.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from base import compose, recipe, sprites
from base.autoencoder import to_tensor
from base.recipe import Recipe
from base.sprites import Sprites
from dreambooth.encoders import Lite0Encoder

Features = NDArray[np.float64]

FITTED, HELD_OUT = 1700, 300
"""Composed pictures that the judge is fitted on, and that measure it."""
JUDGE_SEED = 77
SEEDS = 2
STEPS, GUIDANCE = 25, 4.0
SHRINKAGE = 0.1
"""The share of the identity in the covariance: there are nearly as many features as pictures."""
FILE = "quality.json"


@dataclass(frozen=True)
class Judge:
    """Linear discriminant analysis: the class of the nearest mean under a shared covariance."""

    labels: list[str]
    weights: Features
    """(D, K)."""
    bias: Features
    """(K,)."""

    def __call__(self, features: Features) -> list[str]:
        """Name the class of each row of (N, D)."""
        return [self.labels[k] for k in (features @ self.weights + self.bias).argmax(1)]


def fit(features: Features, labels: Sequence[str]) -> Judge:
    """Fit the judge to (N, D) features and N labels; all classes are held equally likely."""
    names = sorted(set(labels))
    number = np.array([names.index(label) for label in labels])
    means = np.stack([features[number == k].mean(0) for k in range(len(names))])
    off = features - means[number]
    covariance = off.T @ off / len(off)
    size = len(covariance)
    covariance = (1 - SHRINKAGE) * covariance + SHRINKAGE * np.trace(covariance) / size * np.eye(size)
    weights = np.linalg.solve(covariance, means.T)
    return Judge(names, weights, -0.5 * (means.T * weights).sum(0))


def nearest_colour(image: Image.Image, colours: dict[str, tuple[int, int, int]]) -> str:
    """Name the colour that is nearest to the median of the four corners."""
    pixels = np.asarray(image, np.float64)
    edge = max(2, len(pixels) // 10)
    corners = np.concatenate(
        [
            pixels[y, x].reshape(-1, 3)
            for y in (slice(edge), slice(-edge, None))
            for x in (slice(edge), slice(-edge, None))
        ]
    )
    middle = np.median(corners, axis=0)
    return min(colours, key=lambda name: float(np.square(middle - colours[name]).sum()))


def prompts(values: Recipe) -> list[tuple[str, str, str]]:
    """List (prompt, noun, context): every noun once on a colour and once in a scene, the contexts in turn."""
    rows = []
    for contexts in (list(values.colours), list(values.scenes)):
        for number, noun in enumerate(values.nouns):
            context = contexts[number % len(contexts)]
            words = f"a photo of {compose.article(noun)} {compose.phrase(values, context)}"
            rows.append((words, noun, context))
    return rows


def draw(
    pipeline: StableDiffusionPipeline, words: Sequence[str], seeds: Sequence[int], guidance: float = GUIDANCE
) -> list[Image.Image]:
    """Draw one picture for each pair of a prompt and a seed."""
    made: list[Image.Image] = []
    for first in tqdm(range(0, len(words), 16), desc="draw", unit="batches", disable=len(words) < 32):
        batch = slice(first, first + 16)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[batch]]
        made += pipeline(
            list(words[batch]), generator=generators, num_inference_steps=STEPS, guidance_scale=guidance
        ).images
    return made


def open_model(folder: Path = recipe.MODEL) -> StableDiffusionPipeline:
    """Load the model with a fast solver."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def embed(images: Sequence[Image.Image]) -> Features:
    """Give the features of pictures: (N, D)."""
    encoder = Lite0Encoder()
    parts = [encoder.embed(images[k : k + 64]) for k in tqdm(range(0, len(images), 64), desc="judge", unit="batches")]
    return torch.cat(parts).double().numpy()


def share(found: Sequence[str], expected: Sequence[str]) -> float:
    """Give the share of equal pairs."""
    return float(np.mean([a == b for a, b in zip(found, expected, strict=True)]))


def composed_features(images: Sequence[Image.Image], folder: Path) -> Features:
    """Give the features of composed pictures, from the file of an earlier call with the same pictures."""
    digest = hashlib.sha256(b"".join(image.tobytes() for image in images)).hexdigest()[:12]
    path = folder / f"features-{digest}.npy"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        np.save(path, embed(images))
    features: Features = np.load(path)
    return features


@torch.inference_mode()
def as_decoded(vae: AutoencoderKL, images: Sequence[Image.Image], batch_size: int = 32) -> list[Image.Image]:
    """Encode and decode pictures: no picture of the model can be sharper, and the judge should know the difference."""
    made: list[Image.Image] = []
    for first in range(0, len(images), batch_size):
        pixels = np.stack([np.asarray(image) for image in images[first : first + batch_size]])
        decoded = vae.decode(vae.encode(to_tensor(pixels)).latent_dist.mean).sample
        rows = ((decoded.clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 1).byte().numpy()
        made += [Image.fromarray(row) for row in rows]
    return made


def judges(values: Recipe, drawn: Sprites, vae: AutoencoderKL) -> tuple[Judge, Judge, dict[str, float]]:
    """Fit the judges of nouns and of scenes on decoded composed pictures, and measure both on fresh ones."""
    plans = [compose.plan(values, drawn, JUDGE_SEED, i) for i in range(FITTED + HELD_OUT)]
    images = [Image.fromarray(compose.paint(drawn, plan, values.resolution)) for plan in plans]
    features = composed_features(as_decoded(vae, images), recipe.SCRATCH / "judge")
    fitted = slice(FITTED)
    nouns = [plan.noun for plan in plans]
    noun_judge = fit(features[fitted], nouns[fitted])
    scenes = np.array([i for i, plan in enumerate(plans) if plan.context in values.scenes])
    contexts = [plans[i].context for i in scenes]
    known = int((scenes < FITTED).sum())
    scene_judge = fit(features[scenes[:known]], contexts[:known])
    ceiling = {
        "noun": share(noun_judge(features[FITTED:]), nouns[FITTED:]),
        "scene": share(scene_judge(features[scenes[known:]]), contexts[known:]),
    }
    return noun_judge, scene_judge, ceiling


def measure(values: Recipe, drawn: Sprites, pipeline: StableDiffusionPipeline) -> dict[str, object]:
    """Draw every prompt with every seed and count what is right."""
    noun_judge, scene_judge, ceiling = judges(values, drawn, pipeline.vae)
    rows = [(*row, seed) for row in prompts(values) for seed in range(SEEDS)]
    images = draw(pipeline, [row[0] for row in rows], [row[3] for row in rows])
    features = embed(images)
    nouns = noun_judge(features)
    by_noun = {
        noun: share([n for n, r in zip(nouns, rows, strict=True) if r[1] == noun], [noun] * (2 * SEEDS))
        for noun in values.nouns
    }
    plain = [k for k, row in enumerate(rows) if row[2] in values.colours]
    scenes = [k for k, row in enumerate(rows) if row[2] in values.scenes]
    return {
        "pictures": len(rows),
        "nouns": len(values.nouns),
        "noun_right": share(nouns, [row[1] for row in rows]),
        "noun_right_composed": ceiling["noun"],
        "colour_right": share([nearest_colour(images[k], values.colours) for k in plain], [rows[k][2] for k in plain]),
        "scene_right": share(scene_judge(features[scenes]), [rows[k][2] for k in scenes]),
        "scene_right_composed": ceiling["scene"],
        "by_noun": by_noun,
        "steps": STEPS,
        "guidance_scale": GUIDANCE,
    }


def main() -> None:
    """Measure the model and write the numbers beside it."""
    result = measure(recipe.load(), sprites.load(recipe.SCRATCH / "sprites"), open_model())
    (recipe.MODEL / FILE).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
