"""Train the image-text scorer: a head on frozen Lite0 features that puts pictures and prompts into one space.

It learns from composed pictures of every hand but one; the held-out hand measures it. The text encoder of the base
model has no part in it: what conditions a model must not judge it.
B rows, N pictures, F features, T tokens, K candidates, D width of the space, S pixels a side.
"""

import argparse
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from itertools import compress, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from base import autoencoder, compose, hands, icons, loop, recipe, sprites
from base.compose import Plan
from base.recipe import Precision, Recipe
from base.recipe import Scorer as Section
from base.soften import soften
from base.sprites import Sprites
from dreambooth.encoders import lite0_pooled
from dreambooth.scorer import WEIGHTS, BundledScorer, image_rows, one_hot, text_rows
from dreambooth.vocabulary import VOCABULARY, Vocabulary, read_vocabulary

CACHE = recipe.SCRATCH / "scorer"
MEASURED = "measured.json"
DECODED = 64
"""Pictures that are looked through at once for those that go through the autoencoder."""
CHUNK = 500
"""Pictures of one file of features: a killed run loses one of them."""
MIN_DEVIATION = 1e-3
"""A feature that hardly varies is not blown up to unit variance."""

NOTHING = ("photo", "picture", "drawing", "image", "of")
"""Words that say nothing about what is on a picture."""


def vocabulary(values: Recipe) -> dict[str, Any]:
    """List the tokens and the phrases that stand for them, from the words of the recipe.

    "orange" alone is a colour; a background colour has a token of its own.
    """
    phrases: dict[str, str | None] = dict.fromkeys(NOTHING)
    phrases |= {noun: f"noun: {noun}" for noun in values.nouns}
    for colour in values.colours:
        phrases |= {plain.format(colour): f"background: {colour}" for plain in compose.PLAIN_PHRASES}
    phrases |= {scene: f"scene: {scene}" for scene in values.scenes}
    phrases |= {colour: f"colour: {colour}" for colour in values.colours if colour != "white"}
    phrases |= {f"wearing {words}": f"wearing: {words}" for words in values.accessories}
    phrases |= {f"next to {words}": f"next to: {words}" for words in values.neighbours}
    phrases |= {size: f"size: {size}" for size in ("small", "large")}
    phrases |= {style: f"style: {style}" for style in values.styles.values()}
    return {"tokens": list(dict.fromkeys(token for token in phrases.values() if token)), "phrases": phrases}


def as_bytes(words: dict[str, Any]) -> bytes:
    """Write a vocabulary as its file."""
    return json.dumps(words, indent=1).encode() + b"\n"


GROUPS = (("noun",), ("background", "scene"), ("colour",), ("wearing",), ("next to",), ("size",), ("style",))
"""Tokens that exclude each other: a picture has one noun, one background, one colour, .."""


def groups(words: Vocabulary) -> list[list[int]]:
    """List the numbers of the tokens of each group."""
    kinds = [token.partition(":")[0] for token in words.tokens]
    return [[number for number, kind in enumerate(kinds) if kind in group] for group in GROUPS]


# --- pictures and features


def training_hands(values: Recipe, drawn: Sprites) -> tuple[Recipe, Sprites]:
    """Give the recipe and the drawings that it learns from: all hands but the held-out one, and redrawn ones."""
    section = values.scorer
    wide = hands.more_nouns(values, section.extra_weight)
    packages = set(values.all_packages) - {section.held_out_package}
    wide, drawn = hands.of_packages(wide, drawn, packages)
    return wide, hands.with_more_hands(drawn, section.more_hands, section.seed)


def plans(values: Recipe, drawn: Sprites, count: int) -> list[Plan]:
    """Plan the pictures of the scorer."""
    pictures = values.scorer.pictures
    values = values.model_copy(update={"pictures": pictures})
    return [compose.plan(values, drawn, pictures.seed, index) for index in range(count)]


