"""Every stage, run for real on a tiny pipeline: what it reads, writes, reuses and refuses."""

import io
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from tiny_project import REPOSITORY, TINY_RESOLUTION, add_photos, tiny_values, write_params

from dreambooth import comparison, hardware, mlflowstore, trainer
from dreambooth.beside import Side, lay_beside
from dreambooth.errors import (
    DivergedError,
    EvaluationError,
    OutOfMemoryError,
    ParamsError,
    PhotosError,
    SubjectError,
)
from dreambooth.folders import TornFolderError, content_hash, read_manifest, scratch_folder
from dreambooth.gate import decide, read_scorecard
from dreambooth.locks import only_one
from dreambooth.models import load_model
from dreambooth.params import load_params, parse_params
from flows import forget, prefectstore
from stages import entry, evaluate, export, prior, report, train, validate


def run_all(root: Path, subject: str = "biscuit") -> None:
    params = load_params(root / "params.yaml")
    validate.run(params, subject, root)
    prior.run(params, params.subject(subject).class_id, root)
    train.run(params, subject, root)
    evaluate.run(params, subject, root)
    report.run(params, subject, root)
    export.run(params, subject, root)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Path:
    """Return a project in which all stages ran once; the tests that use it only look."""
    from tiny_project import make_project

    folder = tmp_path_factory.mktemp("done")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DREAMBOOTH_CACHE", str(folder / "cache"))
        patch.delenv("DREAMBOOTH_TRACKING")
        root = make_project(folder / "project", tiny_model_folder, tiny_values())
        run_all(root)
    return root


def test_every_stage_leaves_a_folder_whose_manifest_verifies(done: Path) -> None:
    for name in ("build/biscuit/instance", "build/classes/dog", "models/biscuit", "build/biscuit/evaluation"):
        assert read_manifest(done / name)["files"]
    assert read_manifest(done / "export/biscuit")["model"] == read_manifest(done / "models/biscuit")["fingerprint"]


