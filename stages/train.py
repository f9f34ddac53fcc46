"""Turn the pictures of a subject and the class images into the trained parts of its model, and their loss curve."""

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import safetensors.torch
from PIL import Image

from dreambooth import processes, prompts
from dreambooth.checkpoint import BYTES_PER_WEIGHT, KEEP, MAY_CHANGE, Checkpoints
from dreambooth.dataset import Sample, as_posterior
from dreambooth.errors import DivergedError
from dreambooth.evaluation_loss import EvaluationRecord
from dreambooth.folders import (
    code_hash,
    new_folder,
    read_manifest,
    remove_leftovers,
    require_space,
    scratch_folder,
    sha256_of,
    write_file,
)
from dreambooth.identifiers import identifier_remarks
from dreambooth.images import png_bytes, read_captions, read_prepared, to_square
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
from dreambooth.previews import Previews
from dreambooth.tracking import open_run
from dreambooth.training import History, Listeners, StepRecord, max_train_steps, train
from stages.entry import main, say

INPUTS = ("build/{id}/instance", "build/classes/{class_id}", "data/base")
OUTPUTS = ("models/{id}",)
PREVIEWS = "previews"
WITHOUT_EFFECT = {  # on the weights: they say how often something is looked at or kept
    "checkpointing_steps",
    "halve_batch_on_out_of_memory",
    "preview_steps",
    "preview_prompts",
    "preview_guidance_scale",
}


def run(params: Params, subject_id: str, root: Path, resume_from: Path | None = None) -> None:
    """Write models/<id>/: unet/, text_encoder/ where it was trained, loss.csv, manifest with the fingerprint.

    Args:
        params: of the project.
        subject_id: whom to train.
        root: of the project.
        resume_from: a checkpoint to continue with instead of the newest of this training.
    """
    base = resolve_model(params.base.pretrained_model_name_or_path, params.base.revision, root)
    model = load_model(base)
    about = _inputs(params, subject_id, root, model_hash(base), device_name(model.device))
    instance = _instance_samples(params, subject_id, root, model, model_hash(base, ["vae"]))
    prior = _prior_samples(params, subject_id, root) if params.train.prior_loss_weight > 0 else []
    checkpoints = _checkpoints(subject_id, root, about["inputs"], resume_from)
    if processes.rank() > 0:  # its share of the rows of each step, and no file
        train(model, instance, prior, params.train, None, checkpoints)
        return
    _require_room(params, model, root)
    _say_remarks(params, subject_id, model)
    if params.train.preview_steps is None:
        model.vae = None  # all latents are known: its memory is free for the training
    say(
        f"train {subject_id}: {len(instance)} photos, {len(prior)} class images, "
        f"{max_train_steps(params.train, len(instance))} steps on {model.device}"
    )
    target = root / OUTPUTS[0].format(id=subject_id)
    with only_one(scratch_folder(root) / "locks", f"train-{subject_id}", f"the training of {subject_id}"):
        remove_leftovers(target)
        tags = {"subject": subject_id, "diverged": "false"}
        with (
            open_run(root, key=about["fingerprint"], name=subject_id, tags=tags) as tracked,
            new_folder(target, about) as folder,
        ):
            tracked.params(_flat(params, subject_id))
            listeners = _listeners(params, subject_id, checkpoints.folder, tracked)
            try:
                history = train(model, instance, prior, params.train, listeners, checkpoints)
            except DivergedError:
                tracked.tag("diverged", "true")
                raise
            save_trained(model, folder, DTYPES[params.train.save_dtype], params.train.train_text_encoder)
            _save_records(history, folder)
            if (checkpoints.folder / PREVIEWS).is_dir():
                shutil.copytree(checkpoints.folder / PREVIEWS, folder / PREVIEWS)
            if checkpoints.changes:
                about["changes"] = checkpoints.changes
        checkpoints.remove()


def _say_remarks(params: Params, subject_id: str, model: Model) -> None:
    word, tokenizer = params.subject(subject_id).identifier, model.tokenizer
    ids = tokenizer(word, add_special_tokens=False)["input_ids"]
    for remark in identifier_remarks(word, ids, tokenizer.convert_ids_to_tokens(ids), len(tokenizer)):
        say(f"train {subject_id}: warning: {remark}")


def _save_records(history: History, folder: Path) -> None:
    """Write loss.csv, and evaluation_loss.csv where it was measured."""
    pd.DataFrame(map(asdict, history.steps)).to_csv(folder / "loss.csv", index=False)
    if history.evaluations:
        pd.DataFrame(map(asdict, history.evaluations)).to_csv(folder / "evaluation_loss.csv", index=False)


def _checkpoints(subject_id: str, root: Path, inputs: dict[str, Any], resume_from: Path | None) -> Checkpoints:
    """Open the checkpoints of the training with these inputs; other ones have another folder.

    Device and libraries are left out of its name: a training goes on after an update, with a warning.
    """
    key = sha256_of({name: value for name, value in inputs.items() if name not in MAY_CHANGE})
    folder = scratch_folder(root) / "checkpoints" / f"{subject_id}-{key[:16]}"
    return Checkpoints(folder, inputs, lambda line: say(f"train {subject_id}: {line}"), resume_from)


def _require_room(params: Params, model: Model, root: Path) -> None:
    """Refuse to begin without room for the checkpoints: those that are kept, and the one that is being written."""
    trained = [model.unet, *([model.text_encoder] if params.train.train_text_encoder else [])]
    weights = sum(parameter.numel() for module in trained for parameter in module.parameters())
    kept = KEEP + 1 + (params.train.evaluation_steps is not None)
    require_space(scratch_folder(root), weights * BYTES_PER_WEIGHT * kept, "training with checkpoints")


def _listeners(params: Params, subject_id: str, folder: Path, tracked: Any) -> Listeners:
    """Send the numbers to MLflow; keep the previews beside the checkpoints until the training is done."""

    def keep(step: int, images: list[Image.Image]) -> None:
        place = folder / PREVIEWS
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        for number, image in enumerate(images):
            path = place / f"step-{step:07d}-{number:02d}.png"
            write_file(path, png_bytes(image))
            tracked.file(path, PREVIEWS)

    subject = f"{params.subject(subject_id).identifier} {params.class_of(subject_id).class_noun}"
    texts = [prompts.fill(template, subject) for template in params.train.preview_prompts]
    return Listeners(
        records=lambda records: _track(tracked, records),
        evaluation=lambda record: _track_evaluation(tracked, record),
        previews=Previews(texts, params.base.resolution, keep, lambda line: say(f"train {subject_id}: {line}")),
    )


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
        "train": params.train.model_dump(exclude=WITHOUT_EFFECT),
        "processes": processes.count(),
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


def _track_evaluation(tracked: Any, record: EvaluationRecord) -> None:
    values = asdict(record)
    step = values.pop("step")
    tracked.metrics({f"evaluation_{name}": value for name, value in values.items()}, step=step)


def _flat(params: Params, subject_id: str) -> dict[str, Any]:
    sections = {"base": params.base, "prior": params.prior, "train": params.train}
    flat = {f"{name}.{key}": value for name, part in sections.items() for key, value in part.model_dump().items()}
    subject = params.subject(subject_id)
    return flat | {"subject": subject_id, "identifier": subject.identifier, "class": subject.class_id}


if __name__ == "__main__":
    main(run, options=("resume_from",))