def held_out(values: Recipe, drawn: Sprites) -> tuple[Sprites, list[Plan]]:
    """Plan the pictures of the held-out hand, as the base model's own are composed but without made-up words."""
    section = values.scorer
    own, theirs = hands.of_packages(values, drawn, {section.held_out_package})
    own = own.model_copy(
        update={"noun_weights": {}, "pictures": values.pictures.model_copy(update={"rare_share": 0.0})}
    )
    return theirs, [compose.plan(own, theirs, section.seed, index) for index in range(section.held_out_rows)]


def softened(image: Image.Image, seed: int, index: int) -> Image.Image:
    """Spoil the picture of a number a little, most often."""
    return Image.fromarray(soften(np.asarray(image), np.random.default_rng([seed, 1, index])))


def painted(drawn: Sprites, todo: Sequence[Plan], size: int, seed: int, soft: bool = True) -> Iterator[Image.Image]:
    """Paint plans, most of them a little spoiled where they shall be `soft`."""
    for index, plan in enumerate(todo):
        image = Image.fromarray(compose.paint(drawn, plan, size))
        yield softened(image, seed, index) if soft else image


def spoiled(drawn: Sprites, todo: Sequence[Plan], vae: AutoencoderKL, values: Recipe) -> Iterator[Image.Image]:
    """Paint plans to learn from: a share went through the autoencoder of the base model, the others are soft.

    What the base model draws has the faults of its decoder; a judge that knows them does not take them for the subject.
    """
    section, sharp = values.scorer, enumerate(painted(drawn, todo, values.resolution, values.scorer.seed, soft=False))
    while part := list(islice(sharp, DECODED)):
        share = [np.random.default_rng([section.seed, 7, index]).random() < section.decoded_share for index, _ in part]
        decoded = iter(autoencoder.as_decoded(vae, [image for _, image in compress(part, share)]))
        for (index, image), through in zip(part, share, strict=True):
            yield next(decoded) if through else softened(image, section.seed, index)


def features_of(images: list[Image.Image], folder: Path, mixed_precision: Precision) -> NDArray[np.float16]:
    """Give the Lite0 features of pictures, (N, F), from the file of an earlier call with the same pictures."""
    digest = hashlib.sha256(b"".join(image.tobytes() for image in images)).hexdigest()[:12]
    path = folder / f"features-{digest}-{mixed_precision}.npy"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part.npy")
        with loop.autocast(torch.device("cpu"), mixed_precision):
            pooled = lite0_pooled(images)
        np.save(part, torch.cat(pooled, dim=1).half().numpy())
        part.replace(path)
    features: NDArray[np.float16] = np.load(path)
    return features


def features(images: Iterator[Image.Image], count: int, folder: Path, mixed_precision: Precision = "no") -> Tensor:
    """Give the Lite0 features of many pictures: (N, F), float32."""
    rows = []
    bar = tqdm(desc="features", total=count, unit="pictures", mininterval=10)
    for first in range(0, count, CHUNK):
        chunk = [next(images) for _ in range(min(CHUNK, count - first))]
        rows.append(features_of(chunk, folder, mixed_precision))
        bar.update(len(chunk))
    bar.close()
    return torch.from_numpy(np.concatenate(rows)).float()


# --- the loss


