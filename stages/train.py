"""Turn the pictures of a subject and the class images into the trained parts of its model, and their loss curve."""

import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from PIL import Image

from dreambooth import launcher, methods, processes, prompts
from dreambooth.checkpoint import KEEP, MAY_CHANGE, Checkpoints
from dreambooth.dataset import Sample
from dreambooth.errors import DivergedError, PhotosError, TrainingError, shown
from dreambooth.evaluation_loss import EvaluationRecord
from dreambooth.folders import (
    cache_of,
    checkpoint_folder,
    code_hash,
    new_folder,
    read_manifest,
    remove_leftovers,
    sha256_of,
    write_file,
)
from dreambooth.hardware import gpu_lacks_bfloat16, unused_gpu
from dreambooth.identifiers import identifier_remarks, known_words
from dreambooth.images import png_bytes, read_captions, read_prepared
from dreambooth.latents import encode_images
from dreambooth.locks import only_one_of
from dreambooth.models import Model, device_name, library_versions, load_model, model_hash, resolve_model
from dreambooth.optimizers import state_bytes
from dreambooth.params import Params, Train
from dreambooth.previews import Previews
from dreambooth.priors import read_class_latents
from dreambooth.progress import progress_bar
from dreambooth.schedule import max_train_steps
from dreambooth.trackers import Trackers, open_trackers, require_trackers
from dreambooth.tracking import open_run
from dreambooth.training import History, Listeners, StepRecord, train
from dreambooth.views import Size, buckets, nearest, views_of
from stages.entry import main, say

INPUTS = ("build/{id}/instance", "build/classes/{class_id}", "data/base")
OUTPUTS = ("models/{id}",)
PREVIEWS = "previews"
# What can change the weights besides this file (tests/test_pipeline.py compares with imports).
MODULES = (
    "adapters", "averaging", "bases", "checkpoint", "dataset", "drawings", "evaluation_loss", "families", "folders",
    "images", "latents", "lora", "loss", "memory", "methods", "models", "optimizers", "previews", "priors", "prompts",
    "rng", "sampling", "schedule", "teacher", "texts", "trainer", "training", "views",
)  # fmt: skip
WITHOUT_EFFECT = {  # on the weights: they say how often something is looked at or kept, and how memory is spared
    "checkpointing_steps",
    "gradient_checkpointing",
    "halve_batch_on_out_of_memory",
    "preview_steps",
    "preview_prompts",
    "preview_guidance_scale",
}


def run(params: Params, subject_id: str, root: Path, resume_from: Path | None = None) -> None:
    """Write models/<id>/: what was trained, loss.csv, manifest with fingerprint and method.

    What was trained: unet/ and text_encoder/, or the LoRA and the embedding as diffusers loads them onto the base.

    Args:
        params: of the project.
        subject_id: whom to train.
        root: of the project.
        resume_from: a checkpoint to continue with instead of the newest of this training.
    """
    require_trackers(params.tracking.report_to)
    if params.train.num_processes > processes.count():
        _start_processes(params.train.num_processes, subject_id, root, resume_from)
        return
    base = resolve_model(params.base.pretrained_model_name_or_path, params.base.revision, root)
    model = load_model(base, unet_dtype=methods.frozen_dtype(params.train))
    about = _inputs(params, subject_id, root, model_hash(base), device_name(model.device))
    instance = _instance_samples(params, subject_id, root, model, model_hash(base, ["vae"]))
    prior = _prior_samples(params, subject_id, root, instance) if params.has_prior else []
    about["class_images"] = sum(not sample.taught for sample in prior)
    about["class_prompts"] = sorted({sample.prompt for sample in prior})
    methods.add_token(model, params.train, about["inputs"]["identifier"], about["inputs"]["class_noun"])
    remarks = _require_read(params, subject_id, root, model)
    checkpoints = _checkpoints(subject_id, root, about["inputs"], resume_from)
    if params.train.preview_steps is None or processes.rank() > 0:  # the first process alone draws previews
        model.vae = None  # all latents are known: its memory is free for the training
    if processes.rank() > 0:  # its share of the rows of each step, and no file
        train(model, instance, prior, params.train, None, checkpoints)
        return
    _require_room(params, model, checkpoints)
    _say_remarks(params, subject_id, root, model, len(instance), remarks)
    _say_rows(params.train, subject_id, len(instance), about["class_images"], model.device)
    target = root / OUTPUTS[0].format(id=subject_id)
    with only_one_of(root, "train", subject_id, f"the training of {subject_id}"):
        remove_leftovers(target)
        tags = {"subject": subject_id, "diverged": "false"}
        with (
            open_run(root, key=about["fingerprint"], name=subject_id, tags=tags) as tracked,
            _open_trackers(params, subject_id, root, about["fingerprint"]) as told,
            new_folder(target, about) as folder,
        ):
            for one in (tracked, told):
                one.params(_flat(params, subject_id))
            previews = checkpoints.folder / _previews_name(params)
            listeners = _listeners(params, subject_id, previews, tracked, told)
            try:
                history = train(model, instance, prior, params.train, listeners, checkpoints)
            except DivergedError:
                tracked.tag("diverged", "true")
                raise
            methods.save_trained(model, folder, params.train)
            _save_records(history, folder)
            about["shipped_step"] = history.shipped_step
            if previews.is_dir():
                shutil.copytree(previews, folder / PREVIEWS)
            if checkpoints.changes:
                about["changes"] = checkpoints.changes
        checkpoints.remove()


