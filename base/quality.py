"""Measure what the base model draws: is the noun right, is the background colour right, is the scene right.

Two judges look at each picture: the scorer of the evaluation (Lite0 features) and a CNN of its own (base/judge.py).
Beside the model stand a pipeline with random weights, as published for tests, and composed pictures that went through
the model's autoencoder: no picture of the model can be expected to be better.
N pictures, K candidates.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from base import compose, judge, recipe, sprites
from base.autoencoder import as_decoded
from base.recipe import Recipe
from base.sprites import Sprites
from dreambooth.scorer import BundledScorer

STEPS, GUIDANCE = 25, 7.5
FILE = "quality.json"
BARS = {"noun": 0.8, "colour": 0.8, "scene": 0.7}
"""What the base model has to reach."""


class Asked(NamedTuple):
    """One prompt, what has to be on its picture, and among which nouns the right one has to win."""

    prompt: str
    noun: str
    context: str
    candidates: tuple[str, ...]
    """The right noun and others, drawn at random."""

    def with_noun(self, values: Recipe, noun: str) -> str:
        """Give the prompt with another noun."""
        return words(values, noun, self.context)

    def with_context(self, values: Recipe, context: str) -> str:
        """Give the prompt with another background."""
        return words(values, self.noun, context)


def words(values: Recipe, noun: str, context: str) -> str:
    """Ask for a noun in a context: "a photo of a dog in space"."""
    return f"a photo of {compose.article(noun)} {compose.phrase(values, context)}"


def prompts(values: Recipe) -> list[Asked]:
    """Choose the prompts: so many on colours, then as many in scenes.

    The nouns come from one shuffled list of all, so each is equally likely and none comes twice before all have been;
    the contexts come from shuffled lists in turn.
    """
    section = values.quality
    rng = np.random.default_rng(section.seed)
    nouns = [str(noun) for noun in rng.permutation(list(values.nouns))]
    asked: list[Asked] = []
    for contexts in (list(values.colours), list(values.scenes)):
        shuffled = [str(context) for context in rng.permutation(contexts)]
        for number in range(section.prompts):
            noun, context = nouns[len(asked) % len(nouns)], shuffled[number % len(shuffled)]
            others = [other for other in values.nouns if other != noun]
            drawn = rng.choice(others, min(section.candidates - 1, len(others)), replace=False)
            asked.append(Asked(words(values, noun, context), noun, context, (noun, *map(str, drawn))))
    return asked


# --- pictures


def draw(
    pipeline: StableDiffusionPipeline, texts: Sequence[str], seeds: Sequence[int], guidance: float = GUIDANCE
) -> list[Image.Image]:
    """Draw one picture for each pair of a prompt and a seed."""
    made: list[Image.Image] = []
    for first in tqdm(range(0, len(texts), 16), desc="draw", unit="batches", disable=len(texts) < 32):
        batch = slice(first, first + 16)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[batch]]
        made += pipeline(
            list(texts[batch]), generator=generators, num_inference_steps=STEPS, guidance_scale=guidance
        ).images
    return made


def open_model(folder: Path = recipe.MODEL) -> StableDiffusionPipeline:
    """Load the model with a fast solver."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    return with_solver(pipeline)


def with_solver(pipeline: StableDiffusionPipeline) -> StableDiffusionPipeline:
    """Put a solver of few steps in the place of the scheduler, and no bars."""
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def random_pipeline(model: StableDiffusionPipeline, resolution: int, seed: int) -> StableDiffusionPipeline:
    """Make a pipeline of the same classes with random weights, of the size that is published for tests."""
    torch.manual_seed(seed)
    tokenizer: CLIPTokenizer = model.tokenizer
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vae = AutoencoderKL(
        block_out_channels=[32, 64],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=4,
        sample_size=resolution,
    )
    unet = UNet2DConditionModel(
        sample_size=resolution // 2,
        block_out_channels=[32, 64],
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"],
        cross_attention_dim=32,
        attention_head_dim=8,
        layers_per_block=1,
    )
    parts = {name: None for name in ("safety_checker", "feature_extractor")}
    pipeline = StableDiffusionPipeline(
        vae=vae.eval(),
        unet=unet.eval(),
        text_encoder=CLIPTextModel(text).eval(),
        tokenizer=tokenizer,
        scheduler=model.scheduler,
        requires_safety_checker=False,
        **parts,
    )
    return with_solver(pipeline)


def composed(values: Recipe, drawn: Sprites, asked: Sequence[Asked], seeds: Sequence[int]) -> list[Image.Image]:
    """Compose a picture for each pair of a prompt and a seed, as those that the model learned from."""
    made = []
    for number, (row, seed) in enumerate(zip(asked, seeds, strict=True)):
        rng = np.random.default_rng([values.quality.seed, number, seed])
        placed = compose.place(int(rng.choice(drawn.rows("noun", row.noun))), rng)
        plan = compose.Plan(
            compose.background(values, drawn, row.context, rng), (placed,), row.noun, row.context, row.prompt
        )
        made.append(Image.fromarray(compose.paint(drawn, plan, values.resolution)))
    return made


