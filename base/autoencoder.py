"""Train the AutoencoderKL on composed pictures of every drawing; later, perhaps, its decoder alone.

B rows, S pixels a side, values in [-1, 1].
"""

import argparse
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import nn
from tqdm import tqdm

from base import compose, loop, parallel, recipe, sprites
from base.parallel import Group
from base.recipe import Autoencoder, Recipe
from base.sprites import Sprites

FOLDER = recipe.SCRATCH / "autoencoder"
CHECKPOINT = FOLDER / "checkpoint.pt"
DECODER_CHECKPOINT = FOLDER / "decoder.pt"
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


@torch.inference_mode()
def as_decoded(vae: AutoencoderKL, images: Sequence[Image.Image], batch_size: int = 32) -> list[Image.Image]:
    """Encode and decode pictures: no picture of the model can be sharper."""
    made: list[Image.Image] = []
    for first in range(0, len(images), batch_size):
        pixels = np.stack([np.asarray(image) for image in images[first : first + batch_size]])
        decoded = vae.decode(vae.encode(to_tensor(pixels)).latent_dist.mean).sample
        rows = ((decoded.clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 1).byte().numpy()
        made += [Image.fromarray(row) for row in rows]
    return made


def loss_terms(pred: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Give the L1 of the values and the L1 of their differences to the right and below, which keeps edges sharp."""
    off = pred - target
    return off.abs().mean(), off.diff(dim=-1).abs().mean() + off.diff(dim=-2).abs().mean()


class Trainer:
    """The autoencoder in training, its average, and how far it is.

    With `start`, only the decoder of that autoencoder is trained: the latents that a denoiser knows stay as they are.
    """

    def __init__(
        self,
        values: Recipe,
        minutes: float | None = None,
        start: AutoencoderKL | None = None,
        group: Group = ALONE,
    ) -> None:
        section = values.autoencoder
        torch.manual_seed(section.seed)
        model = build(section, values.resolution) if start is None else start
        self.device = loop.device(group.size)
        self.model = model.to(device=self.device, memory_format=torch.channels_last)
        self.trained: nn.Module = self.model
        self.rows, self.learning_rate, self.seen = section.rows, section.learning_rate, 0
        if start is not None:
            model.requires_grad_(False)
            self.trained = model.decoder.requires_grad_(True)
            self.rows, self.learning_rate, self.seen = section.decoder_rows, section.decoder_learning_rate, section.rows
        self.parameters = list(self.trained.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=self.learning_rate, weight_decay=1e-4, fused=True)
        self.average = loop.Average({"trained": self.trained}, section.ema_decay)
        self.progress = loop.Progress(self.rows, minutes)
        self.step = 0

    def save(self, path: Path) -> None:
        """Write everything that a continued training needs."""
        state = {
            "model": self.trained.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.state_dict(),
            "rows": self.progress.work,
            "elapsed_s": self.progress.elapsed_s,
            "step": self.step,
        }
        loop.save(path, state)

    def load(self, path: Path) -> None:
        """Continue from a checkpoint, if there is one."""
        if (state := loop.load(path)) is None:
            return
        self.trained.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average.load_state_dict(state["average"])
        self.progress.work, self.progress.elapsed_s, self.step = state["rows"], state["elapsed_s"], state["step"]

    def train_step(self, section: Autoencoder, target: torch.Tensor, group: Group) -> tuple[float, float]:
        """Make one step on this process's part of a batch, (B, 3, S, S); give both terms of its loss."""
        target = target.to(self.device)
        noise_seed = (section.seed * 1_000_003 + self.step) * group.size + group.rank
        generator = torch.Generator(self.device).manual_seed(noise_seed)
        with loop.autocast(self.device, section.mixed_precision):
            posterior = self.model.encode(target).latent_dist
            pred = self.model.decode(posterior.sample(generator)).sample
        value_loss, edge_loss = loss_terms(pred.float(), target)
        loss = value_loss + edge_loss + section.kl_weight * posterior.kl().float().mean() / posterior.mean[0].numel()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        group.average([p.grad for p in self.parameters if p.grad is not None])
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.average.update()
        self.step += 1
        self.progress.add(section.batch_size)
        return value_loss.item(), edge_loss.item()


def train(
    values: Recipe,
    drawn: Sprites,
    checkpoint: Path,
    minutes: float | None = None,
    group: Group = ALONE,
    start: AutoencoderKL | None = None,
) -> AutoencoderKL:
    """Train to the end of the rows or of the minutes, continuing from the checkpoint; give the averaged weights."""
    section = values.autoencoder
    trainer = Trainer(values, minutes, start, group)
    trainer.load(checkpoint)
    timer, part = loop.Every(3), group.part(section.batch_size)
    bar = tqdm(desc="autoencoder", total=trainer.rows, unit="rows", mininterval=10, disable=not group.leads)
    while (share := group.agree(trainer.progress.share)) < 1:
        for each in trainer.optimizer.param_groups:
            each["lr"] = loop.rate_at(
                share, trainer.step, trainer.learning_rate, section.final_learning_rate, section.warmup_steps
            )
        first = trainer.seen + trainer.step * section.batch_size + group.rank * part
        target = batch(values, drawn, values.resolution, first, part)
        value_loss, edge_loss = trainer.train_step(section, target, group)
        bar.update(trainer.progress.work - bar.n)
        if trainer.step % 20 == 0:
            bar.set_postfix(l1=f"{value_loss:.4f}", edge=f"{edge_loss:.4f}", share=f"{share:.3f}")
        if group.leads and timer.due():
            trainer.save(checkpoint)
    bar.close()
    if group.leads:
        trainer.save(checkpoint)
    trainer.trained.load_state_dict(trainer.average.weights["trained"])
    return trainer.model.float().cpu().eval()


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


def work(group: Group, minutes: float | None, decoder: bool) -> None:
    """Train, measure the scale of the latents, and save the part of the pipeline."""
    values, drawn = recipe.load(), sprites.load(sprites.FOLDER)
    start = AutoencoderKL.from_pretrained(FOLDER / "vae") if decoder else None
    model = train(values, drawn, DECODER_CHECKPOINT if decoder else CHECKPOINT, minutes, group, start)
    if not group.leads:
        return
    if decoder:
        model.half().save_pretrained(recipe.MODEL / "vae")
    else:
        model.register_to_config(scaling_factor=scaling_factor(model, values, drawn))
        model.save_pretrained(FOLDER / "vae")


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--decoder", action="store_true", help="train only the decoder further, for the made pipeline")
    parser.add_argument("--minutes", type=float, help="end by then, the rate falling in time")
    parser.add_argument("--processes", type=int, default=1, help="that share each batch, one thread each")
    arguments = parser.parse_args()
    job = functools.partial(work, minutes=arguments.minutes, decoder=arguments.decoder)
    parallel.run(job, arguments.processes)


if __name__ == "__main__":
    main()