def _start_processes(number: int, subject_id: str, root: Path, resume_from: Path | None) -> None:
    """Run this stage as so many processes, in the project's folder; end with the code of the first that fails."""
    if processes.count() > 1:
        raise TrainingError(
            f"train.num_processes: is {number}, but a launcher started {processes.count()}; start as many, or write 1"
        )
    if number > (gpus := torch.cuda.device_count()) and torch.cuda.is_available():
        raise TrainingError(f"train.num_processes: is {number}, but there are {gpus} GPUs here; write {gpus} or less")
    resume = ["--resume-from", str(resume_from)] if resume_from else []
    command = [sys.executable, "-m", "stages.train", subject_id, *resume]
    if code := launcher.start_all(command, number, root):
        raise SystemExit(code)


def _say_rows(settings: Train, subject_id: str, photos: int, class_images: int, device: torch.device) -> None:
    """Say what is trained on, how long, and how often each picture is seen."""
    steps = max_train_steps(settings, photos)
    rows = steps * settings.train_batch_size * settings.gradient_accumulation_steps * processes.count()
    seen = f"each photo is seen {rows / photos:.3g} times"
    if class_images:
        seen += f", each class image {rows / class_images:.3g}"
    say(f"train {subject_id}: {photos} photos, {class_images} class images, {steps} steps on {device}; {seen}")
    if class_images > rows:
        say(f"train {subject_id}: warning: {class_images - rows} class images are never seen; fewer are enough")


def _require_read(params: Params, subject_id: str, root: Path, model: Model) -> list[str]:
    """Refuse captions of which the base would read no subject; return what is to be said of those it reads in part."""
    photos = read_manifest(root / INPUTS[0].format(id=subject_id), verify=False)["photos"]  # its samples were read
    captions = [(f"the caption of {shown(one['original'])}", one["caption"]) for one in photos if one.get("caption")]
    words = f"{params.subject(subject_id).identifier} {params.class_of(subject_id).class_noun}"
    return prompts.require_read(prompts.cuts(captions, words, prompts.reader_of(model.tokenizers)), PhotosError)


def _say_remarks(
    params: Params, subject_id: str, root: Path, model: Model, photos: int, remarks: Sequence[str]
) -> None:
    word, tokenizer = params.subject(subject_id).identifier, model.tokenizer
    ids = tokenizer(word, add_special_tokens=False)["input_ids"]
    known = known_words(root, [params.class_of(subject_id).class_noun])
    steps, warmup = max_train_steps(params.train, photos), params.train.lr_warmup_steps
    pieces = tokenizer.convert_ids_to_tokens(ids)
    remarks = [*remarks, *identifier_remarks(word, ids, pieces, len(tokenizer), known), *params.idle]
    if warmup >= steps:
        remarks.append(f"train.lr_warmup_steps: {warmup} leave none of the {steps} steps at the full rate")
    if params.train.mixed_precision == "bf16" and gpu_lacks_bfloat16():
        remarks.append("this GPU only emulates bfloat16; train.mixed_precision: fp16 is many times faster here")
    remarks += [told] if (told := unused_gpu()) else []
    for remark in remarks:
        say(f"train {subject_id}: warning: {remark}")


