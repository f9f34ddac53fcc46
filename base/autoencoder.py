"""Train the AutoencoderKL on composed pictures of every drawing.

B rows, S pixels a side, values in [-1, 1].
"""

import argparse
import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from tqdm import tqdm

from base import compose, loop, parallel, recipe, sprites
from base.parallel import Group
from base.recipe import Autoencoder, Recipe
from base.sprites import Sprites

FOLDER = recipe.SCRATCH / "autoencoder"
CHECKPOINT = FOLDER / "checkpoint.pt"
ALONE = Group()
DECODED = 4096
"""Pictures whose latents give the scale of the latent space."""


def build(section: Autoencoder, resolution: int, **config: Any) -> AutoencoderKL:
    """Make the network: one layer a block and no attention, to be fast on a CPU."""
    channels = list(section.block_out_channels)
    return AutoencoderKL(
        block_out_channels=channels,
        down_block_types=["DownEncoderBlock2D"] * len(channels),
        up_block_types=["UpDecoderBlock2D"] * len(channels),
        latent_channels=section.latent_channels,
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=resolution,
        **config,
    )


def batch(values: Recipe, drawn: Sprites, size: int, first: int, count: int) -> torch.Tensor:
    """Compose `count` pictures from index `first` on: (B, 3, S, S).

    Odd rows are captioned pictures, as the denoiser sees them; even rows show any drawing.
    """
    seed = values.autoencoder.seed
    rows = [
        compose.paint(drawn, compose.plan(values, drawn, seed, i), size)
        if i % 2
        else compose.any_sprite(drawn, values, size, seed, i)
        for i in range(first, first + count)
    ]
    return to_tensor(np.stack(rows))


def to_tensor(pixels: compose.Pixels) -> torch.Tensor:
    """Bring (B, S, S, 3) bytes to (B, 3, S, S) in [-1, 1], channels last in memory."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def loss_terms(pred: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Give the L1 of the values and the L1 of their differences to the right and below, which keeps edges sharp."""
    off = pred - target
    return off.abs().mean(), off.diff(dim=-1).abs().mean() + off.diff(dim=-2).abs().mean()


def train(
    values: Recipe, drawn: Sprites, checkpoint: Path, minutes: float | None = None, group: Group = ALONE
) -> AutoencoderKL:
    """Train to the end of the rows or of the minutes, continuing from the checkpoint; give the averaged weights."""
    section = values.autoencoder
    torch.manual_seed(section.seed)
    model = build(section, values.resolution).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=section.learning_rate, weight_decay=1e-4, fused=True)
    parameters = list(model.parameters())
    average = loop.Average({"vae": model}, section.ema_decay)
    progress = loop.Progress(section.rows, minutes)
    step = 0
    if (state := loop.load(checkpoint)) is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average.load_state_dict(state["average"])
        progress.work, progress.elapsed_s, step = state["rows"], state["elapsed_s"], state["step"]

    def keep() -> None:
        if not group.leads:
            return
        loop.save(
            checkpoint,
            {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "average": average.state_dict(),
                "rows": progress.work,
                "elapsed_s": progress.elapsed_s,
                "step": step,
            },
        )

    timer = loop.Every(3)
    bar = tqdm(
        total=section.rows,
        initial=int(progress.work),
        unit="rows",
        desc="autoencoder",
        mininterval=10,
        disable=not group.leads,
    )
    part = group.part(section.batch_size)
    while (share := group.agree(progress.share)) < 1:
        for each in optimizer.param_groups:
            each["lr"] = loop.rate_at(
                share, step, section.learning_rate, section.final_learning_rate, section.warmup_steps
            )
        target = batch(values, drawn, values.resolution, step * section.batch_size + group.rank * part, part)
        generator = torch.Generator().manual_seed((section.seed * 1_000_003 + step) * group.size + group.rank)
        posterior = model.encode(target).latent_dist
        pred = model.decode(posterior.sample(generator)).sample
        value_loss, edge_loss = loss_terms(pred, target)
        loss = value_loss + edge_loss + section.kl_weight * posterior.kl().mean() / posterior.mean[0].numel()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        group.average(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        average.update()
        step += 1
        progress.add(section.batch_size)
        bar.update(section.batch_size)
        if step % 20 == 0:
            bar.set_postfix(
                l1=f"{value_loss.item():.4f}", edge=f"{edge_loss.item():.4f}", share=f"{progress.share:.3f}"
            )
        if timer.due():
            keep()
    bar.close()
    keep()
    model.load_state_dict(average.weights["vae"])
    return model.eval()


@torch.inference_mode()
def scaling_factor(model: AutoencoderKL, values: Recipe, drawn: Sprites, count: int = DECODED) -> float:
    """Give 1 / the standard deviation of the latents of captioned pictures."""
    rows = []
    for first in range(0, count, 64):
        pixels = [
            p for p, _ in compose.pictures(values, drawn, range(first, min(first + 64, count)), values.resolution)
        ]
        rows.append(model.encode(to_tensor(np.stack(pixels))).latent_dist.mean)
    return 1 / torch.cat(rows).std().item()


def work(group: Group, minutes: float | None) -> None:
    """Train, measure the scale of the latents, and save the part of the pipeline."""
    values, drawn = recipe.load(), sprites.load(recipe.SCRATCH / "sprites")
    model = train(values, drawn, CHECKPOINT, minutes, group)
    if group.leads:
        model.register_to_config(scaling_factor=scaling_factor(model, values, drawn))
        model.save_pretrained(FOLDER / "vae")


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, help="end by then, the rate falling in time")
    parser.add_argument("--processes", type=int, default=1, help="that share each batch, one thread each")
    arguments = parser.parse_args()
    parallel.run(functools.partial(work, minutes=arguments.minutes), arguments.processes)


if __name__ == "__main__":
    main()