def info_nce(cosines: Tensor, temperature: float, ignored: Tensor) -> Tensor:
    """Give the contrastive loss of B pairs, the mean of both directions.

    Args:
        cosines: (B, B) of picture i and text j; the pairs are on the diagonal.
        temperature: divides the cosines.
        ignored: (B, B), True where text j is no wrong answer to picture i.

    Source: van den Oord et al. 2018, equation 4; both directions as in Radford et al. 2021, figure 3.
    """
    logits = (cosines / temperature).masked_fill(ignored, -torch.inf)
    right = torch.arange(len(logits))
    return (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2


def also_true(bags: Tensor) -> Tensor:
    """Mark the texts that say nothing false of a picture: (B, T) zeros and ones to (B, B), False on the diagonal.

    Text j is true of picture i when each of its words is in the text of picture i.
    """
    surplus = (1 - bags) @ bags.T
    return (surplus == 0).fill_diagonal_(False)


def swapped(images: Tensor, rest: Tensor, candidates: Tensor) -> Tensor:
    """Give the cosine of each picture with its text when one word is exchanged for each candidate.

    Args:
        images: (B, D), unit rows.
        rest: (B, D), the sum of the tokens of the other words of the text, not normalised.
        candidates: (K, D), tokens.

    Returns:
        (B, K): the cosine of images[i] and rest[i] + candidates[k].
    """
    dots = (images * rest).sum(1, keepdim=True) + images @ candidates.T
    squares = rest.square().sum(1, keepdim=True) + 2 * rest @ candidates.T + candidates.square().sum(1)
    return dots / squares.clamp(min=1e-12).sqrt()


def hard_negatives(
    images: Tensor, bags: Tensor, tokens: Tensor, group: Sequence[int], temperature: float, label_smoothing: float
) -> Tensor:
    """Give the cross entropy of the right word among its group, the rest of the text unchanged.

    In a batch nearly every wrong text is wrong in all its words; here it is wrong in one. Zero where no text has a word
    of the group.
    """
    members = bags[:, list(group)]
    rows = members.sum(1) == 1
    if not bool(rows.any()):
        return images.new_zeros(())
    right = members[rows].argmax(1)
    candidates = tokens[list(group)]
    cosines = swapped(images[rows], bags[rows] @ tokens - candidates[right], candidates)
    return F.cross_entropy(cosines / temperature, right, label_smoothing=label_smoothing)


def total_loss(images: Tensor, bags: Tensor, tokens: Tensor, parts: list[list[int]], section: Section) -> Tensor:
    """Add the contrastive loss of the batch and that of each group of words, weighed by how many texts have one."""
    loss = info_nce(images @ text_rows(bags, tokens).T, section.temperature, also_true(bags))
    for group in parts:
        share = bags[:, group].any(1).float().mean()
        loss = loss + share * hard_negatives(images, bags, tokens, group, section.temperature, section.label_smoothing)
    return loss


# --- the training


def initial(rows: Tensor, tokens: int, section: Section) -> dict[str, Tensor]:
    """Make the head: the mean and scale of (N, F) features, and random weights."""
    hidden, out = nn.Linear(rows.shape[1], section.hidden_size), nn.Linear(section.hidden_size, section.width)
    return {
        "mean": rows.mean(0),
        "scale": 1 / rows.std(0).clamp(min=MIN_DEVIATION),
        "hidden.weight": hidden.weight.detach(),
        "hidden.bias": hidden.bias.detach(),
        "out.weight": out.weight.detach(),
        "out.bias": out.bias.detach(),
        "tokens": torch.randn(tokens, section.width) / section.width**0.5,
    }


def train(rows: Tensor, bags: Tensor, words: Vocabulary, section: Section) -> dict[str, Tensor]:
    """Train the head on (N, F) features and (N, T) bags."""
    torch.manual_seed(section.seed)
    weights = initial(rows, len(words.tokens), section)
    rows = (rows - weights["mean"]) * weights["scale"]
    standard = {"mean": torch.zeros(()), "scale": torch.ones(())}
    learned = {name: nn.Parameter(tensor) for name, tensor in weights.items() if name not in standard}
    optimizer = torch.optim.AdamW(learned.values(), lr=section.learning_rate, weight_decay=section.weight_decay)
    parts, order = groups(words), torch.empty(0, dtype=torch.long)
    bar = tqdm(range(section.steps), desc="scorer", unit="steps", mininterval=10)
    for step in bar:
        for each in optimizer.param_groups:
            each["lr"] = loop.rate_at(step / section.steps, step, section.learning_rate, 0, 50)
        if len(order) < section.batch_size:
            order = torch.cat([order, torch.randperm(len(rows))])
        chosen, order = order[: section.batch_size], order[section.batch_size :]
        x = F.dropout(rows[chosen], section.dropout)
        loss = total_loss(image_rows(x, standard | learned), bags[chosen], learned["tokens"], parts, section)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    return weights | {name: tensor.detach() for name, tensor in learned.items()}


# --- the measurement


def right_among(cosines: Tensor, right: Tensor, candidates: int, seed: int) -> float:
    """Give how often the right one of K words wins against `candidates` - 1 others drawn at random: (N, K), (N,)."""
    generator = torch.Generator().manual_seed(seed)
    wins = []
    for row, k in zip(cosines, right.tolist(), strict=True):
        others = torch.randperm(len(row), generator=generator)
        others = others[others != k][: candidates - 1]
        wins.append(bool(row[k] > row[others].max()))
    return float(np.mean(wins))


def measure(scorer: BundledScorer, rows: Tensor, todo: Sequence[Plan], values: Recipe) -> dict[str, float]:
    """Measure the scorer on (N, F) features of planned pictures of a hand that it never saw."""
    words, tokens = scorer.vocabulary, scorer.weights["tokens"]
    images = image_rows(rows, scorer.weights)
    bags = one_hot([words.bag(plan.caption) for plan in todo], len(words.tokens))
    kinds = {
        "noun": [f"noun: {noun}" for noun in values.nouns],
        "colour": [f"background: {colour}" for colour in values.colours],
        "scene": [f"scene: {scene}" for scene in values.scenes],
    }
    result: dict[str, float] = {"pictures": len(todo)}
    others = {}
    for kind, names in kinds.items():
        group = [words.tokens.index(name) for name in names]
        told = bags[:, group].sum(1) == 1
        right = bags[told][:, group].argmax(1)
        candidates = tokens[group]
        cosines = swapped(images[told], bags[told] @ tokens - candidates[right], candidates)
        count = min(values.quality.candidates, len(group)) if kind == "noun" else len(group)
        result[f"{kind}_right"] = right_among(cosines, right, count, values.scorer.seed)
        others[kind] = float(cosines.masked_fill(F.one_hot(right, len(group)).bool(), torch.nan).nanmean())
    texts = text_rows(bags, tokens)
    cosines = images @ texts.T
    nothing_shared = bags @ bags.T == 0
    return result | {
        "cosine_right": float(cosines.diagonal().mean()),
        "cosine_wrong_noun": others["noun"],
        "cosine_wrong_colour": others["colour"],
        "cosine_wrong_scene": others["scene"],
        "cosine_all_wrong": float(cosines[nothing_shared].mean()),
    }


def save(weights: dict[str, Tensor], words: bytes, folder: Path) -> None:
    """Write the head in float16 and the vocabulary."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / VOCABULARY).write_bytes(words)
    save_file({name: tensor.half().contiguous() for name, tensor in weights.items()}, folder / WEIGHTS)


CARD = """---
license: apache-2.0
---
# The image-text scorer of the bundled model

Says how well a picture fits a prompt, for the words of `emoji64` alone: the cosine of a picture and a bag of phrases.
It stands where CLIP stands for photos. `dreambooth/scorer.py` uses it, `base/scorer.py` made it.

* Picture: {features} features of EfficientNet-Lite0 (trained on ImageNet, frozen; Apache-2.0, not in this folder) at
  224 px, then one hidden layer of {hidden} units: {parameters:.2f} M parameters, {size_mb:.1f} MB in float16.
* Prompt: the sum of the vectors of its phrases, of {tokens}, in {width} dimensions; the order of words is not seen.
* The text encoder of `emoji64` has no part in it: what conditions a model must not judge it.
* A word that is not in `vocabulary.json` is refused, since a low score would be no answer.

## Measured
On {pictures} composed pictures of Emoji One, a hand that it never saw: sharp, and the same spoiled a little as in
training ("soft"), since a small diffusion model draws soft pictures. One word of the caption is exchanged, the rest
stays. A few settings were compared on these pictures too (docs/log.md), so the numbers are a little kind.

| | sharp | soft | wanted |
|---|---|---|---|
| noun right (1 of {candidates}, the others at random) | {sharp[noun_right]:.3f} | {soft[noun_right]:.3f} | .80 |
| background colour right (1 of {colours}) | {sharp[colour_right]:.3f} | {soft[colour_right]:.3f} | .90 |
| scene right (1 of {scenes}) | {sharp[scene_right]:.3f} | {soft[scene_right]:.3f} | |

What a cosine means, on the same pictures (mean):

| caption | sharp | soft |
|---|---|---|
| right | {sharp[cosine_right]:.3f} | {soft[cosine_right]:.3f} |
| another noun | {sharp[cosine_wrong_noun]:.3f} | {soft[cosine_wrong_noun]:.3f} |
| another background colour | {sharp[cosine_wrong_colour]:.3f} | {soft[cosine_wrong_colour]:.3f} |
| another scene | {sharp[cosine_wrong_scene]:.3f} | {soft[cosine_wrong_scene]:.3f} |
| no word in common | {sharp[cosine_all_wrong]:.3f} | {soft[cosine_all_wrong]:.3f} |

So a difference of .03 between two models is {noun_share:.0%} of what a wrong noun costs, as if one picture in
{one_in:.0f} had lost its subject; .01 is a third of that. The cosines of CLIP lie closer together (.15 to .35):
compare neither its numbers with these, nor those of two revisions of this scorer.

## Vocabulary
* Nouns of `emoji64`: {nouns}.
* Further nouns, so that the features serve more: {extra}.
* Background: "on a COLOUR background", "in front of a COLOUR wall": {colour_names}; scenes: {scene_names}.
* Of the subject: a colour before the noun ("a red dog"; not white), small, large, {styles}.
* "wearing {wearing}", "next to {next_to}".

## Limits
It knows emoji drawings of 64 px and single subjects. It cannot count, and sees no relations: "a cat next to a ball" is
a cat and a ball. Words that share a token ("on a red background", "in front of a red wall") score alike. Accessories,
neighbours, sizes and styles were in few of its pictures and are not measured.

## How it was made
`python -m base.scorer`, values under `scorer` in `base/params.yaml`: {rows:,} pictures of {hands} sets and {more_hands}
redrawn copies of each drawing (warped, squeezed, other colours, outlined). {decoded:.0%} of the pictures went through
the autoencoder of `emoji64`, so that its softness is no news; most others are blurred, noisy or recompressed a little.
InfoNCE with temperature {temperature:g}, and for each word of a caption the cross entropy against its alternatives.
{minutes:.0f} minutes in all, of them {head_minutes:.0f} for the head, on one thread of a busy CPU of two cores.

## Licences and attribution
The weights are published under the Apache License 2.0. The drawings keep their licences:

| set | drawings by | licence | |
|---|---|---|---|
{sets}

Twemoji: copyright Twitter, Inc and other contributors, graphics licensed under CC BY 4.0
(https://creativecommons.org/licenses/by/4.0/). Emoji One: emoji icons provided free by Emoji One, licensed under
CC BY 4.0 (the same address).
The drawings were changed: rendered, scaled, turned, tinted, redrawn and put together.
Kept out of all training: {held_out} (the demo subjects), and all of {held_out_package}.
"""


def card(values: Recipe, folder: Path) -> str:
    """Write the model card from the recipe and the measurements."""
    section = values.scorer
    measured = json.loads((folder / MEASURED).read_text(encoding="utf-8"))
    scorer = BundledScorer(folder)
    sharp, soft = measured["sharp"], measured["soft"]
    fall = sharp["cosine_right"] - sharp["cosine_wrong_noun"]
    of = {token.partition(": ")[2] for token in scorer.vocabulary.tokens if token.startswith("noun: ")}
    sets = "\n".join(
        f"| {icons.SCOPE}/{name} {p.version} | {p.attribution} | {p.licence} | "
        f"{'measures' if name == section.held_out_package else 'trains'} |"
        for name, p in values.all_packages.items()
    )
    return CARD.format(
        features=len(scorer.weights["mean"]),
        hidden=section.hidden_size,
        parameters=sum(tensor.numel() for tensor in scorer.weights.values()) / 1e6,
        size_mb=(folder / WEIGHTS).stat().st_size / 1e6,
        tokens=len(scorer.vocabulary.tokens),
        width=section.width,
        pictures=sharp["pictures"],
        candidates=min(values.quality.candidates, len(values.nouns)),
        colours=len(values.colours),
        scenes=len(values.scenes),
        sharp=sharp,
        soft=soft,
        noun_share=0.03 / fall,
        one_in=fall / 0.03,
        nouns=", ".join(values.nouns),
        extra=", ".join(sorted(of - set(values.nouns))) or "none",
        colour_names=", ".join(values.colours),
        scene_names=", ".join(values.scenes),
        styles=", ".join(dict.fromkeys(values.styles.values())),
        wearing=", ".join(values.accessories),
        next_to=", ".join(values.neighbours),
        rows=measured["rows"],
        hands=len(values.all_packages) - 1,
        decoded=section.decoded_share,
        more_hands=section.more_hands,
        temperature=section.temperature,
        minutes=measured["minutes"],
        head_minutes=measured["head_minutes"],
        sets=sets,
        held_out=", ".join(f"`{name}`" for name in values.held_out),
        held_out_package=section.held_out_package,
    )


def make(values: Recipe, drawn: Sprites, model: Path, folder: Path, cache: Path) -> dict[str, float]:
    """Train the scorer of a base model and write it to the folder; give how many pictures and how long it took."""
    section, start = values.scorer, time.monotonic()
    wide, theirs = training_hands(values, drawn)
    todo = plans(wide, theirs, section.rows)
    content = as_bytes(vocabulary(wide))
    words = read_vocabulary(content, folder / VOCABULARY)
    vae = AutoencoderKL.from_pretrained(model / "vae").eval()
    images = spoiled(theirs, todo, vae, values)
    rows = features(images, section.rows, cache, section.mixed_precision)
    head_start = time.monotonic()
    weights = train(rows, one_hot([words.bag(plan.caption) for plan in todo], len(words.tokens)), words, section)
    save(weights, content, folder)
    end = time.monotonic()
    return {"rows": section.rows, "minutes": (end - start) / 60, "head_minutes": (end - head_start) / 60}


def measured_on_held_out(values: Recipe, drawn: Sprites, folder: Path, cache: Path) -> dict[str, dict[str, float]]:
    """Measure the scorer in the folder on sharp and on soft pictures of the held-out hand."""
    theirs, todo = held_out(values, drawn)
    result = {}
    for name, soft in (("sharp", False), ("soft", True)):
        images = painted(theirs, todo, values.resolution, values.scorer.seed, soft)
        result[name] = measure(BundledScorer(folder), features(images, len(todo), cache), todo, values)
    return result


def main() -> None:
    """Train the scorer, measure it, and write its card."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", action="store_true", help="measure the scorer that is there")
    arguments = parser.parse_args()
    values, folder = recipe.load(), recipe.SCORER
    drawn = sprites.join(sprites.load(sprites.FOLDER), sprites.load(sprites.FURTHER_FOLDER))
    made = json.loads((folder / MEASURED).read_text(encoding="utf-8")) if arguments.measure else None
    made = made or make(values, drawn, recipe.MODEL, folder, CACHE)
    made |= measured_on_held_out(values, drawn, folder, CACHE)
    (folder / MEASURED).write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card(values, folder), encoding="utf-8")


if __name__ == "__main__":
    main()
