"""Train the UNet on the latents of captioned pictures, and put the pipeline together.

B rows, C latent channels, H height and W width of the latents, L tokens.
"""

import argparse
import functools
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from base import autoencoder, compose, loop, parallel, recipe, sprites, text_encoder, tokenizer
from base.parallel import Group
from base.recipe import Denoiser, Phase, Recipe
from base.sprites import Sprites
from dreambooth import loss as training_loss

FOLDER = recipe.SCRATCH / "denoiser"
CHECKPOINT = FOLDER / "checkpoint.pt"
TRAINING = "training.json"
ALONE = Group()
ENCODED = 64
"""Pictures that are encoded at once."""


def build_unet(values: Recipe, latent_size: int) -> UNet2DConditionModel:
    """Make the UNet: one layer a block, attention to the caption on all levels but the first."""
    section = values.denoiser
    lower = len(section.block_out_channels) - 1
    return UNet2DConditionModel(
        sample_size=latent_size,
        in_channels=values.autoencoder.latent_channels,
        out_channels=values.autoencoder.latent_channels,
        block_out_channels=list(section.block_out_channels),
        layers_per_block=1,
        down_block_types=["DownBlock2D"] + ["CrossAttnDownBlock2D"] * lower,
        up_block_types=["CrossAttnUpBlock2D"] * lower + ["UpBlock2D"],
        cross_attention_dim=values.text_encoder.hidden_size,
        attention_head_dim=section.attention_head_dim,
    )