def _save_records(history: History, folder: Path) -> None:
    """Write loss.csv, and evaluation_loss.csv where it was measured."""
    pd.DataFrame(map(asdict, history.steps)).to_csv(folder / "loss.csv", index=False)
    if history.evaluations:
        pd.DataFrame(map(asdict, history.evaluations)).to_csv(folder / "evaluation_loss.csv", index=False)


def _checkpoints(subject_id: str, root: Path, inputs: dict[str, Any], resume_from: Path | None) -> Checkpoints:
    """Open the checkpoints of the training with these inputs; other ones have another folder.

    Device, threads and libraries are left out of its name: a training goes on after an update, with a warning.
    """
    key = sha256_of({name: value for name, value in inputs.items() if name not in MAY_CHANGE})
    folder = checkpoint_folder(root, subject_id, key)
    return Checkpoints(folder, inputs, lambda line: say(f"train {subject_id}: {line}"), resume_from)


def _require_room(params: Params, model: Model, checkpoints: Checkpoints) -> None:
    """Refuse to begin without room for the checkpoints: those that are kept, and the one that is being written.

    Those of a training that goes on are there already. Without any in between, a stop still writes one.
    """
    settings = params.train
    kept = KEEP + settings.load_best_model_at_end if settings.checkpointing_steps is not None else 0
    needed = (kept + 1) * state_bytes(settings) * methods.count_weights(model, settings)
    checkpoints.require_space(needed - checkpoints.size, "training with checkpoints")


def _open_trackers(params: Params, subject_id: str, root: Path, fingerprint: str) -> AbstractContextManager[Trackers]:
    folder = cache_of(root, "trackers", subject_id)
    return open_trackers(params.tracking.report_to, folder, fingerprint, subject_id)


def _previews_name(params: Params) -> str:
    """Name the folder of previews by what they show: a training may be continued with other prompts."""
    shown = [params.train.preview_prompts, params.train.preview_guidance_scale]
    return f"{PREVIEWS}-{sha256_of(shown)[:8]}"


def _listeners(params: Params, subject_id: str, place: Path, tracked: Any, told: Trackers) -> Listeners:
    """Send the numbers to MLflow and the other trackers; keep the previews beside the checkpoints until the end."""

    def keep(step: int, images: list[Image.Image]) -> None:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        for number, image in enumerate(images):
            path = place / f"step-{step:07d}-{number:02d}.png"
            write_file(path, png_bytes(image))
            tracked.file(path, PREVIEWS)
        told.pictures(images, PREVIEWS, step)

    subject = f"{params.subject(subject_id).identifier} {params.class_of(subject_id).class_noun}"
    texts = [prompts.fill(template, subject) for template in params.train.preview_prompts]
    return Listeners(
        records=lambda records: _track((tracked, told), records),
        evaluation=lambda record: _track((tracked, told), [record], "evaluation_"),
        previews=Previews(texts, params.base.resolution, keep, lambda line: say(f"train {subject_id}: {line}")),
    )


def _inputs(params: Params, subject_id: str, root: Path, base_hash: str, device: str) -> dict[str, Any]:
    """Say what the training depends on; its hash is the fingerprint that later stages find the run by."""
    subject = params.subject(subject_id)
    folders = {"instance": root / INPUTS[0].format(id=subject_id)}
    if params.has_prior and params.prior.kind != "teacher":
        folders["prior"] = root / INPUTS[1].format(class_id=subject.class_id)
    inputs = {
        "base": base_hash,
        "subject": subject_id,
        "identifier": subject.identifier,
        "class_noun": params.class_of(subject_id).class_noun,
        "resolution": params.base.resolution,
        "train": params.train.model_dump(exclude=WITHOUT_EFFECT),
        "prior_kind": params.prior.kind if params.has_prior else "none",
        "processes": processes.count(),
        "code": code_hash(MODULES),
        "device": device,
        "threads": torch.get_num_threads(),
        "versions": library_versions(),
        "captions": read_captions(folders["instance"]),
        **{name: sha256_of(read_manifest(folder)["files"]) for name, folder in folders.items()},
    }
    return {"fingerprint": sha256_of(inputs), "method": params.train.method, "inputs": inputs}


