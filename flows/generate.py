"""Draw pictures of a subject with its registered version, and lay them out on one sheet."""

import hashlib
import io
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreambooth.errors import ParamsError, PipelineError
from dreambooth.folders import read_text
from dreambooth.params import SIDE, SIDE_UNIT
from dreambooth.prompts import PLACEHOLDER, fill

PICTURES = (1, 1000)  # of a prompt
_CHANGES = {"num_inference_steps": "steps", "guidance_scale": "guidance", "resolution": "size"}


@dataclass(frozen=True)
class Drawn:
    """The files that were written."""

    pictures: list[Path]
    sheet: Path


def full_prompts(identifier: str, class_noun: str, prompts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Put the subject's words where a prompt has {}; return the prompts, and those that do not name the subject."""
    name = re.compile(rf"(?<!\w){re.escape(identifier)}(?!\w)")
    nameless = [prompt for prompt in prompts if PLACEHOLDER not in prompt and not name.search(prompt)]
    return list(dict.fromkeys(fill(prompt, f"{identifier} {class_noun}") for prompt in prompts)), nameless


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


def call_options(
    seed: int, steps: int | None, guidance: float | None, negative: str | None, size: int | None, batch_size: int
) -> dict[str, Any]:
    """Return what the command and the flow are told by the names that the model has for it."""
    return {
        "seed": seed,
        "batch_size": batch_size,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "negative_prompt": negative,
        "resolution": size,
    }


def require_drawable(subject_id: str, prompts: Sequence[str], count: int) -> None:
    """Refuse before a model is loaded, or a GPU is waited for, what nothing can be drawn of.

    Raises:
        PipelineError: there is no prompt, or the count is out of its range.
    """
    least, most = PICTURES
    faults = [] if prompts else [f'no prompt; dreambooth generate {subject_id} "a photo of {PLACEHOLDER} in space"']
    if not least <= count <= most:
        faults.append(f"pictures of each prompt: should be {least} to {most} (got {count})")
    if faults:
        raise PipelineError("\n".join(faults))


def draw_registered(
    root: Path,
    subject_id: str,
    prompts: Sequence[str],
    count: int,
    options: Mapping[str, Any],
    say: Callable[[str], object],
    warn: Callable[[str], object],
    version: int | None = None,
    out: Path | None = None,
) -> Drawn:
    """Draw with a registered version, named by its own words: this one, else the champion, the challenger, the newest.

    Args:
        root: of the project.
        subject_id: of the subject.
        prompts: sentences; {} stands for the subject.
        count: pictures a prompt.
        options: parameters of the model; those that are None are the model's own.
        say: hears what takes long.
        warn: hears of prompts that do not name the subject.
        version: of the registered model.
        out: else build/<id>/generated.

    Raises:
        PipelineError: see `require_drawable`.
        RegistryError: there is no such version, or its files are not whole.
        ParamsError: an option that the model refuses.
    """
    from dreambooth import versions

    require_drawable(subject_id, prompts, count)
    given = {name: value for name, value in options.items() if value is not None}
    _require_side(given.get("resolution"))
    found = versions.choose(root, subject_id, version)
    label = f"{found.name} v{found.version}"
    say(f"loading {label}")
    model = versions.load_found(root, found)
    words = versions.generation_of(model)  # those of params.yaml may be others by now
    complete, nameless = full_prompts(words["identifier"], words["class_noun"], prompts)
    for prompt in nameless:
        warn(f"{prompt!r} does not name {subject_id}; write {PLACEHOLDER} where it should stand")
    about = {"model": f"models:/{found.name}/{found.version}"}
    folder = out or root / "build" / subject_id / "generated"
    return draw(model, complete, count, given, folder, about, found.version, f"draw {label}")


def draw(
    model: Any,
    prompts: Sequence[str],
    count: int,
    options: dict[str, Any],
    out: Path,
    provenance: Mapping[str, Any] | None = None,
    version: int | None = None,
    description: str | None = None,
) -> Drawn:
    """Draw each prompt with `count` seeds and write <out>/<prompt>-v<version>-<seed>.png and a contact sheet.

    A picture is written as soon as it is drawn. Its name is that of no other prompt: see `name_of`.

    Args:
        model: what `dreambooth.versions.load_found` returns.
        prompts: complete sentences.
        count: pictures a prompt; picture i has the seed `options["seed"]` + i.
        options: parameters of the model; seed among them.
        out: made if need be.
        provenance: is added to what each PNG says about itself, such as the registered version.
        version: goes into the names, as options do, so that pictures do not replace those of another version.
        description: of the progress bar; None shows none.
    """
    from PIL import Image

    from dreambooth.grid import grid
    from dreambooth.images import png_bytes, read_provenance
    from dreambooth.progress import progress_bar

    out.mkdir(parents=True, exist_ok=True)
    seeds = range(options["seed"], options["seed"] + count)
    suffix = ("" if version is None else f"-v{version}") + _changes(options)
    written: list[Path] = []
    rows: list[list[Image.Image | None]] = []
    names = [name_of(prompt, 60) for prompt in prompts]
    with progress_bar(len(prompts) * count, description, unit="picture") as bar:
        for prompt, name in zip(prompts, names, strict=True):
            row: list[Image.Image | None] = []
            for seed, picture in zip(seeds, _predict(model, prompt, count, options), strict=True):
                image = Image.open(io.BytesIO(picture), formats=("PNG",))
                written.append(out / f"{name}{suffix}-{seed}.png")
                written[-1].write_bytes(png_bytes(image, read_provenance(picture) | dict(provenance or {})))
                row.append(image)
                bar.update()
            rows.append(row)
    more = f"-and-{len(prompts) - 1}-more-{_digits(prompts)}" if len(prompts) > 1 else ""
    sheet = out / f"sheet-{names[0]}{more}{suffix}-{seeds.start}.png"
    grid(rows, list(prompts), [f"seed {seed}" for seed in seeds]).save(sheet)
    return Drawn(written, sheet)


def _changes(options: Mapping[str, Any]) -> str:
    """Name the options that are not the model's own: pictures of other options lie beside one another."""
    told = [f"-{word}{options[name]:g}" for name, word in _CHANGES.items() if name in options]
    without = options.get("negative_prompt")
    return "".join(told) + (f"-without-{name_of(without, 30)}" if without else "")


def name_of(text: str, longest: int) -> str:
    """Return a name that no other text has: its slug, and digits of the text where that does not tell it all."""
    name = slug(text, longest)
    return name if text == name.replace("-", " ") else f"{name or 'picture'}-{_digits([text])}"


def _digits(texts: Sequence[str]) -> str:
    """Return six hexadecimal digits that tell texts apart."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:6]


def slug(text: str, longest: int) -> str:
    """Return the Latin letters and digits of a text with - between its words; empty where it has none."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:longest].strip("-")


def _predict(model: Any, prompt: str, count: int, options: dict[str, Any]) -> Iterator[bytes]:
    """Yield the pictures of a prompt, asking for as many at a time as are drawn at once."""
    from dreambooth.versions import predict

    size = options.get("batch_size", 1)
    for first in range(0, count, size):
        part = min(size, count - first)
        yield from predict(model, [prompt] * part, {**options, "seed": options["seed"] + first})


def _require_side(side: int | None) -> None:
    """Refuse at once what the model would refuse after it was loaded."""
    if side is not None and side % SIDE_UNIT:
        near = max(side // SIDE_UNIT * SIDE_UNIT, SIDE[0])
        other = near + SIDE_UNIT
        raise ParamsError([f"--size: should be a multiple of {SIDE_UNIT} (got {side}); for example {near} or {other}"])
