"""The shared store of class images: drawn once from the untouched model, used by every subject of the class.

The key of a store is everything that an image depends on, so nothing stale is ever reused and nothing is drawn
twice. Image i depends on (seed, i) alone: more images later, or the same after a stop, continue by index.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import safetensors.torch
import torch

from dreambooth import rng
from dreambooth.dataset import Posterior, as_posterior
from dreambooth.drawings import DrawingReport, Picture, drawing_key, ensure_drawings, read_latents, read_pngs
from dreambooth.families import Sizes
from dreambooth.models import Model
from dreambooth.params import Prior
from dreambooth.sampling import settings_of

MAX_ATTEMPTS = 5


def prior_key(base_hash: str, prompts: Sequence[str], settings: Prior, resolution: int, dtype: str, device: str) -> str:
    """Return the key of a store: equal keys, equal images, to the last bit on one machine.

    Args:
        base_hash: of the model's files.
        prompts: of the class.
        settings: of the sampler; the number of images is left out.
        resolution: side of the pictures in pixels.
        dtype: of the drawing.
        device: from `models.device_name`.
    """
    about = {"base": base_hash, "prompts": list(prompts), "resolution": resolution, "dtype": dtype, "device": device}
    return drawing_key(
        about | {"settings": settings.model_dump(exclude={"num_class_images", "prompts", "kind", "folder"})}
    )


def ensure_class_images(
    store: Path, prompts: Sequence[str], load: Callable[[], Model], settings: Prior, resolution: int
) -> DrawingReport:
    """Make the store hold the first `num_class_images` images, drawing only those that are missing or changed.

    One process draws, another that wants the same class waits for it. A stop loses the image at hand.

    Args:
        store: folder of one `prior_key`.
        prompts: of the class; image i shows number i of them, and again from the first.
        load: returns the untouched base; is not called when nothing is missing.
        settings: of the prior.
        resolution: side of the pictures in pixels.

    Raises:
        PriorError: an image that stays black, flat or not finite after several seeds.
    """
    count, size = settings.num_class_images, settings.batch_size
    whole = -(-count // size) * size  # the last batch is a whole one too, so that 100 images can become 200
    pictures = [
        Picture(
            prompts[i % len(prompts)],
            tuple(rng.derive_seed(settings.seed, "class-image", i, k) for k in range(MAX_ATTEMPTS)),
        )
        for i in range(whole)
    ]
    sampler = settings_of(settings, resolution)
    return ensure_drawings(store, pictures, load, sampler, "class images", count=count, reject_flat=True)


def save_class_latents(path: Path, posteriors: Sequence[Posterior], sizes: Sequence[Sizes]) -> None:
    """Write latents (N, C, h, w), their spread, and the sizes of the pictures (N, 6), in their order."""
    tensors = {
        "latents": torch.stack([posterior.mean for posterior in posteriors]),
        "std": torch.stack([posterior.std for posterior in posteriors]),
        "sizes": torch.tensor(list(sizes)),
    }
    safetensors.torch.save_file(tensors, path)


def read_class_latents(path: Path) -> list[tuple[Posterior, Sizes]]:
    """Return what `save_class_latents` wrote."""
    tensors = safetensors.torch.load_file(path)
    rows = zip(tensors["latents"], tensors["std"], tensors["sizes"].tolist(), strict=True)
    return [(Posterior(mean, std), tuple(sizes)) for mean, std, sizes in rows]


def read_class_images(store: Path, count: int) -> tuple[list[bytes], list[Posterior]]:
    """Return the first `count` images of a store as PNG, and their latents."""
    return read_pngs(store, count), [as_posterior(latents) for latents in read_latents(store, count)]
