"""What keeps the class: drawn images, the base itself as a teacher, own photos, or nothing."""

import weakref
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from test_training import make_samples, settings
from tiny_project import add_photos, make_photo, write_params

from dreambooth import methods, teacher
from dreambooth import trainer as stepping
from dreambooth.adapters import without_lora
from dreambooth.dataset import Sample
from dreambooth.errors import PhotosError, SubjectError, TrainingError
from dreambooth.folders import read_manifest
from dreambooth.models import Model, load_model
from dreambooth.params import load_params
from dreambooth.training import History, train
from stages import prior as prior_stage
from stages import train as train_stage
from stages import validate

HOW = {"learning_rate": 3e-3, "rank": 4, "lora_alpha": 4.0, "snr_gamma": None}


def taught(samples: list[Sample]) -> list[Sample]:
    return [
        Sample(sample.id, sample.posterior, "a photo of a dog", "prior", sample.sizes, taught=True)
        for sample in samples
    ]


def run(model: Model, prior: bool = True, **changes: Any) -> History:
    instance = make_samples(model, 3, "instance", "a photo of sks dog")
    return train(model, instance, taught(instance) if prior else [], settings(**HOW | changes))


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_first_loss_of_taught_rows_is_zero_for_the_base_is_its_own_teacher(
    tiny_model_folder: Path, method: str
) -> None:
    model = load_model(tiny_model_folder, device="cpu")
    history = run(model, method=method, train_text_encoder=True)
    assert history.steps[0].loss_prior < 1e-9
    assert all(record.loss_prior > 1e-9 for record in history.steps[2:])


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_teacher_stays_the_base_after_steps_and_after_a_stop(tiny_model_folder: Path, method: str) -> None:
    """The targets of the last step are what a fresh base predicts."""
    base, model = (load_model(tiny_model_folder, device="cpu") for _ in range(2))
    seen: list[tuple[Any, torch.Tensor]] = []
    replace = stepping.Teacher.replace

    def watch(self: Any, target: torch.Tensor, noisy_latents: torch.Tensor, batch: Any) -> torch.Tensor:
        made = replace(self, target, noisy_latents, batch)
        seen.append(((noisy_latents, batch), made))
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stepping.Teacher, "replace", watch)
        run(model, method=method, train_text_encoder=True)
    (noisy_latents, batch), made = seen[-1]
    rows = list(batch.taught)
    assert len(rows) == 2
    with torch.no_grad():
        ids = base.tokenizer(
            [batch.prompts[row] for row in rows], padding="max_length", max_length=40, return_tensors="pt"
        ).input_ids
        expected = base.unet(noisy_latents[rows], batch.timesteps[rows], base.text_encoder(ids)[0]).sample
    assert torch.allclose(made[rows], expected, atol=1e-5)
    assert not torch.allclose(made[[0]], expected[[0]])


@pytest.mark.parametrize(("method", "copies"), [("full", 1), ("lora", 0), ("pivotal", 0)])
def test_only_where_all_weights_move_there_is_a_second_unet(
    tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch, method: str, copies: int
) -> None:
    model, seen = load_model(tiny_model_folder, device="cpu"), []
    deepcopy = teacher.copy.deepcopy

    def watch(thing: Any, *more: Any) -> Any:
        seen.append(thing is model.unet)
        return deepcopy(thing, *more)

    monkeypatch.setattr(teacher.copy, "deepcopy", watch)
    values = settings(**HOW | {"method": method})
    methods.add_token(model, values, "sks", "dog")
    instance = make_samples(model, 3, "instance", "a photo of sks dog")
    train(model, instance, taught(instance), values)
    assert sum(seen) == copies


def test_the_teacher_holds_the_class_where_nothing_else_does(tiny_model_folder: Path) -> None:
    """Without it the class prompt moves with the subject; with it, it stays nearer to the base."""
    drifts = []
    for prior in (False, True):
        model = load_model(tiny_model_folder, device="cpu")
        run(model, prior, method="lora", max_train_steps=40, train_text_encoder=False, prior_loss_weight=3.0)
        generator = torch.Generator().manual_seed(0)
        noisy = torch.randn(4, 4, 16, 16, generator=generator)
        ids = model.tokenizer(
            ["a photo of a dog"] * 4, padding="max_length", max_length=40, return_tensors="pt"
        ).input_ids
        with torch.no_grad():
            text, steps = model.text_encoder(ids)[0], torch.tensor([100, 300, 600, 900])
            moved = model.unet(noisy, steps, text).sample
            with without_lora(model.unet):
                drifts.append((model.unet(noisy, steps, text).sample - moved).square().mean().item())
    assert drifts[1] < 0.8 * drifts[0]


def run_stages(root: Path, values: dict[str, Any], *stages: Any) -> None:
    write_params(root, values)
    params = load_params(root / "params.yaml")
    for stage in stages:
        stage.run(params, "dog" if stage is prior_stage else "biscuit", root)


