"""Draw pictures: prompts and seeds in, images out; one generator an image, guidance in one batched forward pass.

B images of a batch, C latent channels, h and w height and width of the latents, L tokens, D text width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from dreambooth.errors import ModelError
from dreambooth.families import Text, condition, drawn_sizes, encode_text
from dreambooth.models import Model
from dreambooth.params import Evaluate, Prior, scheduler_fault
from dreambooth.progress import progress_bar

# By their classes in diffusers, whose import takes seconds. All of them deterministic: the only noise of an
# image is its first latent, so that a seed is a picture.
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "dpmsolver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),  # Lu et al. 2022, 2M
    "ddim": ("DDIMScheduler", {"clip_sample": False}),  # Song et al. 2021, eta 0
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),  # Liu et al. 2022, as Stable Diffusion uses it
    "euler": ("EulerDiscreteScheduler", {}),  # Karras et al. 2022, algorithm 2 without churn
}


@dataclass(frozen=True)
class SamplerSettings:
    """How pictures are drawn; the same settings, prompt and seed give the same picture."""

    scheduler: str
    num_inference_steps: int
    guidance_scale: float
    resolution: int
    negative_prompt: str = ""
    batch_size: int = 16


def settings_of(section: Prior | Evaluate, resolution: int) -> SamplerSettings:
    """Take the sampler's part out of a section of params.yaml."""
    names = {field.name for field in fields(SamplerSettings)}
    return SamplerSettings(resolution=resolution, **section.model_dump(include=names))


@dataclass(frozen=True)
class Drawing:
    """A picture and the latents it was decoded from, (C, h, w) float32 in units of the UNet, on the CPU."""

    image: Image.Image
    latents: Tensor


def draw(
    model: Model,
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: SamplerSettings,
    description: str | None = None,
) -> list[Image.Image]:
    """Draw one picture for each prompt and seed.

    Args:
        model: on its device.
        prompts: N sentences.
        seeds: N seeds, one for each prompt.
        settings: of the sampler.
        description: shows a progress bar under this name; None shows none.
    """
    images: list[Image.Image] = []
    with progress_bar(len(prompts) * settings.num_inference_steps, description, unit="step") as bar:
        for start in range(0, len(prompts), settings.batch_size):
            batch = slice(start, start + settings.batch_size)
            images += [drawing.image for drawing in draw_batch(model, prompts[batch], seeds[batch], settings, bar)]
    return images


@torch.inference_mode()
def draw_batch(
    model: Model,
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: SamplerSettings,
    bar: "tqdm[Any] | None" = None,
    wanted: Sequence[int] | None = None,
) -> Iterator[Drawing]:
    """Draw up to a batch of pictures at once, one for each prompt and seed; yield each when it is decoded.

    Args:
        model: on its device.
        prompts: B sentences.
        seeds: B seeds.
        settings: of the sampler; its batch_size is not looked at.
        bar: is moved on by B at every step.
        wanted: which of the B to decode; None: all. The others only stand in the batch, whose size decides about the
            last bits.
    """
    scheduler = make_scheduler(settings.scheduler, model.scheduler_config)
    scheduler.set_timesteps(settings.num_inference_steps, device=model.device)
    guided = settings.guidance_scale != 1
    texts = [*[settings.negative_prompt] * len(prompts), *prompts] if guided else list(prompts)
    text = encode_prompts(model, texts)
    if guided and not settings.negative_prompt and model.zero_empty_prompt:
        text = without_text(text, len(prompts))
    how = condition(text, torch.tensor([drawn_sizes(settings.resolution)] * len(texts)))
    latents = first_latents(model, seeds, settings.resolution) * scheduler.init_noise_sigma
    done = 0
    for i, timestep in enumerate(scheduler.timesteps):
        rows = scheduler.scale_model_input(latents, timestep)
        rows = torch.cat([rows, rows]) if guided else rows
        model_pred = model.unet(rows.to(model.dtype), timestep, **how).sample.float()
        if guided:
            unconditional, conditional = model_pred.chunk(2)
            model_pred = guide(unconditional, conditional, settings.guidance_scale)
        latents = scheduler.step(model_pred, timestep, latents).prev_sample
        if bar is not None:  # PNDM takes one step more than it was asked for; the bar counts pictures x steps
            new = min(settings.num_inference_steps, i + 1) * len(seeds)
            bar.update(new - done)
            done = new
    for i in range(len(prompts)) if wanted is None else wanted:
        yield Drawing(decode(model, latents[i : i + 1])[0], latents[i].cpu())


def guide(unconditional: Tensor, conditional: Tensor, guidance_scale: float) -> Tensor:
    """Return u + s (c - u), classifier-free guidance (Ho & Salimans 2022; s = 1 + w there)."""
    return unconditional + guidance_scale * (conditional - unconditional)


def first_latents(model: Model, seeds: Sequence[int], resolution: int) -> Tensor:
    """Return (B, C, h, w) standard normal float32, each row drawn on the CPU from its own seed."""
    side = resolution // 2 ** (len(model.vae.config.block_out_channels) - 1)
    shape = (model.unet.config.in_channels, side, side)
    rows = [torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)) for seed in seeds]
    return torch.stack(rows).to(model.device)


def encode_prompts(model: Model, prompts: Sequence[str]) -> Text:
    """Return what the UNet reads of B prompts; a prompt that stands twice is encoded once."""
    unique = list(dict.fromkeys(prompts))
    text = encode_text(model.family, list(model.encoders.values()), tokenize(model, unique))
    return text.rows([unique.index(prompt) for prompt in prompts])


def without_text(text: Text, count: int) -> Text:
    """Put zeros where the first `count` rows stand: how SDXL was trained without a prompt."""
    embeds = torch.cat([torch.zeros_like(text.embeds[:count]), text.embeds[count:]])
    pooled = None if text.pooled is None else torch.cat([torch.zeros_like(text.pooled[:count]), text.pooled[count:]])
    return Text(embeds, pooled)


def tokenize(model: Model, prompts: Sequence[str]) -> list[Tensor]:
    """Return (B, L) input_ids for each text encoder, padded and cut to its tokenizer's length."""
    encoded = [
        tokenizer(
            list(prompts),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        for tokenizer in model.tokenizers
    ]
    return [one.input_ids.to(model.device) for one in encoded]


def decode(model: Model, latents: Tensor) -> list[Image.Image]:
    """Turn (B, C, h, w) latents in units of the UNet into B pictures.

    One at a time: the autoencoder needs many times the memory of the UNet. A picture that is not finite comes back
    black, and is rejected where it matters.
    """
    scale, shift = model.vae.config.scaling_factor, model.vae.config.get("shift_factor") or 0.0
    scaled = (latents / scale + shift).to(model.vae.dtype)
    pixels = torch.cat([model.vae.decode(row[None]).sample for row in scaled]).float().nan_to_num(-1)
    levels = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return [Image.fromarray(np.ascontiguousarray(array)) for array in levels.permute(0, 2, 3, 1).cpu().numpy()]


def make_scheduler(name: str, config: dict[str, Any]) -> Any:
    """Build a solver by name on the noise schedule of a model.

    Raises:
        ModelError: its class would leave out a part of that schedule.
    """
    import diffusers

    if fault := scheduler_fault(name, config):
        raise ModelError(fault)
    class_name, options = SCHEDULERS[name]
    return getattr(diffusers, class_name).from_config(config, **options)
