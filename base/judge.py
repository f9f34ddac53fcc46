"""Train an independent judge of the base model: a small CNN of its own, from nothing, on composed pictures.

It shares neither weights nor features with the scorer: where both agree that a dog was drawn, it is no quirk of one
encoder. It knows every hand, as the base model does. B rows, S pixels a side.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from base import compose, loop, recipe, sprites
from base.autoencoder import to_tensor
from base.compose import Plan
from base.recipe import Recipe
from base.soften import soften
from base.sprites import Sprites

FOLDER = recipe.SCRATCH / "judge"
CHECKPOINT, WEIGHTS, FRESH = "checkpoint.pt", "judge.pt", "fresh.json"
KINDS = ("noun", "colour", "scene")
UNKNOWN = -100
"""A question that a picture does not answer: the target that `cross_entropy` ignores."""


class Net(nn.Module):
    """Convolutions that halve the side, the mean over what is left, and one linear layer a question."""

    def __init__(self, channels: Sequence[int], classes: Sequence[int]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in zip([3, *channels], [*channels, channels[-1]], strict=False):
            stride = 1 if before == after else 2
            layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        self.trunk = nn.Sequential(*layers)
        self.heads = nn.ModuleList(nn.Linear(channels[-1], count) for count in classes)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Give the logits of each question for (B, 3, S, S) in [-1, 1]: (B, K) each."""
        features = self.trunk(pixels).mean(dim=(2, 3))
        return [head(features) for head in self.heads]


def answers(values: Recipe) -> dict[str, list[str]]:
    """List the possible answers to each question."""
    return {"noun": list(values.nouns), "colour": list(values.colours), "scene": list(values.scenes)}


def build(values: Recipe) -> Net:
    """Make the network with random weights."""
    torch.manual_seed(values.judge.seed)
    net = Net(values.judge.block_out_channels, [len(names) for names in answers(values).values()])
    return net.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def targets(values: Recipe, plans: Sequence[Plan]) -> Tensor:
    """Number the right answers of plans: (3, B), UNKNOWN where the caption says nothing of it."""
    said = {"noun": [p.noun for p in plans], "colour": [p.context for p in plans], "scene": [p.context for p in plans]}
    rows = [
        [names.index(word) if word in names else UNKNOWN for word in said[kind]]
        for kind, names in answers(values).items()
    ]
    return torch.tensor(rows)


def pool(values: Recipe, drawn: Sprites) -> tuple[Tensor, Tensor]:
    """Compose the pictures to learn from, most of them a little spoiled: (N, S, S, 3) bytes and answers (3, N)."""
    seed, size = values.judge.seed, values.resolution
    plans = [compose.plan(values, drawn, seed, index) for index in range(values.judge.pool)]
    pixels = np.empty((len(plans), size, size, 3), np.uint8)
    for k, plan in enumerate(tqdm(plans, desc="pictures", unit="pictures", mininterval=10)):
        pixels[k] = soften(compose.paint(drawn, plan, size), np.random.default_rng([seed, 1, k]))
    return torch.from_numpy(pixels), targets(values, plans)


def batch(pixels: Tensor, right: Tensor, seed: int, step: int, count: int) -> tuple[Tensor, Tensor]:
    """Choose and mirror at random: (B, 3, S, S) in [-1, 1] and answers (3, B), a function of the seed and the step."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    rows = torch.randint(len(pixels), (count,), generator=generator)
    chosen = pixels[rows]
    mirrored = torch.rand(count, generator=generator) < 0.5
    chosen[mirrored] = chosen[mirrored].flip(2)
    return to_tensor(chosen.numpy()), right[:, rows]


def loss(logits: Sequence[Tensor], right: Tensor) -> Tensor:
    """Add the cross entropies of the questions, each over the rows that answer it."""
    parts = [F.cross_entropy(z, y) for z, y in zip(logits, right, strict=True) if bool((y != UNKNOWN).any())]
    return torch.stack(parts).sum()


def train(values: Recipe, drawn: Sprites, checkpoint: Path) -> Net:
    """Train over the rows of the recipe, continuing from the checkpoint."""
    section, net = values.judge, build(values)
    optimizer = torch.optim.AdamW(net.parameters(), lr=section.learning_rate, weight_decay=section.weight_decay)
    step = 0
    if (state := loop.load(checkpoint)) is not None:
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    pixels, answers_of_pool = pool(values, drawn)
    steps, timer = -(-section.rows // section.batch_size), loop.Every(1)
    bar = tqdm(desc="judge", initial=step, total=steps, unit="steps", mininterval=10)
    while step < steps:
        for group in optimizer.param_groups:
            group["lr"] = loop.rate_at(step / steps, step, section.learning_rate, section.learning_rate / 100, 50)
        images, right = batch(pixels, answers_of_pool, section.seed, step, section.batch_size)
        value = loss(net(images), right)
        optimizer.zero_grad(set_to_none=True)
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        step += 1
        bar.update()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{value.item():.3f}")
        if timer.due() or step == steps:
            save(net, optimizer, step, checkpoint)
    bar.close()
    return net.eval()


def save(net: Net, optimizer: torch.optim.Optimizer, step: int, path: Path) -> None:
    """Write everything that a continued training needs."""
    state: dict[str, Any] = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
    loop.save(path, state)


@torch.inference_mode()
def logits(net: Net, images: Sequence[Image.Image], batch_size: int = 64) -> dict[str, Tensor]:
    """Judge pictures of the size it was trained on: (N, K) for each question."""
    rows = [
        net(to_tensor(np.stack([np.asarray(image) for image in images[first : first + batch_size]])))
        for first in range(0, len(images), batch_size)
    ]
    return {kind: torch.cat([row[k] for row in rows]) for k, kind in enumerate(KINDS)}


def measure(values: Recipe, drawn: Sprites, net: Net) -> dict[str, float]:
    """Give the share of right answers on composed pictures that no training saw, among all of each question."""
    section = values.judge
    seed = section.seed + 1
    plans = [compose.plan(values, drawn, seed, index) for index in range(section.fresh_rows)]
    images = [Image.fromarray(compose.paint(drawn, plan, values.resolution)) for plan in plans]
    found = logits(net, images)
    shares = {}
    for kind, right in zip(KINDS, targets(values, plans), strict=True):
        asked = right != UNKNOWN
        shares[kind] = float((found[kind].argmax(1)[asked] == right[asked]).double().mean())
    return {"pictures": len(plans), **shares}


def load(values: Recipe, folder: Path = FOLDER) -> Net:
    """Read the judge that `main` trained."""
    net = build(values)
    net.load_state_dict(torch.load(folder / WEIGHTS, map_location="cpu", weights_only=True))
    return net.eval()


def main() -> None:
    """Train the judge and measure it."""
    values, drawn = recipe.load(), sprites.load(sprites.FOLDER)
    net = train(values, drawn, FOLDER / CHECKPOINT)
    torch.save(net.state_dict(), FOLDER / WEIGHTS)
    (FOLDER / FRESH).write_text(json.dumps(measure(values, drawn, net), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