@pytest.mark.parametrize("kind", ["images", "teacher", "folder", "none"])
def test_every_kind_goes_through_the_stages(project: Path, params_values: dict[str, Any], kind: str) -> None:
    add_photos(project / "data/classes/dog", 4, first=200)
    params_values["prior"]["kind"] = kind
    run_stages(project, params_values, validate, prior_stage, train_stage)
    made = read_manifest(project / "build/classes/dog")
    assert made["kind"] == kind
    pictures = len(list((project / "build/classes/dog").glob("*.png")))
    assert pictures == {"images": 5, "folder": 4}.get(kind, 0)
    curve = (project / "models/biscuit/loss.csv").read_text().splitlines()
    column = curve[0].split(",").index("loss_prior")
    assert (curve[1].split(",")[column] == "") == (kind == "none")
    assert read_manifest(project / "models/biscuit")["inputs"]["prior_kind"] == kind


def test_own_photos_are_encoded_with_their_spread_and_their_sizes(project: Path, params_values: dict[str, Any]) -> None:
    folder = project / "data/classes/dog"
    add_photos(folder, 2, first=200)
    make_photo(300).resize((120, 80)).save(folder / "wide.png")
    params_values["prior"]["kind"] = "folder"
    run_stages(project, params_values, prior_stage)
    latents = safetensors.torch.load_file(project / "build/classes/dog/latents.safetensors")
    assert latents["std"].min() > 0
    assert latents["sizes"].tolist()[-1] == [80, 120, 0, 8, 32, 32]
    assert len(read_manifest(project / "build/classes/dog")["photos"]) == 3


def test_of_own_photos_one_is_in_memory_at_full_size_and_only_new_ones_need_a_model_of_which_the_autoencoder(
    project: Path, params_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = project / "data/classes/dog"
    add_photos(folder, 3, first=200)
    params_values["prior"]["kind"] = "folder"
    loaded: list[Model] = []
    load, photos = prior_stage.load_model, prior_stage.check_photos
    alive: list[weakref.ref[Any]] = []

    def check(*arguments: Any, use: Any) -> Any:
        def watch(report: Any, picture: Any) -> None:
            assert not [one for one in alive if one() is not None]
            alive.append(weakref.ref(picture))
            use(report, picture)

        return photos(*arguments, use=watch)

    def note(*arguments: Any, **named: Any) -> Model:
        loaded.append(load(*arguments, **named))
        return loaded[-1]

    monkeypatch.setattr(prior_stage, "check_photos", check)
    monkeypatch.setattr(prior_stage, "load_model", note)
    run_stages(project, params_values, prior_stage)
    assert len(alive) == 3
    assert len(loaded) == 1
    assert (loaded[0].unet, loaded[0].text_encoder) == (None, None)
    add_photos(folder, 1, first=300)
    run_stages(project, params_values, prior_stage)
    assert len(loaded) == 2
    run_stages(project, params_values, prior_stage)
    assert len(loaded) == 2


def test_own_photos_are_checked_as_those_of_a_subject(project: Path, params_values: dict[str, Any]) -> None:
    folder = project / "data/classes/dog"
    add_photos(folder, 3, first=200)
    (folder / "broken.jpg").write_bytes(b"no photo")
    params_values["prior"]["kind"] = "folder"
    with pytest.raises(PhotosError, match=r"data/classes/dog/broken\.jpg"):
        run_stages(project, params_values, prior_stage)


def test_own_photos_behind_a_link_are_refused_for_dvc_sees_no_change_of_them(
    project: Path, params_values: dict[str, Any], tmp_path: Path
) -> None:
    add_photos(tmp_path / "dogs", 3, first=200)
    (project / "data/classes/dog").symlink_to(tmp_path / "dogs")
    params_values["prior"]["kind"] = "folder"
    with pytest.raises(SubjectError, match=r"^prior\.folder: .*/data/classes/dog is a link to a folder.*copy it there"):
        run_stages(project, params_values, prior_stage)


def test_class_images_of_another_kind_are_refused(project: Path, params_values: dict[str, Any]) -> None:
    run_stages(project, params_values, validate, prior_stage)
    add_photos(project / "data/classes/dog", 3, first=200)
    params_values["prior"]["kind"] = "folder"
    with pytest.raises(TrainingError, match=r"is of prior\.kind images, params\.yaml says folder; .*prior@dog"):
        run_stages(project, params_values, train_stage)


def test_a_caption_stands_in_the_class_prompt_too(project: Path, params_values: dict[str, Any]) -> None:
    """What the teacher shows must be the same sentence but for the subject."""
    (project / "data/subjects/biscuit/00.txt").write_text("a photo of {} in a park")
    params_values["prior"]["kind"] = "teacher"
    pairs: set[tuple[bool, str]] = set()
    forward = stepping.forward

    def watch(trainer: Any, batch: Any) -> Any:
        pairs.update(zip(batch.is_instance.tolist(), batch.prompts, strict=True))
        return forward(trainer, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stepping, "forward", watch)
        run_stages(project, params_values, validate, prior_stage, train_stage)
    assert {text for is_instance, text in pairs if is_instance} == {
        "a photo of sks dog in a park", "a photo of sks dog"
    }  # fmt: skip
    assert {text for is_instance, text in pairs if not is_instance} == {
        "a photo of a dog in a park", "a photo of a dog"
    }  # fmt: skip
