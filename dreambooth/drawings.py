"""A folder of drawn pictures: each is drawn once, kept as soon as it is finished, and used again only if unchanged.

A picture is a function of its prompt, its seed, and the batch it stands in, so that a stopped drawing continues with
the same bits. C latent channels, h and w height and width of the latents.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from dreambooth.errors import PriorError
from dreambooth.folders import code_hash, sha256_of, write_file
from dreambooth.images import png_bytes
from dreambooth.locks import only_one
from dreambooth.models import Model, library_versions
from dreambooth.progress import progress_bar
from dreambooth.sampling import Drawing, SamplerSettings, draw_batch

INDEX = "index.jsonl"
# What can change the bits of a picture (tests/test_pipeline.py compares with imports).
_CODE = ("adapters", "drawings", "families", "lora", "models", "rng", "sampling")
_FLAT = 2.0  # standard deviation of the levels of 255 under which no colour channel shows anything


@dataclass(frozen=True)
class Picture:
    """What is to be drawn."""

    prompt: str
    seeds: tuple[int, ...]
    """The first one draws it; the next ones do where a flat picture is rejected."""


@dataclass(frozen=True)
class DrawingReport:
    """What it took to have all pictures."""

    reused: int
    generated: int
    rejected: int = 0
    """Flat ones that came before those that are there, whenever they were drawn."""

    def __str__(self) -> str:
        rejected = f", {self.rejected} rejected on the way" if self.rejected else ""
        return f"{self.reused} reused, {self.generated} generated{rejected}"


def drawing_key(about: Mapping[str, Any]) -> str:
    """Return the name of a folder of pictures: equal keys, equal pictures, to the last bit on one machine.

    Args:
        about: hashes of the weights, settings of the sampler, precision, and device (`models.device_name`); versions
            of the libraries and the code that draws are added.
    """
    return sha256_of({**about, "versions": library_versions(), "code": code_hash(_CODE)})


def ensure_drawings(
    folder: Path,
    pictures: Sequence[Picture],
    load: Callable[[], Model],
    settings: SamplerSettings,
    description: str,
    count: int | None = None,
    reject_flat: bool = False,
) -> DrawingReport:
    """Make a folder hold the pictures, drawing only those that are missing, changed, or of another prompt or seed.

    One process draws, another that wants the same folder waits for it. Each picture is kept when it is finished, so
    that a stop loses the one at hand. Batches always stand as they would in a straight run: kernels choose their
    order of summation by the size of a batch, and a smaller one would change the last bits.

    Args:
        folder: of one `drawing_key`; made if need be.
        pictures: N of them, numbered from 0; batch after batch of `settings.batch_size`.
        load: returns the model; is not called when nothing is missing.
        settings: of the sampler.
        description: of the pictures in words, for the progress bar and for messages.
        count: how many of the N are wanted; the others only fill the last batch. None: all.
        reject_flat: draw a picture that shows nothing again from its next seed.

    Raises:
        PriorError: a picture that stays flat with all of its seeds.
    """
    say = lambda line: tqdm.write(f"{description}: {line}")  # noqa: E731
    with only_one(folder, ".drawing", f"the drawing of {folder}", wait=say):
        store = _Store(folder, pictures)
        wanted = range(len(pictures) if count is None else count)
        missing = [i for i in wanted if not store.holds(i)]
        if missing:
            model = load()
            with progress_bar(len(missing), description, unit="image") as bar:
                for start in range(0, len(pictures), settings.batch_size):
                    batch = range(start, min(start + settings.batch_size, len(pictures)))
                    if todo := [i for i in missing if i in batch]:
                        _draw_missing(store, batch, todo, model, settings, reject_flat, bar)
    return DrawingReport(store.found, len(missing), sum(map(store.rejected, wanted)))


def read_pngs(folder: Path, count: int) -> list[bytes]:
    """Return the first `count` pictures of a folder as PNG."""
    return [_png(folder, i).read_bytes() for i in range(count)]


def read_latents(folder: Path, count: int) -> list[Tensor]:
    """Return the latents that the first `count` pictures were decoded from, each (C, h, w) float32."""
    return [safetensors.torch.load(_latents(folder, i).read_bytes())["latents"] for i in range(count)]


def is_flat(image: Image.Image) -> bool:
    """Whether a picture shows nothing: black, white or one colour, which is what NaN latents decode to.

    Each channel is looked at: red on green may be of one grey. The faintest of 200 class images of the bundled model
    has 8.4 in its strongest channel, 3.9 in grey.
    """
    return bool(np.asarray(image.convert("RGB"), dtype=np.float32).std(axis=(0, 1)).max() < _FLAT)


class _Store:
    """The files of a folder, and the index that says what they should be: a line for each picture, the last counts."""

    def __init__(self, folder: Path, pictures: Sequence[Picture]) -> None:
        self.folder, self.pictures, self.found = folder, pictures, 0
        self._entries: dict[int, dict[str, Any]] = {}
        for torn in folder.glob(".[0-9]*"):  # whoever wrote it was killed: this process holds the lock
            torn.unlink()
        index = folder / INDEX
        for line in index.read_text(encoding="utf-8").splitlines() if index.exists() else ():
            try:
                entry = json.loads(line)
                self._entries[entry["i"]] = entry
            except (ValueError, KeyError, TypeError):
                continue  # torn by a stop: its picture is drawn again

    def holds(self, i: int) -> bool:
        """Whether picture i is there, of this prompt and these seeds, and unchanged."""
        entry = self._entries.get(i, {})
        try:
            hashes = [_sha256(path(self.folder, i).read_bytes()) for path in (_png, _latents)]
        except FileNotFoundError:
            return False
        whole = entry.get("of") == self._of(i) and hashes == [entry.get("png"), entry.get("latents")]
        self.found += whole
        return whole

    def rejected(self, i: int) -> int:
        """Return how many pictures were rejected before picture i, which is there."""
        return int(self._entries[i]["attempt"])

    def keep(self, i: int, drawing: Drawing, attempt: int) -> None:
        """Write a picture, then its line."""
        png, latents = png_bytes(drawing.image), safetensors.torch.save({"latents": drawing.latents.contiguous()})
        write_file(_png(self.folder, i), png)
        write_file(_latents(self.folder, i), latents)
        entry = {"i": i, "of": self._of(i), "png": _sha256(png), "latents": _sha256(latents), "attempt": attempt}
        with (self.folder / INDEX).open("ab") as file:  # a torn line before it is ended by the newline in front
            file.write(f"\n{json.dumps(entry)}\n".encode())
            file.flush()
            os.fsync(file.fileno())
        self._entries[i] = entry

    def _of(self, i: int) -> str:
        return sha256_of([self.pictures[i].prompt, *self.pictures[i].seeds])


def _draw_missing(
    store: _Store,
    batch: range,
    todo: list[int],
    model: Model,
    settings: SamplerSettings,
    reject_flat: bool,
    bar: "tqdm[Any]",
) -> None:
    """Draw a whole batch, decode and keep the pictures in `todo`.

    Raises:
        PriorError: one stays flat with all of its seeds.
    """
    wanted = [store.pictures[i] for i in batch]
    attempts = min(len(picture.seeds) for picture in wanted)
    for attempt in range(attempts):
        prompts, seeds = [one.prompt for one in wanted], [one.seeds[attempt] for one in wanted]
        flat = []
        drawings = draw_batch(model, prompts, seeds, settings, wanted=[i - batch.start for i in todo])
        for i, drawing in zip(todo, drawings, strict=True):
            if reject_flat and is_flat(drawing.image):
                flat.append(i)
            else:
                store.keep(i, drawing, attempt)
                bar.update()
        todo = flat
        if not todo:
            return
    raise PriorError(
        f"{bar.desc.removesuffix(': ')} {', '.join(map(str, todo))} of {store.pictures[todo[0]].prompt!r} stay black "
        f"or flat after {attempts} seeds each; set base.inference_dtype to float32, or look whether the base model "
        "draws anything"
    )


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _png(folder: Path, i: int) -> Path:
    return folder / f"{i:05d}.png"


def _latents(folder: Path, i: int) -> Path:
    return folder / f"{i:05d}.safetensors"
