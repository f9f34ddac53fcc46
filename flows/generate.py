"""Draw pictures of a subject with its registered version, and lay them out on one sheet."""

import io
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreambooth.errors import PipelineError
from dreambooth.folders import read_text
from dreambooth.params import Params
from dreambooth.prompts import PLACEHOLDER, fill

PICTURES_PER_CALL = 64  # pictures of one call, the limit of the model


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


def read_prompts(path: Path) -> list[str]:
    """Read prompts, a line each; empty lines and those that begin with # are passed over.

    Raises:
        PipelineError: the file cannot be read, or holds no prompt.
    """
    try:
        lines = [line.strip() for line in read_text(path).splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise PipelineError(f"{path} cannot be read ({error}); write a prompt a line, in UTF-8") from None
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise PipelineError(f"{path} holds no prompt; write a prompt a line: a photo of {PLACEHOLDER} in space")
    return prompts


def draw_registered(
    root: Path,
    subject_id: str,
    prompts: Sequence[str],
    count: int,
    options: Mapping[str, Any],
    version: int | None = None,
    out: Path | None = None,
) -> Drawn:
    """Draw with a registered version: this one, else the champion, the challenger, the newest.

    Args:
        root: of the project.
        subject_id: of the subject.
        prompts: complete sentences.
        count: pictures a prompt.
        options: parameters of the model; those that are None are the model's own.
        version: of the registered model.
        out: else build/<id>/generated.

    Raises:
        RegistryError: there is no such version, or its files are not whole.
    """
    from dreambooth import versions

    found = versions.choose(root, subject_id, version)
    model = versions.load_found(root, found)
    given = {name: value for name, value in options.items() if value is not None}
    about = {"model": f"models:/{found.name}/{found.version}"}
    return draw(model, prompts, count, given, out or root / "build" / subject_id / "generated", about)


def draw(
    model: Any,
    prompts: Sequence[str],
    count: int,
    options: dict[str, Any],
    out: Path,
    provenance: Mapping[str, Any] | None = None,
) -> Drawn:
    """Draw each prompt with `count` seeds and write <out>/<prompt>-<seed>.png and a contact sheet.

    Args:
        model: what `dreambooth.registry.load` returns.
        prompts: complete sentences.
        count: pictures a prompt; picture i has the seed `options["seed"]` + i.
        options: parameters of the model; seed among them.
        out: made if need be.
        provenance: is added to what each PNG says about itself, such as the registered version.
    """
    from PIL import Image

    from dreambooth.grid import grid
    from dreambooth.images import png_bytes, read_provenance

    out.mkdir(parents=True, exist_ok=True)
    seeds = range(options["seed"], options["seed"] + count)
    written: list[Path] = []
    rows: list[list[Image.Image | None]] = []
    for prompt, slug in zip(prompts, slugs(prompts), strict=True):
        pictures = _predict(model, prompt, count, options)
        rows.append([Image.open(io.BytesIO(picture), formats=("PNG",)) for picture in pictures])
        for seed, picture, image in zip(seeds, pictures, rows[-1], strict=True):
            written.append(out / f"{slug}-{seed}.png")
            assert image is not None
            written[-1].write_bytes(png_bytes(image, read_provenance(picture) | dict(provenance or {})))
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
        part = min(PICTURES_PER_CALL, count - len(pictures))
        now = {**options, "seed": options["seed"] + len(pictures)}
        pictures += model.predict({"prompt": [prompt] * part}, params=now)
    return pictures
