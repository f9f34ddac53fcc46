"""What a training shows of itself: the loss at fixed noise, the best checkpoint, the previews."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from test_training import largest_difference, make_samples, settings, weights
from toy_checkpoints import open_checkpoints

from dreambooth import previews as previews_module
from dreambooth import training
from dreambooth.checkpoint import Checkpoints
from dreambooth.evaluation_loss import PLACES, EvaluationRecord, fixed_batches, is_best, patience_is_out
from dreambooth.models import Model, load_model
from dreambooth.previews import Previews
from dreambooth.training import History, Listeners, train


@pytest.fixture
def model(tiny_model_folder: Path) -> Model:
    return load_model(tiny_model_folder, device="cpu")


def run(
    model: Model, checkpoints: Checkpoints | None = None, listeners: Listeners | None = None, **changes: Any
) -> History:
    instance = make_samples(model, 2, "instance", "a photo of sks dog")
    prior = make_samples(model, 2, "prior", "a photo of a dog")
    values = settings(**{"max_train_steps": 6, "train_batch_size": 1, "checkpointing_steps": None} | changes)
    return train(model, instance, prior, values, listeners, checkpoints)


def scores(*values: float) -> list[EvaluationRecord]:
    return [EvaluationRecord(step, value, 0.0, value) for step, value in enumerate(values)]


def test_every_sample_meets_every_timestep_with_the_same_noise_each_time(model: Model) -> None:
    samples = make_samples(model, 3, "instance", "a photo of sks dog")
    first, second = ([*fixed_batches(samples, "instance", 1000, 0, size)] for size in (5, 12))
    assert [len(batch.timesteps) for batch in first] == [5, 5, 2]
    assert torch.cat([batch.timesteps for batch in first]).tolist() == [125, 375, 625, 875] * 3
    noise = torch.cat([batch.noise for batch in first])
    assert torch.equal(noise, second[0].noise)
    assert len({row.sum().item() for row in noise}) == len(PLACES) * 3


def test_the_evaluation_changes_nothing_of_the_training_and_repeats_itself(tiny_model_folder: Path) -> None:
    plain, measured = (load_model(tiny_model_folder, device="cpu") for _ in range(2))
    steps = run(plain).steps
    seen: list[EvaluationRecord] = []
    history = run(measured, None, Listeners(evaluation=seen.append), evaluation_steps=2)
    assert history.steps == steps
    assert largest_difference(weights(plain), weights(measured)) == 0
    assert [record.step for record in seen] == [2, 4, 6]
    assert history.evaluations == seen
    for record in seen:
        assert record.score == pytest.approx(record.loss_instance + record.loss_prior)
    again = run(load_model(tiny_model_folder, device="cpu"), evaluation_steps=2)
    assert again.evaluations == seen


def test_the_evaluation_needs_no_more_rows_at_once_than_a_step_does(tiny_model_folder: Path, tmp_path: Path) -> None:
    rows: list[int] = []

    def room_for_one(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        rows.append(len(inputs[0]))
        if rows[-1] > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    model = load_model(tiny_model_folder, device="cpu")
    model.unet.register_forward_pre_hook(room_for_one)
    instance = make_samples(model, 2, "instance", "a photo of sks dog")
    values = settings(max_train_steps=2, train_batch_size=2, prior_loss_weight=0.0, evaluation_steps=1)
    history = train(model, instance, [], values, checkpoints=open_checkpoints(tmp_path))
    assert [record.step for record in history.evaluations] == [1, 2]
    assert rows == [2, *[1] * (len(rows) - 1)]  # the first step was taken again in halves, and then all did fit


def test_a_best_step_whose_checkpoint_was_left_behind_is_named(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixed_scores(monkeypatch, [1, 2, 3, 4, 5, 6])
    how = {"evaluation_steps": 1, "load_best_model_at_end": True, "checkpointing_steps": 2}
    first, said = open_checkpoints(tmp_path / "there"), list[str]()
    run(load_model(tiny_model_folder, device="cpu"), first, **how)
    here = open_checkpoints(tmp_path / "here", say=said.append, resume_from=tmp_path / "there/step-0000004")
    history = run(load_model(tiny_model_folder, device="cpu"), here, **how)
    assert history.shipped_step == 6
    assert said[-1] == (
        f"warning: ships the last weights: the checkpoint of the best step 1 is not in {tmp_path / 'here'}"
    )


def test_the_best_is_below_all_before_and_patience_counts_from_it() -> None:
    assert is_best(scores(3, 2, 1))
    assert not is_best(scores(3, 1, 1))
    assert not is_best([])
    assert patience_is_out(scores(3, 1, 2, 1), 2)
    assert not patience_is_out(scores(3, 1, 2), 2)
    assert not patience_is_out(scores(3, 1, 2, 2, 2), None)
    assert not patience_is_out([], 1)


def fixed_scores(patch: pytest.MonkeyPatch, values: list[float]) -> None:
    """Let the evaluations find these scores."""
    original = training.evaluate_loss

    def evaluate(trainer: Any, instance: Any, prior: Any, step: int) -> EvaluationRecord:
        record = original(trainer, instance, prior, step)
        return EvaluationRecord(step, record.loss_instance, record.loss_prior, values[step - 1])

    patch.setattr(training, "evaluate_loss", evaluate)


def test_the_training_ends_when_patience_is_out_and_ships_the_best_weights(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixed_scores(monkeypatch, [3, 1, 2, 2, 0, 0])
    model = load_model(tiny_model_folder, device="cpu")
    how = {"evaluation_steps": 1, "early_stopping_patience": 2, "load_best_model_at_end": True}
    history = run(model, open_checkpoints(tmp_path), **how)
    assert [record.score for record in history.evaluations] == [3, 1, 2, 2]
    assert len(history.steps) == 4
    assert history.shipped_step == 2
    short = load_model(tiny_model_folder, device="cpu")
    run(short, max_train_steps=2)
    assert largest_difference(weights(model), weights(short)) == 0


def test_the_last_weights_are_shipped_when_they_are_the_best(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixed_scores(monkeypatch, [6, 5, 4, 3, 2, 1])
    model, plain = (load_model(tiny_model_folder, device="cpu") for _ in range(2))
    history = run(model, open_checkpoints(tmp_path), evaluation_steps=1, load_best_model_at_end=True)
    assert history.shipped_step == run(plain).shipped_step == 6
    assert largest_difference(weights(model), weights(plain)) == 0


def test_the_best_weights_are_shipped_when_steps_followed_that_nobody_measured(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    model, best, last = (load_model(tiny_model_folder, device="cpu") for _ in range(3))
    history = run(model, open_checkpoints(tmp_path), evaluation_steps=4, load_best_model_at_end=True)
    assert [record.step for record in history.evaluations] == [4]
    assert history.shipped_step == 4
    run(best, max_train_steps=4)
    run(last)
    assert largest_difference(weights(model), weights(best)) == 0
    assert largest_difference(weights(model), weights(last)) > 0


def test_where_the_checkpoint_of_the_best_is_torn_the_last_weights_are_shipped_and_the_training_says_so(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixed_scores(monkeypatch, [3, 1, 2, 2, 2, 2])
    model, plain = (load_model(tiny_model_folder, device="cpu") for _ in range(2))
    said: list[str] = []
    checkpoints = open_checkpoints(tmp_path, say=said.append)

    def tear(record: EvaluationRecord) -> None:
        if record.step == 6:
            checkpoints.finish()  # it may still be written
            best = tmp_path / json.loads((tmp_path / "best.json").read_text())["checkpoint"]
            next(best.glob("*.safetensors")).write_bytes(b"torn")

    history = run(model, checkpoints, Listeners(evaluation=tear), evaluation_steps=1, load_best_model_at_end=True)
    assert "torn" in said[-2]
    assert "ships the last weights: the checkpoint of the best step 2" in said[-1]
    assert history.shipped_step == 6
    run(plain)
    assert largest_difference(weights(model), weights(plain)) == 0


def test_previews_show_the_training_and_do_not_disturb_it(tiny_model_folder: Path) -> None:
    plain, drawn = (load_model(tiny_model_folder, device="cpu") for _ in range(2))
    steps = run(plain, learning_rate=1e-2).steps
    kept: dict[int, list[Image.Image]] = {}
    previews = Previews(["a photo of sks dog", "sks dog"], 32, kept.__setitem__, pytest.fail)
    history = run(drawn, None, Listeners(previews=previews), preview_steps=3, learning_rate=1e-2)
    assert history.steps == steps
    assert largest_difference(weights(plain), weights(drawn)) == 0
    assert list(kept) == [3, 6]
    assert kept[3][0].tobytes() != kept[6][0].tobytes()
    assert kept[3][0].tobytes() != kept[3][1].tobytes()


def test_a_preview_is_drawn_alone_beside_the_training(model: Model) -> None:
    rows: list[int] = []
    model.vae.decoder.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    model.unet.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    previews = Previews(["sks dog"] * 5, 32, lambda step, images: None, pytest.fail)
    previews.draw(model, 1, settings(preview_guidance_scale=4.0))
    assert set(rows) == {1, 2}  # a picture; with guidance the UNet sees it twice


def test_previews_that_find_no_memory_cost_nothing_but_themselves(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def draw(*arguments: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    monkeypatch.setattr(previews_module, "draw", draw)
    said: list[str] = []
    previews = Previews(["sks dog"], 32, lambda step, images: pytest.fail("nothing was drawn"), said.append)
    history = run(model, None, Listeners(previews=previews), preview_steps=3)
    assert len(history.steps) == 6
    assert said == [
        f"warning: no previews after step {step}: CUDA out of memory. Tried to allocate 9 GiB" for step in (3, 6)
    ]
