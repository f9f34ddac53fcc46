"""Draw pictures of a subject with its registered version, and lay them out on one sheet."""

import io
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreambooth.params import Params
from dreambooth.prompts import PLACEHOLDER, fill

AT_ONCE = 64  # pictures of one call, the limit of the model


@dataclass(frozen=True)
class Drawn:
    """The files that were written."""

    pictures: list[Path]
    sheet: Path


def full_prompts(params: Params, subject_id: str, prompts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Put the subject's words where a prompt has {}; return the prompts, and those that do not name the subject."""
    subject = params.subject(subject_id)
    words = f"{subject.identifier} {params.class_of(subject_id).class_noun}"
    nameless = [prompt for prompt in prompts if PLACEHOLDER not in prompt and subject.identifier not in prompt.split()]
    return list(dict.fromkeys(fill(prompt, words) for prompt in prompts)), nameless


def draw(model: Any, prompts: Sequence[str], count: int, options: dict[str, Any], out: Path) -> Drawn:
    """Draw each prompt with `count` seeds and write <out>/<prompt>-<seed>.png and a contact sheet.

    Args:
        model: what `dreambooth.registry.load` returns.
        prompts: complete sentences.
        count: pictures a prompt; picture i has the seed `options["seed"]` + i.
        options: parameters of the model; seed among them.
        out: made if need be.
    """
    from PIL import Image

    from dreambooth.grid import grid

    out.mkdir(parents=True, exist_ok=True)
    seeds = range(options["seed"], options["seed"] + count)
    written: list[Path] = []
    rows: list[list[Image.Image | None]] = []
    for prompt, slug in zip(prompts, slugs(prompts), strict=True):
        pictures = _predict(model, prompt, count, options)
        rows.append([Image.open(io.BytesIO(picture), formats=("PNG",)) for picture in pictures])
        for seed, picture in zip(seeds, pictures, strict=True):
            written.append(out / f"{slug}-{seed}.png")
            written[-1].write_bytes(picture)
    sheet = out / "sheet.png"
    grid(rows, list(prompts), [f"seed {seed}" for seed in seeds]).save(sheet)
    return Drawn(written, sheet)


def slugs(prompts: Sequence[str]) -> list[str]:
    """Return a file name for each prompt: its letters and digits, told apart by a number where they are the same."""
    names: list[str] = []
    for prompt in prompts:
        plain = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode().lower()
        slug = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:60].strip("-") or "picture"
        names.append(slug if slug not in names else f"{slug}-no{len(names) + 1}")
    return names


def _predict(model: Any, prompt: str, count: int, options: dict[str, Any]) -> list[bytes]:
    pictures: list[bytes] = []
    while len(pictures) < count:
        part = min(AT_ONCE, count - len(pictures))
        now = {**options, "seed": options["seed"] + len(pictures)}
        pictures += model.predict({"prompt": [prompt] * part}, params=now)
    return pictures
