"""Encode each photo once: a content-addressed cache of what the autoencoder makes of it.

The mean and the standard deviation are kept, not one draw, so that training draws a fresh latent at every step as it
would without a cache. N pictures, C latent channels, h and w height and width of the latents.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from safetensors import SafetensorError

from dreambooth.dataset import Posterior
from dreambooth.folders import sha256_of, write_file
from dreambooth.models import Model

TRANSFORM = "[-1, 1]"


def encode_images(
    load: Callable[[], Model], images: Sequence[Image.Image], vae_hash: str, device: torch.device, cache: Path
) -> tuple[list[Posterior], int]:
    """Return the posterior of each picture, from the cache where it is known.

    One picture is encoded at a time: then its latents do not depend, to the last bit, on which others came along.

    Args:
        load: returns a model in float32, whose autoencoder encodes what the cache lacks; is called for that alone.
        images: N RGB pictures, each of the size that it is trained at: squares, but for `train.aspect_buckets`.
        vae_hash: sha256 of the autoencoder's files.
        device: of the model.
        cache: folder of the cache; photos of people leave traces here, so it belongs to the project.

    Returns:
        N posteriors, and how many of them were in the cache.
    """
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    posteriors, reused = [], 0
    for image in images:
        path = cache / f"{cache_key(image, vae_hash, device)}.safetensors"
        posterior = _read(path)
        reused += posterior is not None
        if posterior is None:
            posterior = encode_image(load(), image)
            write_file(path, safetensors.torch.save({"mean": posterior.mean, "std": posterior.std}))
        posteriors.append(posterior)
    return posteriors, reused


@torch.inference_mode()
def encode_image(model: Model, image: Image.Image) -> Posterior:
    """Return the posterior of one RGB picture, (C, h, w), scaled to the units of the UNet."""
    pixels = torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
    distribution = model.vae.encode(pixels.to(model.device, model.vae.dtype)).latent_dist
    scale, shift = model.vae.config.scaling_factor, model.vae.config.get("shift_factor") or 0.0
    mean, std = (distribution.mean.float() - shift) * scale, distribution.std.float() * scale
    return Posterior(mean[0].cpu().contiguous().clone(), std[0].cpu().contiguous().clone())


def cache_key(image: Image.Image, vae_hash: str, device: torch.device) -> str:
    """Return the sha256 of all that the latents depend on."""
    pixels = sha256_of([image.size, image.tobytes().hex()])
    return sha256_of([pixels, TRANSFORM, vae_hash, str(torch.float32), device.type, torch.__version__])


def _read(path: Path) -> Posterior | None:
    """Return a cached posterior; a torn file counts as none."""
    try:
        tensors = safetensors.torch.load(path.read_bytes())
        return Posterior(tensors["mean"], tensors["std"])
    except (FileNotFoundError, SafetensorError, KeyError):
        return None
