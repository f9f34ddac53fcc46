"""Turn a class noun into what keeps the class as it is: drawn class images, which all subjects share, or own photos."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dreambooth.dataset import Posterior
from dreambooth.errors import ParamsError, SubjectError
from dreambooth.families import Sizes, drawn_sizes
from dreambooth.folders import cache_folder, hidden_by_link, new_folder, scratch_folder, sha256_of_file
from dreambooth.hardware import computes_on
from dreambooth.images import png_bytes, to_square
from dreambooth.latents import encode_images
from dreambooth.models import DTYPES, Model, default_device, device_name, load_model, model_hash, resolve_model
from dreambooth.params import Params
from dreambooth.photos import PhotoReport, check_photos, require_usable
from dreambooth.priors import ensure_class_images, prior_key, read_class_images, save_class_latents
from dreambooth.prompts import class_prompt, class_prompts, cuts, reader_of, require_read, with_article
from dreambooth.views import sizes_of
from stages.entry import main, say

INPUTS = ("data/base", "data/classes")
OUTPUTS = ("build/classes/{id}",)

Pictures = tuple[list[bytes], list[Posterior], list[Sizes]]


def run(params: Params, class_id: str, root: Path) -> None:
    """Write build/classes/<id>/: 00000.png ..., latents.safetensors, manifest; the manifest alone without pictures."""
    if class_id not in params.classes:
        raise SubjectError(f"there is no class {class_id!r} in params.yaml; known: {', '.join(params.classes)}")
    about: dict[str, Any] = {"kind": params.prior.kind}
    images: Pictures = ([], [], [])
    if params.prior.kind == "images":
        images = _drawn(params, class_id, root, about)
    elif params.prior.kind == "folder":
        images = _own(params, class_id, root, about)
    else:
        say(f"prior {class_id}: kind {params.prior.kind}: no class images")
    pngs, posteriors, sizes = images
    with new_folder(root / OUTPUTS[0].format(id=class_id), about) as target:
        for number, image in enumerate(pngs):
            (target / f"{number:05d}.png").write_bytes(image)
        if posteriors:
            save_class_latents(target / "latents.safetensors", posteriors, sizes)


def _drawn(params: Params, class_id: str, root: Path, about: dict[str, Any]) -> Pictures:
    """Take class images from the store, drawing those that it lacks."""
    base = resolve_model(params.base.pretrained_model_name_or_path, params.base.revision, root)
    base_hash, texts = model_hash(base), class_prompts(params.classes[class_id].class_noun, params.prior.prompts)
    resolution, dtype, device = params.base.resolution, params.base.inference_dtype, default_device()
    key = prior_key(base_hash, texts, params.prior, resolution, dtype, device_name(device))
    store = cache_folder() / "priors" / key
    report = ensure_class_images(
        store, texts, lambda: _load_to_draw(params, class_id, base, device), params.prior, resolution
    )
    images, posteriors = read_class_images(store, params.prior.num_class_images)
    settings = params.prior.model_dump(exclude={"kind", "folder", "prompts"})
    about.update({"key": key, "base": base_hash, "prompts": texts, "settings": settings, "rejected": report.rejected})
    say(f"prior {class_id}: {report}")
    return images, posteriors, [drawn_sizes(resolution)] * len(images)


def _own(params: Params, class_id: str, root: Path, about: dict[str, Any]) -> Pictures:
    """Check the user's photos of the class as those of a subject, and encode them."""
    folder, resolution = root / params.prior.folder / class_id, params.base.resolution
    if hidden := hidden_by_link(root / "data/classes", folder):
        raise SubjectError(f"prior.folder: {hidden}")
    side = (resolution, resolution)
    squares: list[Image.Image] = []
    sizes: list[Sizes] = []

    def keep(report: PhotoReport, picture: Image.Image) -> None:
        squares.append(to_square(picture, resolution))
        sizes.append(sizes_of(picture, side, (max(picture.size) - min(picture.size)) / 2))

    reports = check_photos(folder, params.photos, use=keep)
    usable = require_usable(reports, folder.relative_to(root), params.photos)
    base = resolve_model(params.base.pretrained_model_name_or_path, params.base.revision, root)
    cache, device = scratch_folder(root) / "latents" / f"class-{class_id}", default_device()
    load = functools.cache(lambda: _load(class_id, base, torch.float32, device, ["vae"]))
    posteriors, reused = encode_images(load, squares, model_hash(base, ["vae"]), device, cache)
    about["prompts"] = [class_prompt(params.classes[class_id].class_noun)]
    about["photos"] = [{"file": report.file, "sha256": sha256_of_file(folder / report.file)} for report in usable]
    dropped = len(reports) - len(usable)
    say(f"prior {class_id}: {len(usable)} photos of your own, {dropped} dropped; latents: {reused} reused")
    return [png_bytes(square) for square in squares], posteriors, sizes


def _load_to_draw(params: Params, class_id: str, base: Path, device: torch.device) -> Model:
    """Load the base; refuse prompts of which it would read no class."""
    model = _load(class_id, base, DTYPES[params.base.inference_dtype], device)
    noun = with_article(params.classes[class_id].class_noun)
    for remark in require_read(cuts(params.prior.named_prompts, noun, reader_of(model.tokenizers)), ParamsError):
        say(f"prior {class_id}: warning: {remark}")
    return model


def _load(
    class_id: str, base: Path, dtype: torch.dtype, device: torch.device, parts: Sequence[str] | None = None
) -> Model:
    """Load parts of the base, and say what computes now."""
    model = load_model(base, dtype, device, parts=parts)
    for line in computes_on(device):
        say(f"prior {class_id}: {line}")
    return model


if __name__ == "__main__":
    main(run)
