"""Turn a class noun into class images of the untouched model, from the store that all subjects of the class share."""

from pathlib import Path

import safetensors.torch
import torch

from dreambooth.errors import SubjectError
from dreambooth.folders import cache_folder, new_folder
from dreambooth.models import DTYPES, default_device, device_name, load_model, model_hash, resolve_model
from dreambooth.params import Params
from dreambooth.priors import ensure_class_images, prior_key, read_class_images
from dreambooth.prompts import class_prompt
from stages.entry import main, say

INPUTS = ("data/base",)
OUTPUTS = ("build/classes/{id}",)


def run(params: Params, class_id: str, root: Path) -> None:
    """Write build/classes/<id>/: 00000.png ..., latents.safetensors (N, C, h, w), manifest with the store's key."""
    if class_id not in params.classes:
        raise SubjectError(f"there is no class {class_id!r} in params.yaml; known: {', '.join(params.classes)}")
    base = resolve_model(params.base.pretrained_model_name_or_path, params.base.revision, root)
    base_hash, prompt = model_hash(base), class_prompt(params.classes[class_id].class_noun)
    resolution, dtype, device = params.base.resolution, params.base.inference_dtype, default_device()
    key = prior_key(base_hash, prompt, params.prior, resolution, dtype, device_name(device))
    store = cache_folder() / "priors" / key
    report = ensure_class_images(
        store, prompt, lambda: load_model(base, DTYPES[dtype], device), params.prior, resolution
    )
    images, posteriors = read_class_images(store, params.prior.num_class_images)
    about = {"key": key, "base": base_hash, "prompt": prompt, "settings": params.prior.model_dump()}
    with new_folder(root / OUTPUTS[0].format(id=class_id), about) as target:
        for number, image in enumerate(images):
            (target / f"{number:05d}.png").write_bytes(image)
        if posteriors:
            latents = torch.stack([posterior.mean for posterior in posteriors])
            safetensors.torch.save_file({"latents": latents}, target / "latents.safetensors")
    say(f"prior {class_id}: {report}")


if __name__ == "__main__":
    main(run)
