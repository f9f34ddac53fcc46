"""Turn the pictures of a subject and the class images into the trained parts of its model, and their loss curve."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import safetensors.torch

from dreambooth import prompts
from dreambooth.checkpoint import BYTES_PER_WEIGHT, KEEP, Checkpoints
from dreambooth.dataset import Sample, as_posterior
from dreambooth.folders import code_hash, new_folder, read_manifest, require_space, scratch_folder, sha256_of
from dreambooth.images import read_captions, read_prepared, to_square
from dreambooth.latents import encode_images
from dreambooth.locks import only_one
from dreambooth.models import (
    DTYPES,
    Model,
    device_name,
    library_versions,
    load_model,
    model_hash,
    resolve_model,
    save_trained,
)
from dreambooth.params import Params
from dreambooth.tracking import open_run
from dreambooth.training import StepRecord, max_train_steps, train
from stages.entry import main, say

INPUTS = ("build/{id}/instance", "build/classes/{class_id}", "data/base")
OUTPUTS = ("models/{id}",)


def run(params: Params, subject_id: str, root: Path) -> None:
    """Write models/<id>/: unet/, text_encoder/ where it was trained, loss.csv, manifest with the fingerprint."""
    base = resolve_model(params.base.pretrained_model_name_or_path, params.base.revision, root)
    model = load_model(base)
    about = _inputs(params, subject_id, root, model_hash(base), device_name(model.device))
    instance = _instance_samples(params, subject_id, root, model, model_hash(base, ["vae"]))
    prior = _prior_samples(params, subject_id, root) if params.train.prior_loss_weight > 0 else []
    folder = scratch_folder(root) / "checkpoints" / f"{subject_id}-{about['fingerprint'][:16]}"
    checkpoints = Checkpoints(folder, lambda line: say(f"train {subject_id}: {line}"))
    weights = sum(parameter.numel() for parameter in model.unet.parameters())
    require_space(scratch_folder(root), weights * BYTES_PER_WEIGHT * (KEEP + 1), "training with checkpoints")
    model.vae = None  # all latents are known: its memory is free for the training
    say(
        f"train {subject_id}: {len(instance)} photos, {len(prior)} class images, "
        f"{max_train_steps(params.train, len(instance))} steps on {model.device}"
    )
    with (
        only_one(scratch_folder(root) / "locks", f"train-{subject_id}", f"the training of {subject_id}"),
        open_run(root, key=about["fingerprint"], name=subject_id, tags={"subject": subject_id}) as tracked,
        new_folder(root / OUTPUTS[0].format(id=subject_id), about) as target,
    ):
        tracked.params(_flat(params, subject_id))
        history = train(model, instance, prior, params.train, lambda records: _track(tracked, records), checkpoints)
        save_trained(model, target, DTYPES[params.train.save_dtype], params.train.train_text_encoder)
        pd.DataFrame(map(asdict, history)).to_csv(target / "loss.csv", index=False)
    checkpoints.remove()


def _inputs(params: Params, subject_id: str, root: Path, base_hash: str, device: str) -> dict[str, Any]:
    """Say what the training depends on; its hash is the fingerprint that later stages find the run by."""
    subject = params.subject(subject_id)
    folders = {"instance": root / INPUTS[0].format(id=subject_id)}
    if params.train.prior_loss_weight > 0:
        folders["prior"] = root / INPUTS[1].format(class_id=subject.class_id)
    inputs = {
        "base": base_hash,
        "subject": subject_id,
        "identifier": subject.identifier,
        "class_noun": params.class_of(subject_id).class_noun,
        "resolution": params.base.resolution,
        "train": params.train.model_dump(exclude={"checkpointing_steps"}),  # says how often, not what
        "code": code_hash(),
        "device": device,
        "versions": library_versions(),
        "captions": read_captions(folders["instance"]),
        **{name: sha256_of(read_manifest(folder)["files"]) for name, folder in folders.items()},
    }
    return {"fingerprint": sha256_of(inputs), "inputs": inputs}


def _instance_samples(params: Params, subject_id: str, root: Path, model: Model, vae_hash: str) -> list[Sample]:
    resolution = params.base.resolution
    names, images, small = [], [], 0
    for name, picture in read_prepared(root / INPUTS[0].format(id=subject_id)):
        names.append(name)
        images.append(to_square(picture, resolution))
        small += min(picture.size) < resolution
    if small:
        say(f"train {subject_id}: warning: {small} photos are smaller than {resolution} pixels and were enlarged")
    posteriors, reused = encode_images(model, images, vae_hash, scratch_folder(root) / "latents" / subject_id)
    say(f"train {subject_id}: latents: {reused} reused, {len(images) - reused} encoded")
    identifier, class_noun = params.subject(subject_id).identifier, params.class_of(subject_id).class_noun
    captions = read_captions(root / INPUTS[0].format(id=subject_id))
    return [
        Sample(name, posterior, prompts.instance_prompt(identifier, class_noun, captions[name]), "instance")
        for name, posterior in zip(names, posteriors, strict=True)
    ]


def _prior_samples(params: Params, subject_id: str, root: Path) -> list[Sample]:
    folder = root / INPUTS[1].format(class_id=params.subject(subject_id).class_id)
    latents = safetensors.torch.load_file(folder / "latents.safetensors")["latents"]
    prompt = prompts.class_prompt(params.class_of(subject_id).class_noun)
    return [Sample(f"{i:05d}.png", as_posterior(latent), prompt, "prior") for i, latent in enumerate(latents)]


def _track(tracked: Any, records: list[StepRecord]) -> None:
    for record in records:
        values = asdict(record)
        tracked.metrics({name: value for name, value in values.items() if name != "step"}, step=values["step"])


def _flat(params: Params, subject_id: str) -> dict[str, Any]:
    sections = {"base": params.base, "prior": params.prior, "train": params.train}
    flat = {f"{name}.{key}": value for name, part in sections.items() for key, value in part.model_dump().items()}
    subject = params.subject(subject_id)
    return flat | {"subject": subject_id, "identifier": subject.identifier, "class": subject.class_id}


if __name__ == "__main__":
    main(run)