def _instance_samples(params: Params, subject_id: str, root: Path, model: Model, vae_hash: str) -> list[Sample]:
    """Encode the views of each picture, which alone is in memory with them."""
    settings, resolution = params.train, params.base.resolution
    folder, cache = root / INPUTS[0].format(id=subject_id), cache_of(root, "latents", subject_id)
    identifier, class_noun = params.subject(subject_id).identifier, params.class_of(subject_id).class_noun
    known = buckets(resolution, model.whole_side) if settings.aspect_buckets else [(resolution, resolution)]
    captions = read_captions(folder)
    samples: list[Sample] = []
    sizes: Counter[Size] = Counter()
    small = encoded = reused = 0
    shown = "encode" if processes.rank() == 0 else None
    with progress_bar(len(captions), shown, unit="photo", delay=5.0) as bar:
        for number, (name, picture) in enumerate(read_prepared(folder)):
            wide, high = size = nearest(picture.size, known)
            views = views_of(picture, size, settings.random_crops, settings.random_flip, settings.seed, number)
            posteriors, found = encode_images(lambda: model, [view for view, _ in views], vae_hash, model.device, cache)
            (posterior, told), *others = [(one, told) for one, (_, told) in zip(posteriors, views, strict=True)]
            prompt = prompts.instance_prompt(identifier, class_noun, captions[name])
            samples.append(Sample(name, posterior, prompt, "instance", told, variants=tuple(others)))
            sizes[size] += 1
            small += picture.width < wide or picture.height < high
            encoded, reused = encoded + len(views) - found, reused + found
            bar.update()
    if small:
        say(f"train {subject_id}: warning: {small} photos are smaller than {resolution} pixels and were enlarged")
    if settings.aspect_buckets:
        counted = (f"{count} of {wide} x {high}" for (wide, high), count in sizes.items())
        say(f"train {subject_id}: buckets: {', '.join(counted)} pixels")
    say(f"train {subject_id}: latents: {reused} reused, {encoded} encoded")
    return samples


def _prior_samples(params: Params, subject_id: str, root: Path, instance: Sequence[Sample]) -> list[Sample]:
    """Return the class rows: class images, or the photos under the class prompt, which the base then teaches."""
    class_noun = params.class_of(subject_id).class_noun
    if params.prior.kind == "teacher":
        captions, noun = read_captions(root / INPUTS[0].format(id=subject_id)), prompts.with_article(class_noun)
        texts = {name: prompts.fill(caption or prompts.INSTANCE_TEMPLATE, noun) for name, caption in captions.items()}
        return [replace(sample, prompt=texts[sample.id], role="prior", taught=True) for sample in instance]
    folder = root / INPUTS[1].format(class_id=params.subject(subject_id).class_id)
    about = read_manifest(folder)
    if (made := about["kind"]) != params.prior.kind:
        raise TrainingError(
            f"{folder} is of prior.kind {made}, params.yaml says {params.prior.kind}; run the stage before: dvc repro "
            f"prior@{params.subject(subject_id).class_id}"
        )
    texts = about["prompts"]
    return [
        Sample(f"{i:05d}.png", posterior, texts[i % len(texts)], "prior", sizes)
        for i, (posterior, sizes) in enumerate(read_class_latents(folder / "latents.safetensors"))
    ]


def _track(trackers: Sequence[Any], records: Sequence[StepRecord | EvaluationRecord], prefix: str = "") -> None:
    for record in records:
        values = asdict(record)
        step = values.pop("step")
        for one in trackers:
            one.metrics({f"{prefix}{name}": value for name, value in values.items()}, step=step)


def _flat(params: Params, subject_id: str) -> dict[str, Any]:
    sections = {"base": params.base, "prior": params.prior, "train": params.train}
    flat = {f"{name}.{key}": value for name, part in sections.items() for key, value in part.model_dump().items()}
    subject = params.subject(subject_id)
    return flat | {"subject": subject_id, "identifier": subject.identifier, "class": subject.class_id}


if __name__ == "__main__":
    main(run, options=("resume_from",))