# --- the two judges


class Verdict(NamedTuple):
    """What one judge says of N pictures: True where the right answer wins; only the pictures that were asked."""

    noun: list[bool]
    colour: list[bool]
    scene: list[bool]


Answer = Callable[[int, str, Sequence[str]], NDArray[np.float64]]
"""The score of each candidate on picture number n: (n, noun or colour or scene, candidates) -> (K,)."""


def judged(values: Recipe, asked: Sequence[Asked], answer: Answer) -> Verdict:
    """Let a judge choose a noun among the candidates, a colour among all, a scene among all."""
    verdict = Verdict([], [], [])
    for number, row in enumerate(asked):
        verdict.noun.append(int(answer(number, "noun", row.candidates).argmax()) == 0)
        for kind, names in (("colour", list(values.colours)), ("scene", list(values.scenes))):
            if row.context in names:
                best = names[int(answer(number, kind, names).argmax())]
                getattr(verdict, kind).append(best == row.context)
    return verdict


def by_scorer(scorer: BundledScorer, values: Recipe, asked: Sequence[Asked], images: Sequence[Image.Image]) -> Verdict:
    """Judge by the cosine of each picture with its prompt and with the prompt changed in one word."""
    rows = scorer.embed_images(images)

    def answer(number: int, kind: str, names: Sequence[str]) -> NDArray[np.float64]:
        row = asked[number]
        change = row.with_noun if kind == "noun" else row.with_context
        return (scorer.embed_texts([change(values, name) for name in names]) @ rows[number]).double().numpy()

    return judged(values, asked, answer)


def by_judge(net: judge.Net, values: Recipe, asked: Sequence[Asked], images: Sequence[Image.Image]) -> Verdict:
    """Judge by the CNN."""
    found, names_of = judge.logits(net, images), judge.answers(values)

    def answer(number: int, kind: str, names: Sequence[str]) -> NDArray[np.float64]:
        return found[kind][number, [names_of[kind].index(name) for name in names]].double().numpy()

    return judged(values, asked, answer)


def shares(verdict: Verdict) -> dict[str, float]:
    """Give the share of right answers of each kind."""
    return {kind: float(np.mean(right)) for kind, right in verdict._asdict().items() if right}


def measure(
    values: Recipe, drawn: Sprites, pipeline: StableDiffusionPipeline, scorer: BundledScorer, net: judge.Net
) -> dict[str, Any]:
    """Draw every prompt with every seed, by the model and beside it, and let both judges look."""
    section = values.quality
    asked = [row for row in prompts(values) for _ in range(section.seeds)]
    seeds = list(range(len(asked)))
    texts = [row.prompt for row in asked]
    random = random_pipeline(pipeline, values.resolution, section.seed)
    sources = {
        "model": draw(pipeline, texts, seeds),
        "random weights": draw(random, texts, seeds),
        "composed": as_decoded(pipeline.vae, composed(values, drawn, asked, seeds)),
    }
    rows, by_noun = {}, {}
    for name, images in sources.items():
        verdicts = {"scorer": by_scorer(scorer, values, asked, images), "judge": by_judge(net, values, asked, images)}
        rows[name] = {who: shares(verdict) for who, verdict in verdicts.items()}
        if name == "model":
            both = [np.mean(pair) for pair in zip(verdicts["scorer"].noun, verdicts["judge"].noun, strict=True)]
            by_noun = {
                noun: float(np.mean([b for b, row in zip(both, asked, strict=True) if row.noun == noun]))
                for noun in dict.fromkeys(row.noun for row in asked)
            }
    return {
        "on_colours": section.prompts,
        "in_scenes": section.prompts,
        "seeds": section.seeds,
        "nouns": len(values.nouns),
        "colours": len(values.colours),
        "scenes": len(values.scenes),
        "candidates": min(section.candidates, len(values.nouns)),
        "steps": STEPS,
        "guidance_scale": GUIDANCE,
        "scorer": f"{scorer.name} {scorer.revision}",
        "rows": rows,
        "by_noun": by_noun,
    }


def main() -> None:
    """Measure a model and write the numbers beside it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=recipe.MODEL, help="the folder of the pipeline")
    folder: Path = parser.parse_args().model
    values, drawn = recipe.load(), sprites.load(sprites.FOLDER)
    result = measure(values, drawn, open_model(folder), BundledScorer(recipe.SCORER), judge.load(values))
    result["judge_on_fresh_composed"] = json.loads((judge.FOLDER / judge.FRESH).read_text(encoding="utf-8"))
    text = json.dumps(result, indent=1) + "\n"
    (folder / FILE).write_text(text, encoding="utf-8")
    if folder == recipe.MODEL:  # what the stage of the card waits for: the model's own folder is no output of a stage
        (recipe.SCRATCH / FILE).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