def build_scheduler() -> DDIMScheduler:
    """Make the schedule of Stable Diffusion 1, with v-prediction (Salimans and Ho 2022)."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )


@dataclass(frozen=True)
class Pool:
    """Encoded pictures of one size and their captions."""

    moments: NDArray[np.float16]
    """(N, 2, C, H, W): mean and standard deviation of the posterior, times the scale of the latents."""
    input_ids: torch.Tensor
    """(N, L)."""


@torch.inference_mode()
def encode(
    values: Recipe, drawn: Sprites, vae: AutoencoderKL, words: CLIPTokenizer, resolution: int, indices: range
) -> Pool:
    """Compose and encode some of the pictures, each composed at the resolution."""
    moments: list[NDArray[np.float16]] = []
    captions: list[str] = []
    for first in tqdm(range(0, len(indices), ENCODED), desc=f"encode {resolution} px", unit="batches", mininterval=10):
        pairs = list(compose.pictures(values, drawn, indices[first : first + ENCODED], resolution))
        posterior = vae.encode(autoencoder.to_tensor(np.stack([pixels for pixels, _ in pairs]))).latent_dist
        both = torch.stack([posterior.mean, posterior.std], 1) * vae.config["scaling_factor"]
        moments.append(both.to(torch.float16).numpy())
        captions += [caption for _, caption in pairs]
    return Pool(np.concatenate(moments), text_encoder.tokenize(words, captions))


def fingerprint(values: Recipe, vae: AutoencoderKL, drawn: Sprites) -> str:
    """Give a name to everything that the encoded pool depends on."""
    drawing = values.model_dump_json(
        exclude={"autoencoder", "packages", "denoiser", "subjects", "text_encoder", "scorer", "judge", "quality"}
    )
    size = (values.denoiser.pool, values.text_encoder.vocab_size, values.text_encoder.max_length)
    digest = hashlib.sha256(f"{drawing} {size}".encode())
    digest.update(drawn.pixels.tobytes())
    for value in vae.state_dict().values():
        digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def encode_pool(
    values: Recipe,
    drawn: Sprites,
    vae: AutoencoderKL,
    words: CLIPTokenizer,
    resolution: int,
    folder: Path,
    group: Group = ALONE,
) -> Pool:
    """Encode the whole pool once, each process a part of it; a pool that is there already is read."""
    key = fingerprint(values, vae, drawn)
    files = [folder / f"pool-{resolution}-{key}-{rank}-{group.size}.pt" for rank in range(group.size)]
    count, mine = values.denoiser.pool, files[group.rank]
    if not mine.exists():
        indices = range(count * group.rank // group.size, count * (group.rank + 1) // group.size)
        part = encode(values, drawn, vae, words, resolution, indices)
        loop.save(mine, {"moments": torch.from_numpy(part.moments), "input_ids": part.input_ids})
    group.wait()
    parts = [state for file in files if (state := loop.load(file)) is not None]
    moments = torch.cat([state["moments"] for state in parts]).numpy()
    return Pool(moments, torch.cat([state["input_ids"] for state in parts]))


def min_snr_weights(alphas_cumprod: torch.Tensor, timesteps: torch.Tensor, gamma: float) -> torch.Tensor:
    """Give the loss weight of each row, (B,), as the training of a subject does; gamma 0: all weights are 1."""
    return training_loss.min_snr_weights("v_prediction", alphas_cumprod[timesteps], gamma or None)


def loss_of(
    unet: UNet2DConditionModel,
    encoder: CLIPTextModel,
    scheduler: DDIMScheduler,
    pool: Pool,
    section: Denoiser,
    batch_size: int,
    empty_ids: torch.Tensor,
    generator: torch.Generator,
) -> torch.Tensor:
    """Draw rows, noise and timesteps, and give the weighted mean of the squared errors of v."""
    device = unet.device
    rows = torch.randint(len(pool.moments), (batch_size,), generator=generator)
    moments = torch.from_numpy(pool.moments[rows.numpy()]).float()
    mean, std = moments[:, 0], moments[:, 1]
    latents = mean + std * torch.randn(mean.shape, generator=generator)
    noise = torch.randn(latents.shape, generator=generator)
    steps: int = scheduler.config["num_train_timesteps"]
    timesteps = torch.randint(steps, (batch_size,), generator=generator)
    dropped = torch.rand(batch_size, 1, generator=generator) < section.caption_dropout
    input_ids = torch.where(dropped, empty_ids, pool.input_ids[rows])
    noisy_latents = scheduler.add_noise(latents, noise, timesteps).contiguous(memory_format=torch.channels_last)
    target = scheduler.get_velocity(latents, noise, timesteps).to(device)
    with torch.no_grad():
        hidden = encoder(input_ids.to(device)).last_hidden_state
    with loop.autocast(device, section.mixed_precision):
        pred = unet(noisy_latents.to(device), timesteps.to(device), hidden).sample
    weights = min_snr_weights(scheduler.alphas_cumprod, timesteps, section.snr_gamma).to(device)
    loss: torch.Tensor = (weights * (pred.float() - target).square().mean(dim=(1, 2, 3))).mean()
    return loss


def work_of(section: Denoiser) -> list[float]:
    """Give the work of each phase, in pixels."""
    return [float(phase.rows * phase.resolution**2) for phase in section.phases]


def phase_at(section: Denoiser, share: float) -> int:
    """Give the number of the phase at a share of all work."""
    work = work_of(section)
    ends = np.cumsum(work) / sum(work)
    return min(int(np.searchsorted(ends, share, side="right")), len(work) - 1)


class Trainer:
    """The UNet in training, its average, and how far it is; the text encoder stays as it is."""

    def __init__(
        self,
        values: Recipe,
        words: CLIPTokenizer,
        encoder: CLIPTextModel,
        latent_size: int,
        minutes: float | None = None,
        group: Group = ALONE,
    ) -> None:
        self.group, self.latent_size = group, latent_size
        self.section = section = values.denoiser
        torch.manual_seed(section.seed)
        device = loop.device(group.size)
        self.encoder = encoder.requires_grad_(False).eval().to(device)
        self.unet = build_unet(values, latent_size).to(device=device, memory_format=torch.channels_last)
        self.parameters = list(self.unet.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=section.learning_rate, weight_decay=1e-2, fused=True)
        self.average = loop.Average({"unet": self.unet}, section.ema_decay)
        self.scheduler = build_scheduler()
        self.progress = loop.Progress(sum(work_of(section)), minutes)
        self.step = 0
        self.rows = 0
        self.empty_ids = text_encoder.tokenize(words, [""])

    def train_step(self, pool: Pool, batch_size: int, rate: float) -> float:
        """Make one step of this process alone; give its loss.

        The random numbers depend on the seed, the step and the process alone.
        """
        section, group = self.section, self.group
        for each in self.optimizer.param_groups:
            each["lr"] = rate
        generator = torch.Generator().manual_seed((section.seed * 1_000_003 + self.step) * group.size + group.rank)
        rows = group.part(batch_size)
        loss = loss_of(self.unet, self.encoder, self.scheduler, pool, section, rows, self.empty_ids, generator)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.parameters, section.max_grad_norm)
        self.optimizer.step()
        self.step += 1
        self.rows += batch_size
        return loss.item()

    def train_round(self, pool: Pool, phase: Phase, share: float) -> float:
        """Make some steps at a share of the training, average the weights of all processes; give the mean loss.

        Averaging weights now and then, not gradients always, is local SGD (Stich 2019); one process alone trains as
        usual.
        """
        section, losses = self.section, []
        for _ in range(section.round_steps):
            rate = loop.rate_at(
                share, self.step, section.learning_rate, section.final_learning_rate, section.warmup_steps
            )
            losses.append(self.train_step(pool, phase.batch_size, rate))
        self.group.average([p.data for p in self.parameters])
        if self.group.leads:
            self.average.update(section.round_steps)
        self.progress.add(section.round_steps * phase.batch_size * phase.resolution**2)
        return sum(losses) / len(losses)

    def start_from(self, folder: Path) -> None:
        """Take the UNet of a pipeline; the optimizer starts anew."""
        self.unet.load_state_dict(UNet2DConditionModel.from_pretrained(folder / "unet").state_dict())
        self.average = loop.Average({"unet": self.unet}, self.section.ema_decay)

    def save(self, path: Path) -> None:
        """Write everything that a continued training needs."""
        state = {
            "unet": self.unet.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.state_dict(),
            "work": self.progress.work,
            "elapsed_s": self.progress.elapsed_s,
            "step": self.step,
            "rows": self.rows,
        }
        loop.save(path, state)

    def load(self, path: Path) -> bool:
        """Continue from a checkpoint; say whether there was one."""
        if (state := loop.load(path)) is None:
            return False
        self.unet.load_state_dict(state["unet"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average.load_state_dict(state["average"])
        self.progress.work, self.progress.elapsed_s = state["work"], state["elapsed_s"]
        self.step, self.rows = state["step"], state["rows"]
        return True


def train(
    trainer: Trainer,
    pool_of: Callable[[int], Pool],
    checkpoint: Path,
    export: Callable[[Trainer], None] = lambda _: None,
    export_minutes: float = 10,
) -> None:
    """Train through the phases to the end of the work or of the minutes, continuing from the checkpoint.

    `pool_of` gives the pool of a resolution; `export` is called now and then and at the end.
    """
    trainer.load(checkpoint)
    checkpoints, exports = loop.Every(4), loop.Every(export_minutes)
    current, pool, smooth = -1, None, None
    group, section = trainer.group, trainer.section
    bar = tqdm(desc="denoiser", unit="rows", initial=trainer.rows, mininterval=10, disable=not group.leads)
    while (share := group.agree(trainer.progress.share)) < 1:
        if (number := phase_at(section, share)) != current:
            current, phase = number, section.phases[number]
            pool = pool_of(phase.resolution)
        assert pool is not None
        loss = trainer.train_round(pool, phase, share)
        smooth = loss if smooth is None else 0.95 * smooth + 0.05 * loss
        bar.update(trainer.rows - bar.n)
        bar.set_postfix(px=phase.resolution, share=f"{share:.3f}", loss=f"{smooth:.4f}", refresh=False)
        if group.leads and checkpoints.due():
            trainer.save(checkpoint)
        if group.leads and exports.due():
            export(trainer)
    bar.close()
    if group.leads:
        trainer.save(checkpoint)
        export(trainer)
    group.wait()


def assemble(values: Recipe, trainer: Trainer, vae: AutoencoderKL, words: CLIPTokenizer) -> StableDiffusionPipeline:
    """Put the averaged weights into a pipeline."""
    unet = build_unet(values, trainer.latent_size).eval()
    unet.load_state_dict(trainer.average.weights["unet"])
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=trainer.encoder,
        tokenizer=words,
        unet=unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def publish(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    """Write the pipeline so that a reader sees the old part or the new one, and keep the other files there.

    The UNet and the autoencoder are stored in fp16. The text encoder is small and stays in fp32: transformers loads a
    model in the type of its file, and one fp16 part would not fit the fp32 others.
    """
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    pipeline.unet.half()
    pipeline.vae.half()
    pipeline.save_pretrained(part, safe_serialization=True)
    folder.mkdir(parents=True, exist_ok=True)
    for item in part.iterdir():
        old = folder / (item.name + ".old")
        if (place := folder / item.name).exists():
            place.rename(old)
        item.rename(place)
        if old.is_dir():
            shutil.rmtree(old)
        else:
            old.unlink(missing_ok=True)
    part.rmdir()


def describe(trainer: Trainer, vae: AutoencoderKL, start: Path | None) -> dict[str, float]:
    """Say how the model was trained, for its card; rows and minutes include those of the start."""
    state = loop.load(autoencoder.CHECKPOINT) or {}
    before: dict[str, float] = {"rows": 0, "minutes": 0.0}
    if start is not None and (start / TRAINING).exists():
        before = json.loads((start / TRAINING).read_text(encoding="utf-8"))
    return {
        "rows": trainer.rows + before["rows"],
        "rows_before": before["rows"],
        "minutes": trainer.progress.elapsed_s / 60 + before["minutes"],
        "share": trainer.progress.share,
        "parameters": sum(p.numel() for part in (trainer.unet, trainer.encoder) for p in part.parameters()) / 1e6,
        "vae_parameters": sum(p.numel() for p in vae.parameters()) / 1e6,
        "vae_rows": int(state.get("rows", before.get("vae_rows", 0))),
        "vae_minutes": state.get("elapsed_s", 60 * before.get("vae_minutes", 0.0)) / 60,
    }


def work(group: Group, minutes: float | None, export_minutes: float, start: Path | None) -> None:
    """Train, and export the pipeline now and then."""
    values, drawn = recipe.load(), sprites.load(sprites.FOLDER)
    given = None if text_encoder.FOLDER.exists() else start  # a taught text encoder comes with its tokenizer
    words = CLIPTokenizer.from_pretrained(tokenizer.FOLDER if given is None else given / "tokenizer")
    vae_folder = autoencoder.FOLDER / "vae" if start is None else start / "vae"

    def open_vae() -> AutoencoderKL:
        return AutoencoderKL.from_pretrained(vae_folder).eval()

    vae = open_vae().to(memory_format=torch.channels_last)
    factor = 2 ** (len(values.autoencoder.block_out_channels) - 1)
    encoder = CLIPTextModel.from_pretrained(text_encoder.FOLDER if given is None else given / "text_encoder")
    trainer = Trainer(values, words, encoder, values.resolution // factor, minutes, group)
    if start is not None:
        trainer.start_from(start)

    def export(state: Trainer) -> None:
        copy = open_vae()
        publish(assemble(values, state, copy, words), recipe.MODEL)
        text = json.dumps(describe(state, copy, start), indent=1)
        (recipe.MODEL / TRAINING).write_text(text + "\n", encoding="utf-8")

    def pool_of(resolution: int) -> Pool:
        return encode_pool(values, drawn, vae, words, resolution, FOLDER, group)

    train(trainer, pool_of, CHECKPOINT, export, export_minutes)


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, help="end by then, the rate falling in time")
    parser.add_argument("--export-minutes", type=float, default=10.0)
    parser.add_argument("--processes", type=int, default=1, help="that share each batch, one thread each")
    parser.add_argument("--start", type=Path, help="a pipeline of this recipe whose UNet and autoencoder to begin with")
    arguments = parser.parse_args()
    job = functools.partial(
        work, minutes=arguments.minutes, export_minutes=arguments.export_minutes, start=arguments.start
    )
    parallel.run(job, arguments.processes)


if __name__ == "__main__":
    main()