def test_the_export_is_a_pipeline_that_diffusers_loads_and_draws_with(done: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(done / "export/biscuit", use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    defaults = json.loads((done / "export/biscuit/generation.json").read_text())
    assert defaults["instance_prompt"] == "a photo of sks dog"
    image = pipeline(defaults["instance_prompt"], num_inference_steps=2, height=32, width=32).images[0]
    assert image.size == (TINY_RESOLUTION, TINY_RESOLUTION)


def test_the_card_says_how_to_call_the_subject_and_what_was_not_checked(done: Path) -> None:
    card = (done / "export/biscuit/README.md").read_text()
    assert "a photo of sks dog" in card
    assert "not checked" in card


def test_the_loss_curve_has_a_row_a_step_with_both_losses(done: Path) -> None:
    curve = pd.read_csv(done / "models/biscuit/loss.csv")
    assert curve["step"].tolist() == [0, 1, 2, 3]
    assert curve[["loss_instance", "loss_prior", "grad_norm"]].notna().all().all()


def test_the_manifest_of_a_training_says_which_step_is_shipped_and_the_report_how_it_was_trained(done: Path) -> None:
    assert read_manifest(done / "models/biscuit")["shipped_step"] == 4
    page = (done / "reports/biscuit/index.html").read_text()
    for name in ("train: seed", "train: method", "train: learning_rate", "step that is shipped", "class images of the"):
        assert name in page


def test_the_metrics_are_those_of_the_scores(done: Path) -> None:
    scores = pd.read_csv(done / "build/biscuit/evaluation/scores.csv")
    metrics = json.loads((done / "metrics/biscuit.json").read_text())
    personalised = scores[scores["model"] == "personalised"]
    assert len(scores) == 2 * len(personalised) == 2 * 3 * 2
    assert metrics["prompts"] == 3
    assert metrics["identity"]["personalised"] == pytest.approx(personalised["identity"].mean())
    assert metrics["copying"]["rate"] == personalised["copy"].mean()
    assert metrics["prior"]["images"] == 4
    assert metrics["diversity"]["low"] <= metrics["diversity"]["gain"] <= metrics["diversity"]["high"]
    assert metrics["identity"]["low"] <= metrics["identity"]["gain"] <= metrics["identity"]["high"]


def test_the_grid_shows_base_and_personalised_at_every_seed(done: Path) -> None:
    with Image.open(done / "build/biscuit/evaluation/grid.png") as grid:
        assert grid.width > 4 * 128
        assert grid.height > 4 * 128


def test_the_training_is_logged_with_its_curve_and_its_scores(done: Path) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{done}/mlflow.db")
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert len(runs) == 1
    history = client.get_metric_history(runs[0].info.run_id, "loss_instance")
    assert [metric.step for metric in history] == [0, 1, 2, 3]
    assert runs[0].data.params["train.max_train_steps"] == "4"
    assert "identity.gain" in runs[0].data.metrics
    key = read_manifest(done / "build/biscuit/evaluation")["fingerprint"]
    for name in ("base", "personalised"):  # one seed of two
        kept = client.list_artifacts(runs[0].info.run_id, f"evaluation/{key}/{name}")
        assert [Path(entry.path).name for entry in kept] == ["000.png", "002.png", "004.png"]


def test_the_run_of_a_training_has_every_number_of_its_evaluation_so_that_a_registration_adds_none(done: Path) -> None:
    client, experiment = mlflowstore.connect(done)
    (run,) = client.search_runs([experiment])
    numbers = mlflowstore.flat_metrics(json.loads((done / "metrics/biscuit.json").read_text()))
    assert "identity.by_kind.recontextualisation.base" in numbers
    assert numbers.items() <= run.data.metrics.items()


def test_of_over_a_thousand_cases_the_pictures_of_the_first_seed_are_those_that_are_logged(tmp_path: Path) -> None:
    prompts, seeds = 26, 41
    for number in range(prompts * seeds):
        (tmp_path / f"{number:03d}.png").touch()
    chosen = [int(path.stem) for path in evaluate._of_first_seed(tmp_path, seeds)]
    assert chosen == [seeds * prompt for prompt in range(prompts)]


def test_the_same_inputs_give_the_same_bytes(done: Path, project: Path) -> None:
    run_all(project)
    for name in ("build/biscuit/instance", "build/classes/dog", "models/biscuit", "export/biscuit"):
        assert content_hash(project / name) == content_hash(done / name), name


def test_a_second_subject_of_the_class_takes_the_pictures_of_the_base_from_the_store(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(shutil.copytree(done, tmp_path / "copy"))
    cache = Path(shutil.copytree(done.parent / "cache", tmp_path / "base-cache"))
    monkeypatch.setenv("DREAMBOOTH_CACHE", str(cache))
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*.png")}
    values = tiny_values()
    values["subjects"]["rex"] = values["subjects"]["biscuit"] | {"identifier": "zwx"}
    write_params(root, values)
    shutil.copytree(root / "data/subjects/biscuit", root / "data/subjects/rex")
    run_all(root, "rex")
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*.png")} == before
    for name in ("base", "class/base"):
        ours, theirs = (sorted((root / f"build/{one}/evaluation" / name).iterdir()) for one in ("rex", "biscuit"))
        assert [path.read_bytes() for path in ours] == [path.read_bytes() for path in theirs]


def test_a_champion_is_evaluated_beside_the_challenger_by_the_same_evaluator(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(shutil.copytree(done, tmp_path / "copy"))
    monkeypatch.setenv("DREAMBOOTH_CACHE", str(done.parent / "cache"))
    params = load_params(root / "params.yaml")
    evaluate.beside_champion(params, "biscuit", root, root / "export/biscuit", "the champion", tmp_path / "both")
    cards = {name: read_scorecard(tmp_path / "both", name) for name in ("base", "champion", "personalised")}
    assert [card.is_base for card in cards.values()] == [True, False, False]
    assert cards["champion"].prompts["identity"].tolist() == cards["personalised"].prompts["identity"].tolist()
    assert cards["base"].how == read_scorecard(root / "build/biscuit/evaluation", "base").how
    verdict = decide(cards["personalised"], cards["champion"], params.gate)
    assert (verdict.verdict, verdict.against) == ("inconclusive", "champion")  # three prompts decide nothing
    sides = (Side("candidate", tmp_path / "both"), Side("champion", tmp_path / "both", "champion"))
    beside = lay_beside(*sides, [], params.gate, 0.95)
    assert beside.line == verdict.line
    with Image.open(io.BytesIO(beside.sheet)) as sheet:
        assert sheet.height > 3 * 128


def test_champion_and_challenger_are_asked_for_the_subject_by_the_word_that_they_were_trained_with(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(shutil.copytree(done, tmp_path / "copy"))
    monkeypatch.setenv("DREAMBOOTH_CACHE", str(done.parent / "cache"))
    values = tiny_values()
    values["subjects"]["biscuit"]["identifier"] = "zwx"
    params = parse_params(values)
    evaluate.beside_champion(params, "biscuit", root, root / "export/biscuit", "the champion", tmp_path / "both")
    before = root / "build/biscuit/evaluation/personalised"  # drawn when params.yaml said sks
    pictures = {path.name: path.read_bytes() for path in before.iterdir()}
    for name in ("champion", "personalised"):
        assert {path.name: path.read_bytes() for path in (tmp_path / "both" / name).iterdir()} == pictures


@pytest.mark.fault(22)
def test_pictures_that_are_not_finite_are_counted_and_nothing_is_promoted_by_their_scores(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = Path(shutil.copytree(done, tmp_path / "copy"))
    sound = json.loads((root / "metrics/biscuit.json").read_text())
    assert sound["flat"] == {"base": 0, "personalised": 0}
    monkeypatch.setenv("DREAMBOOTH_CACHE", str(done.parent / "cache"))  # has the pictures of the base

    def overflowing(*arguments: Any, **named: Any) -> Any:
        model = load_model(*arguments, **named)
        torch.nn.init.constant_(model.vae.decoder.conv_out.bias, float("nan"))
        return model

    monkeypatch.setattr(comparison, "load_model", overflowing)
    params = load_params(root / "params.yaml")
    evaluate.run(params, "biscuit", root)
    pictures = 3 * 2 + 4
    assert json.loads((root / "metrics/biscuit.json").read_text())["flat"] == {"base": 0, "personalised": pictures}
    assert f"black or of one colour: personalised {pictures};" in capsys.readouterr().out
    report.run(params, "biscuit", root)
    decision = json.loads((root / "reports/biscuit/report.json").read_text())["decision"]
    assert decision["verdict"] == "inconclusive"
    assert f"challenger {pictures};" in decision["line"]


def test_two_evaluations_of_a_subject_at_one_moment_leave_each_other_their_drawings(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(shutil.copytree(done, tmp_path / "copy"))
    params, lost = load_params(root / "params.yaml"), []
    first_draws, second_waits = threading.Event(), threading.Event()

    def draw(params: Any, subject_id: str, root: Path, models: Any, encoders: Any) -> None:
        own = scratch_folder(root) / "evaluation" / subject_id
        own.mkdir(parents=True, exist_ok=True)
        drawing = own / f"{threading.get_ident()}.png"
        drawing.touch()
        if not first_draws.is_set():  # the other one comes now: it waits, or draws and removes what it finds
            first_draws.set()
            second_waits.wait(20)
        if not drawing.exists():
            lost.append(drawing)

    def promotion(number: int) -> None:
        evaluate.beside_champion(params, "biscuit", root, root / "export/biscuit", "f", tmp_path / f"scores-{number}")

    monkeypatch.setattr(evaluate, "compare", draw)
    monkeypatch.setattr(evaluate, "write_comparison", lambda folder, found: None)
    monkeypatch.setattr(evaluate, "say", lambda text: second_waits.set())
    first, second = (threading.Thread(target=promotion, args=(number,)) for number in range(2))
    first.start()
    assert first_draws.wait(60)
    second.start()
    for thread in (first, second):
        thread.join(60)
    assert lost == []
    assert (tmp_path / "scores-0").is_dir()
    assert (tmp_path / "scores-1").is_dir()
    assert not (scratch_folder(root) / "evaluation/biscuit").exists()


def test_the_manifest_of_class_images_says_how_many_were_rejected(done: Path) -> None:
    assert read_manifest(done / "build/classes/dog")["rejected"] == 0


def test_class_images_that_were_drawn_before_come_from_the_store(
    project: Path, params_values: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    prior.run(load_params(project / "params.yaml"), "dog", project)
    params_values["prior"]["num_class_images"] = 7
    write_params(project, params_values)
    prior.run(load_params(project / "params.yaml"), "dog", project)
    said = capsys.readouterr().out
    assert "prior dog: 0 reused, 5 generated" in said
    assert "prior dog: 5 reused, 2 generated" in said


def test_each_stage_that_computes_says_on_what_and_warns_of_a_gpu_that_torch_cannot_use(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hardware, "NVIDIA", (str(tmp_path),))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    run_all(project)
    said = capsys.readouterr().out
    lines = said.splitlines()
    assert "evaluate biscuit: computes on cpu" in lines
    assert "steps on cpu" in said
    drawing, drawn = lines.index("prior dog: computes on cpu"), lines.index("prior dog: 0 reused, 5 generated")
    assert drawing < drawn
    warnings = [line.partition(": the driver of a GPU is here, but torch ") for line in lines]
    assert [who for who, found, _ in warnings if found] == [
        f"{stage}: warning" for stage in ("prior dog", "train biscuit", "evaluate biscuit")
    ]


def test_without_a_prior_nothing_is_drawn_and_the_rest_works(project: Path, params_values: dict[str, Any]) -> None:
    params_values["train"]["prior_loss_weight"] = 0
    params_values["prior"]["num_class_images"] = 0
    write_params(project, params_values)
    run_all(project)
    assert not list((project / "build/classes/dog").glob("*.png"))
    assert pd.read_csv(project / "models/biscuit/loss.csv")["loss_prior"].isna().all()


def test_scores_of_another_model_do_not_reach_the_card(done: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(done, tmp_path / "copy"))
    metrics = json.loads((root / "metrics/biscuit.json").read_text())
    (root / "metrics/biscuit.json").write_text(json.dumps(metrics | {"model": "another"}))
    with pytest.raises(EvaluationError, match="measured on another model"):
        export.run(load_params(root / "params.yaml"), "biscuit", root)


@pytest.mark.fault(1)
def test_validate_names_every_bad_file_and_writes_nothing(project: Path) -> None:
    folder = project / "data/subjects/biscuit"
    (folder / ".DS_Store").write_bytes(b"x")
    (folder / "note.jpg").write_text("a text")
    jpeg = folder / "torn.jpg"
    Image.open(folder / "00.png").save(jpeg)
    jpeg.write_bytes(jpeg.read_bytes()[:-300])
    with pytest.raises(PhotosError) as refused:
        validate.run(load_params(project / "params.yaml"), "biscuit", project)
    said = "\n".join(refused.value.problems)
    assert "data/subjects/biscuit/note.jpg" in said
    assert "data/subjects/biscuit/torn.jpg" in said
    assert [path for path in (project / "build").rglob("*") if path.is_file()] == []


@pytest.mark.fault(1)
@pytest.mark.parametrize("left", [0, 2])
def test_too_few_photos_stop_in_validate_and_nothing_is_made(project: Path, left: int) -> None:
    for path in sorted((project / "data/subjects/biscuit").iterdir())[left:]:
        path.unlink()
    with pytest.raises(PhotosError, match=rf"has {left} usable photos .* fewer than 3; put 3 to 10 there"):
        validate.run(load_params(project / "params.yaml"), "biscuit", project)
    assert not [path for path in (project / "build").rglob("*") if path.is_file()]
    assert not (project / "metrics").exists()


@pytest.mark.fault(10)
@pytest.mark.threat(3)
def test_validate_stores_photos_under_generated_names_and_keeps_the_original_in_the_manifest(project: Path) -> None:
    folder = project / "data/subjects/biscuit"
    (folder / "00.png").rename(folder / "-rf $(touch x) é.png")
    validate.run(load_params(project / "params.yaml"), "biscuit", project)
    manifest = read_manifest(project / "build/biscuit/instance")
    assert manifest["photos"][0]["file"] == "00.png"
    assert manifest["photos"][0]["original"] == "-rf $(touch x) é.png"


def test_a_photo_is_trained_with_its_caption_and_the_others_with_the_instance_prompt(project: Path) -> None:
    (project / "data/subjects/biscuit/01.txt").write_text("a drawing of {} in a park\n")
    params = load_params(project / "params.yaml")
    validate.run(params, "biscuit", project)
    model = load_model(project / "data/base/tiny")
    samples = train._instance_samples(params, "biscuit", project, model, "hash")
    assert [sample.prompt for sample in samples] == [
        "a drawing of sks dog in a park" if sample.id == "01.png" else "a photo of sks dog" for sample in samples
    ]


def test_a_caption_of_which_the_base_reads_no_subject_is_refused_and_one_it_reads_in_part_is_told(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    params = load_params(project / "params.yaml")
    caption = project / "data/subjects/biscuit/01.txt"
    caption.write_text("a photo of {} before " + "a red wall and " * 40)
    prior.run(params, "dog", project)
    validate.run(params, "biscuit", project)
    train.run(params, "biscuit", project)
    assert "warning: the caption of 01.png: has" in capsys.readouterr().out
    caption.write_text("a photo of " + "a red wall and " * 40 + "{}")
    validate.run(params, "biscuit", project)
    with pytest.raises(PhotosError, match=r"the caption of 01.png: 'sks dog' ends at token .* near the beginning"):
        train.run(params, "biscuit", project)


def test_a_class_prompt_of_which_the_base_reads_no_class_is_refused_before_it_is_drawn(
    project: Path, params_values: dict[str, Any]
) -> None:
    params_values["prior"]["prompts"] = ["a photo of {}", f"a photo of {'1 2 3 4 ' * 20}{{}}"]
    write_params(project, params_values)
    with pytest.raises(ParamsError, match=r"prior\.prompts\.1: 'a dog' ends at token"):
        prior.run(load_params(project / "params.yaml"), "dog", project)


@pytest.mark.threat(3)
def test_an_edited_picture_is_refused_by_the_training(project: Path) -> None:
    params = load_params(project / "params.yaml")
    validate.run(params, "biscuit", project)
    prior.run(params, "dog", project)
    add_photos(project / "build/biscuit/instance", 1, first=7)
    with pytest.raises(TornFolderError, match=r"07\.png is not in the manifest"):
        train.run(params, "biscuit", project)


def test_an_unknown_subject_is_refused(project: Path) -> None:
    with pytest.raises(SubjectError, match="did you mean 'biscuit'"):
        validate.run(load_params(project / "params.yaml"), "biscit", project)


@pytest.mark.slow
@pytest.mark.fault(23)
def test_a_training_of_a_subject_that_is_trained_already_says_by_whom(project: Path) -> None:
    params = load_params(project / "params.yaml")
    validate.run(params, "biscuit", project)
    prior.run(params, "dog", project)
    with only_one(scratch_folder(project) / "locks", "train-biscuit", "the training of biscuit"):
        finished = run_program(project, "train", "biscuit")
    assert finished.returncode == 75
    who = f"pid {os.getpid()} on {socket.gethostname()}"
    assert f"E_RUNNING: the training of biscuit is already running: {who}; wait for it" in finished.stderr
    assert not (project / "models").exists()
    assert run_program(project, "train", "biscuit").returncode == 0


@pytest.mark.threat(23)
def test_all_that_a_training_and_an_evaluation_leave_in_the_scratch_folder_is_forgotten(
    project: Path, params_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    params_values["train"] |= {"checkpointing_steps": 1}
    params_values["tracking"]["report_to"] = ["tensorboard"]
    write_params(project, params_values)
    run_all(project)
    params_values["train"]["learning_rate"] *= 2
    write_params(project, params_values)
    params = load_params(project / "params.yaml")

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    for run, place, name in ((train.run, train.methods, "save_trained"), (evaluate.run, evaluate, "write_comparison")):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, stop)
            with pytest.raises(KeyboardInterrupt):
                run(params, "biscuit", project)
    monkeypatch.setattr(prefectstore, "server", lambda: None)
    monkeypatch.setattr(prefectstore, "_database_file", lambda: Path("nowhere"))
    scratch = scratch_folder(project)
    found = forget.inventory(project, "biscuit")
    assert {path.relative_to(scratch).parts[0] for path in scratch.glob("**/*biscuit*")} == {
        "checkpoints", "evaluation", "latents", "locks", "trackers"
    }  # fmt: skip
    forget.erase(project, found, print)
    assert [path for path in scratch.rglob("*") if "biscuit" in path.name] == []


def test_who_sets_gradient_checkpointing_because_a_step_did_not_fit_goes_on_where_it_stopped(
    project: Path, params_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    params_values["train"] |= {"checkpointing_steps": 1, "gradient_checkpointing": False, "train_batch_size": 1}
    write_params(project, params_values)
    params = load_params(project / "params.yaml")
    validate.run(params, "biscuit", project)
    prior.run(params, "dog", project)
    straight = shutil.copytree(project, project.with_name("straight"))
    train.run(params, "biscuit", straight)
    step_of = trainer.train_step

    def no_memory(self: Any, rows: Any, step: int, rate: float) -> Any:
        if step == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return step_of(self, rows, step, rate)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "train_step", no_memory)
        with pytest.raises(OutOfMemoryError, match="or set gradient_checkpointing"):
            train.run(params, "biscuit", project)
    params_values["train"]["gradient_checkpointing"] = True
    write_params(project, params_values)
    train.run(load_params(project / "params.yaml"), "biscuit", project)
    assert "continues after step 2" in capsys.readouterr().out
    for name in ("unet/diffusion_pytorch_model.safetensors", "loss.csv"):
        assert (project / "models/biscuit" / name).read_bytes() == (straight / "models/biscuit" / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("photos", [3, 5])
def test_pictures_are_encoded_one_after_the_other_with_their_views(
    project: Path, params_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch, photos: int
) -> None:
    shutil.rmtree(project / "data/subjects/biscuit")
    add_photos(project / "data/subjects/biscuit", photos)
    params_values["train"] |= {"random_crops": 1, "random_flip": True}
    write_params(project, params_values)
    params = load_params(project / "params.yaml")
    validate.run(params, "biscuit", project)
    prior.run(params, "dog", project)
    encoded: list[int] = []
    encode = train.encode_images

    def count(load: Any, images: Any, *rest: Any) -> Any:
        encoded.append(len(images))
        return encode(load, images, *rest)

    monkeypatch.setattr(train, "encode_images", count)
    train.run(params, "biscuit", project)
    assert encoded == [2] * photos  # squares have no other crop than the middle one, and a mirror image


def test_a_stage_without_memory_ends_with_a_line(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*given: Any) -> None:
        raise MemoryError("std::bad_alloc")

    monkeypatch.chdir(project)
    monkeypatch.setattr(sys, "argv", ["stages/validate.py", "biscuit"])
    with pytest.raises(SystemExit) as ended:
        entry.main(run)
    assert ended.value.code == 71
    assert capsys.readouterr().err.startswith("E_OUT_OF_MEMORY: std::bad_alloc; lower")


@pytest.mark.slow
@pytest.mark.fault(22)
def test_a_run_that_diverges_is_marked_leaves_no_model_and_cannot_be_evaluated(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DREAMBOOTH_TRACKING")
    params = load_params(project / "params.yaml")
    validate.run(params, "biscuit", project)
    prior.run(params, "dog", project)
    step_of = trainer.train_step

    def spoil(self: Any, rows: Any, step: int, rate: float) -> Any:
        result = step_of(self, rows, step, rate)
        with torch.no_grad():  # a step too large
            next(iter(self.model.unet.parameters())).fill_(float("nan"))
        return result

    monkeypatch.setattr(trainer, "train_step", spoil)
    with pytest.raises(DivergedError, match="the loss is nan"):
        train.run(params, "biscuit", project)
    (marked,) = mlflowstore.connect(project)[0].search_runs(["1"])
    assert marked.data.tags["diverged"] == "true"
    assert marked.info.status == "FAILED"
    assert not (project / "models/biscuit").exists()
    with pytest.raises(TornFolderError, match=r"models/biscuit has no manifest.json"):
        evaluate.run(params, "biscuit", project)


def run_program(root: Path, stage: str, subject: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", f"stages.{stage}", subject],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_a_mistake_is_one_line_with_a_code_and_loads_no_model(project: Path) -> None:
    (project / "data/subjects/biscuit/00.png").write_bytes(b"")
    finished = run_program(project, "validate", "biscuit")
    assert finished.returncode == 3
    assert finished.stderr.splitlines() == [
        "E_PHOTOS: data/subjects/biscuit/00.png: is empty (0 bytes); copy the photo again (E_IMG_EMPTY)"
    ]
    loaded = subprocess.run(
        [sys.executable, "-c", "import sys, stages.validate; print('torch' in sys.modules)"],
        cwd=REPOSITORY, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert loaded.stdout.strip() == "False"


@pytest.mark.slow
@pytest.mark.fault(13)
def test_all_faults_of_params_yaml_are_printed_and_the_exit_code_is_two(
    project: Path, params_values: dict[str, Any]
) -> None:
    params_values["train"] |= {"learning_rate": "fast", "bogus": 1}
    write_params(project, params_values)
    finished = run_program(project, "train", "biscuit")
    assert finished.returncode == 2
    assert [line.split(": ")[2] for line in finished.stderr.splitlines()] == ["train.learning_rate", "train.bogus"]
