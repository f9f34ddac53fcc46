"""The shared store of class images: drawn once from the untouched model, used by every subject of the class.

The key of a store is everything that an image depends on, so nothing stale is ever reused and nothing is drawn
twice. Image i depends on (seed, i) alone: more images later, or the same after a stop, continue by index. C latent
channels, h and w height and width of the latents.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
from filelock import FileLock, Timeout
from PIL import Image
from tqdm import tqdm

from dreambooth import rng
from dreambooth.dataset import Posterior
from dreambooth.errors import PriorError
from dreambooth.folders import sha256_of, write_file
from dreambooth.images import png_bytes
from dreambooth.models import Model, library_versions
from dreambooth.params import Prior
from dreambooth.progress import progress_bar
from dreambooth.sampling import Drawing, SamplerSettings, batches, draw_batch, settings_of

INDEX = "index.json"
MAX_ATTEMPTS = 5
_FLAT = 2.0  # standard deviation of the grey levels of 255 under which a picture shows nothing


@dataclass(frozen=True)
class PriorReport:
    """What it took to have all class images."""

    reused: int
    generated: int
    rejected: int

    def __str__(self) -> str:
        rejected = f", {self.rejected} rejected and drawn again" if self.rejected else ""
        return f"{self.reused} reused, {self.generated} generated{rejected}"


def prior_key(base_hash: str, prompt: str, settings: Prior, resolution: int, dtype: str, device: str) -> str:
    """Return the key of a store: equal keys, equal images, to the last bit on one machine.

    Args:
        base_hash: of the model's files.
        prompt: of the class.
        settings: of the sampler; the number of images is left out.
        resolution: side of the pictures in pixels.
        dtype: of the drawing.
        device: from `models.device_name`.
    """
    return sha256_of(
        {
            "base": base_hash,
            "prompt": prompt,
            "settings": settings.model_dump(exclude={"num_class_images"}),
            "resolution": resolution,
            "dtype": dtype,
            "device": device,
            "versions": library_versions(),
        }
    )


def ensure_class_images(
    store: Path, prompt: str, load: Callable[[], Model], settings: Prior, resolution: int
) -> PriorReport:
    """Make the store hold the first `num_class_images` images, drawing only those that are missing or damaged.

    One process draws, another that wants the same class waits for it. A stop loses the batch at hand at most.

    Args:
        store: folder of one `prior_key`.
        prompt: of the class.
        load: returns the untouched base; is not called when nothing is missing.
        settings: of the prior.
        resolution: side of the pictures in pixels.

    Raises:
        PriorError: an image that stays black, flat or not finite after several seeds.
    """
    store.mkdir(mode=0o700, parents=True, exist_ok=True)
    count, rejected = settings.num_class_images, 0
    with _lock(store):
        index = _read_index(store)
        missing = {i for i in range(count) if not _is_valid(store, index.get(str(i)), i)}
        if missing:
            model, sampler = load(), settings_of(settings, resolution)
            with progress_bar(len(missing), "class images", unit="image") as bar:
                for block in batches(count, settings.batch_size):
                    if todo := sorted(missing.intersection(block)):
                        rejected += _draw_block(store, index, block, todo, prompt, model, settings.seed, sampler)
                        bar.update(len(todo))
    return PriorReport(reused=count - len(missing), generated=len(missing), rejected=rejected)


def read_class_images(store: Path, count: int) -> tuple[list[bytes], list[Posterior]]:
    """Return the first `count` images of a store as PNG, and their latents."""
    images = [_image_path(store, i).read_bytes() for i in range(count)]
    latents = [safetensors.torch.load(_latents_path(store, i).read_bytes())["latents"] for i in range(count)]
    return images, [as_posterior(latent) for latent in latents]


def as_posterior(latents: Any) -> Posterior:
    """Return latents (C, h, w) of the sampler as a distribution without spread: nothing is encoded again."""
    return Posterior(latents, latents.new_zeros(latents.shape))


def is_flat(image: Image.Image) -> bool:
    """Whether a picture shows nothing: black, white or one colour, which is what NaN latents decode to."""
    return float(np.asarray(image.convert("L"), dtype=np.float32).std()) < _FLAT


def _draw_block(
    store: Path,
    index: dict[str, Any],
    block: range,
    todo: Sequence[int],
    prompt: str,
    model: Model,
    seed: int,
    sampler: SamplerSettings,
) -> int:
    """Draw a whole batch and keep the images in `todo`; return how many were rejected on the way.

    The batch is always whole: kernels choose their order of summation by its size, so a smaller one would change the
    last bits of an image.
    """
    rejected = 0
    for attempt in range(MAX_ATTEMPTS):
        seeds = [rng.derive_seed(seed, "class-image", i, attempt) for i in block]
        drawings = dict(zip(block, draw_batch(model, [prompt] * len(block), seeds, sampler), strict=True))
        good = [i for i in todo if not is_flat(drawings[i].image)]
        for i in good:
            index[str(i)] = _write_image(store, i, drawings[i]) | {"attempt": attempt}
        write_file(store / INDEX, json.dumps(index, indent=1).encode())
        todo = [i for i in todo if i not in good]
        rejected += len(todo)
        if not todo:
            return rejected
    raise PriorError(
        f"class images {', '.join(map(str, todo))} of {prompt!r} stay black or flat after {MAX_ATTEMPTS} seeds each; "
        "set base.inference_dtype to float32, or look whether the base model draws anything"
    )


def _write_image(store: Path, i: int, drawing: Drawing) -> dict[str, str]:
    png, latents = png_bytes(drawing.image), safetensors.torch.save({"latents": drawing.latents.contiguous()})
    write_file(_image_path(store, i), png)
    write_file(_latents_path(store, i), latents)
    return {"png": hashlib.sha256(png).hexdigest(), "latents": hashlib.sha256(latents).hexdigest()}


def _is_valid(store: Path, entry: dict[str, Any] | None, i: int) -> bool:
    """Whether image i and its latents are there and unchanged."""
    if entry is None:
        return False
    try:
        png, latents = _image_path(store, i).read_bytes(), _latents_path(store, i).read_bytes()
    except FileNotFoundError:
        return False
    hashes = hashlib.sha256(png).hexdigest(), hashlib.sha256(latents).hexdigest()
    return hashes == (entry["png"], entry["latents"])


def _read_index(store: Path) -> dict[str, Any]:
    try:
        index: dict[str, Any] = json.loads((store / INDEX).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return index


def _lock(store: Path) -> FileLock:
    """Hold the store; say so when another process draws into it, and wait."""
    lock = FileLock(store / ".lock")
    try:
        lock.acquire(timeout=0)
        lock.release()
    except Timeout:
        tqdm.write(f"prior: another process draws into {store}; waiting for it")
    return lock


def _image_path(store: Path, i: int) -> Path:
    return store / f"{i:05d}.png"


def _latents_path(store: Path, i: int) -> Path:
    return store / f"{i:05d}.safetensors"
