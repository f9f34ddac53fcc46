"""Aspect buckets: each photo at the nearest size, no batch of two sizes, the same step however it is split."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_training import largest_difference, make_samples, settings, weights
from tiny_families import write_sdxl
from tiny_project import make_photo, make_project, tiny_values
from toy_checkpoints import open_checkpoints

from dreambooth import trainer as stepping
from dreambooth.checkpoint import Checkpoints
from dreambooth.dataset import Sample, by_shape, rows_of_step
from dreambooth.evaluation_loss import PLACES, fixed_batches
from dreambooth.interruption import Interrupted
from dreambooth.latents import encode_image
from dreambooth.models import Model, load_model
from dreambooth.params import load_params
from dreambooth.training import History, Listeners, StepRecord, train
from dreambooth.views import Size, buckets, nearest, views_of
from stages import prior, validate
from stages import train as train_stage

SIZES = buckets(32, 4)
SIDES = st.integers(16, 4000)


def test_buckets_of_sdxl_are_those_it_was_trained_with() -> None:
    """Podell et al. 2023, appendix I: of each height there the one with the most pixels, either way round."""
    lying = [(2048, 512), (1792, 576), (1600, 640), (1472, 704), (1344, 768), (1216, 832), (1152, 896), (1088, 960)]
    assert buckets(1024, 32)[0] == (1024, 1024)
    assert set(buckets(1024, 32)) == {(1024, 1024), *lying, *(size[::-1] for size in lying)}


@pytest.mark.parametrize(("resolution", "whole"), [(512, 64), (768, 64), (64, 16), (32, 4), (520, 64)])
def test_sides_are_whole_at_every_level_and_pixels_about_those_of_the_square(resolution: int, whole: int) -> None:
    square, *others = buckets(resolution, whole)
    assert square == (resolution, resolution)
    assert len(others) >= 2
    for wide, high in others:
        assert wide % whole == high % whole == 0
        assert resolution**2 / 2 < wide * high <= resolution**2
        assert (high, wide) in others


@given(SIDES, SIDES)
def test_every_photo_lands_in_the_nearest_bucket(width: int, height: int) -> None:
    wide, high = nearest((width, height), SIZES)
    distance = abs(math.log(wide / high) - math.log(width / height))
    assert all(distance <= abs(math.log(w / h) - math.log(width / height)) + 1e-12 for w, h in SIZES)
    assert nearest((height, width), SIZES) == (high, wide)


def test_a_view_has_the_size_of_its_bucket_and_says_where_it_was_cut() -> None:
    picture = make_photo(3, 184).crop((0, 0, 180, 100))
    size = nearest(picture.size, SIZES)
    assert size == (40, 24)
    views = views_of(picture, size, 2, True, 0, 0)
    assert {view.size for view, _ in views} == {size}
    (_, sizes), (_, moved), *_ = views
    part = 100 * 40 / 24  # of the width of 180, at the whole height
    assert sizes == (100, 180, 0, round((180 - part) / 2 * 40 / part), 24, 40)
    assert moved[2] == 0
    assert 0 <= moved[3] <= (180 - part) * 40 / part


@given(SIDES, SIDES, st.integers(1, 3))
def test_no_part_mixes_shapes_and_none_loses_a_row(width: int, height: int, batch: int) -> None:
    shapes = [(4, *size) for size in (nearest((width, height), SIZES), (32, 32), (24, 40))]
    zeros = {shape: torch.zeros(1).expand(shape) for shape in shapes}
    rows = [(number, shapes[number % 3]) for number in range(batch * 3)]
    parts = by_shape(rows, lambda row: zeros[row[1]])
    assert all(len({shape for _, shape in part}) == 1 for part in parts)
    assert sorted(row for part in parts for row in part) == rows
    assert len(parts) == len(set(shapes))


@pytest.fixture
def model(tiny_model_folder: Path) -> Model:
    return load_model(tiny_model_folder, device="cpu")


def photos_of(model: Model, sizes: list[Size]) -> list[Sample]:
    """Return samples as the stage makes them of photos whose proportions are those of their buckets."""
    samples = []
    for number, (wide, high) in enumerate(sizes):
        picture = make_photo(number, 96).resize((wide * 2, high * 2), Image.Resampling.LANCZOS)
        ((view, told),) = views_of(picture, nearest(picture.size, SIZES), 0, False, 0, number)
        samples.append(Sample(f"{number}", encode_image(model, view), "a photo of sks dog", "instance", told))
    return samples


MIXED = [(32, 32), (40, 24), (24, 40), (40, 24)]


def run(model: Model, checkpoints: Checkpoints | None = None, **changes: Any) -> History:
    prior = make_samples(model, 3, "prior", "a photo of a dog")
    listeners = changes.pop("listeners", None)
    return train(model, photos_of(model, MIXED), prior, settings(**changes), listeners, checkpoints)


def test_no_batch_mixes_sizes_and_every_row_is_trained_on(model: Model) -> None:
    shapes: list[torch.Size] = []
    model.unet.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape))
    run(model, max_train_steps=8, train_batch_size=2)
    assert sum(shape[0] for shape in shapes) == 8 * 4
    assert {shape[2:] for shape in shapes} == {(16, 16), (12, 20), (20, 12)}


@pytest.mark.parametrize(("batch", "accumulation"), [(2, 2), (1, 4)])
def test_rows_of_several_sizes_are_one_step_however_they_are_split(
    tiny_model_folder: Path, batch: int, accumulation: int
) -> None:
    ends, histories = [], []
    for changes in ({"train_batch_size": 4}, {"train_batch_size": batch, "gradient_accumulation_steps": accumulation}):
        model = load_model(tiny_model_folder, device="cpu")
        histories.append(run(model, max_train_steps=3, adam_epsilon=1e-2, **changes).steps)
        ends.append(weights(model))
    assert largest_difference(*ends) < 1e-6
    for whole, split in zip(*histories, strict=True):
        assert math.isclose(whole.loss, split.loss, rel_tol=1e-4)
        assert math.isclose(whole.loss_prior, split.loss_prior, rel_tol=1e-4)


def test_the_loss_of_a_step_is_equation_2_over_all_of_its_sizes(model: Model) -> None:
    for record in run(model, train_batch_size=4, prior_loss_weight=0.5, snr_gamma=None).steps:
        assert record.loss == pytest.approx(record.loss_instance + 0.5 * record.loss_prior, rel=1e-5)


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_a_stopped_training_goes_on_to_the_same_bits(tiny_model_folder: Path, tmp_path: Path, stop_after: int) -> None:
    straight, resumed = (load_model(tiny_model_folder, device="cpu") for _ in range(2))
    run(straight)

    def stop(records: list[StepRecord]) -> None:
        if records[-1].step == stop_after:
            raise Interrupted("stopped by the test")

    store, stopped = open_checkpoints(tmp_path / "checkpoints"), load_model(tiny_model_folder, device="cpu")
    with pytest.raises(Interrupted):
        run(stopped, store, checkpointing_steps=1, listeners=Listeners(records=stop))
    history = run(resumed, store, checkpointing_steps=1)
    assert len(history.steps) == 4
    assert largest_difference(weights(straight), weights(resumed)) == 0


def test_the_loss_at_fixed_noise_is_measured_size_by_size(model: Model) -> None:
    samples = photos_of(model, MIXED)
    batches = [*fixed_batches(samples, "instance", 1000, 0, 5)]
    assert [len(batch.timesteps) for batch in batches] == [4, 5, 3, 4]
    alone = [*fixed_batches(samples[:2], "instance", 1000, 0, len(PLACES))]
    assert torch.equal(batches[1].noise[:4], alone[1].noise)  # by the place of the sample, not of its batch
    assert run(model, evaluation_steps=2).evaluations[-1].loss_instance > 0


def test_every_row_of_sdxl_keeps_the_sizes_of_its_bucket(tiny_model_folder: Path, tmp_path: Path) -> None:
    model = load_model(write_sdxl(tmp_path / "sdxl", tiny_model_folder), device="cpu")
    instance, class_rows = photos_of(model, MIXED), make_samples(model, 3, "prior", "a photo of a dog")
    seen: list[tuple[tuple[int, ...], list[float]]] = []

    def note(_: Any, inputs: Any, named: Any) -> None:
        for row, told in zip(inputs[0], named["added_cond_kwargs"]["time_ids"].tolist(), strict=True):
            seen.append((tuple(row.shape[1:]), told))

    model.unet.register_forward_pre_hook(note, with_kwargs=True)
    values = settings(max_train_steps=2, train_text_encoder=False)
    train(model, instance, class_rows, values)
    expected = []
    for step in range(2):
        rows = rows_of_step(step, 2, instance, class_rows, 1.0, values.seed)
        for part in by_shape(rows, lambda row: row.sample.posterior.mean):
            expected += [(tuple(row.sample.posterior.mean.shape[1:]), list(row.sample.sizes or ())) for row in part]
    assert seen == expected
    assert {tuple(told[4:]) for _, told in seen} == {(32.0, 32.0), (24.0, 40.0), (40.0, 24.0)}
    for (high, wide), told in seen:
        assert told[4:] == [2 * high, 2 * wide]


def test_the_stage_prepares_photos_of_all_proportions_and_off_means_squares(
    tmp_path: Path, tiny_model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_project(tmp_path / "project", tiny_model_folder, tiny_values())
    for number, size in enumerate([(160, 96), (96, 160), (96, 96), (150, 100), (96, 96)]):
        make_photo(number, 160).crop((0, 0, *size)).save(root / f"data/subjects/biscuit/{number:02d}.png")
    params = load_params(root / "params.yaml")
    validate.run(params, "biscuit", root)
    prior.run(params, "dog", root)
    model, told = load_model(root / "data/base/tiny"), []
    for on in (False, True):
        values = params.model_copy(update={"train": params.train.model_copy(update={"aspect_buckets": on})})
        samples = train_stage._instance_samples(values, "biscuit", root, model, "vae")
        told.append([tuple(sample.posterior.mean.shape[1:]) for sample in samples])
    assert told[0] == [(16, 16)] * 5
    assert told[1] == [(12, 20), (20, 12), (16, 16), (12, 20), (16, 16)]
    assert "buckets: 2 of 40 x 24, 1 of 24 x 40, 2 of 32 x 32 pixels" in capsys.readouterr().out
    assert model.whole_side == 4
    values = params.model_copy(update={"train": params.train.model_copy(update={"aspect_buckets": True})})
    train_stage.run(values, "biscuit", root)
    assert (root / "models/biscuit/loss.csv").is_file()


def test_the_teacher_predicts_rows_of_every_size(model: Model) -> None:
    from dataclasses import replace

    instance = photos_of(model, MIXED)
    class_rows = [replace(sample, prompt="a photo of a dog", role="prior", taught=True) for sample in instance]
    history = train(model, instance, class_rows, settings(method="lora", learning_rate=1e-2))
    assert history.steps[0].loss_prior < 1e-9 < history.steps[-1].loss_prior


def test_a_step_that_does_not_fit_is_halved_with_its_sizes(
    tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = []
    for fails in (False, True):
        model = load_model(tiny_model_folder, device="cpu")
        forward, left = stepping.forward, [int(fails)]

        def scarce(trainer: Any, batch: Any, forward: Any = forward, left: list[int] = left) -> Any:
            if left.pop() if left else 0:
                raise torch.OutOfMemoryError("a test")
            return forward(trainer, batch)

        with monkeypatch.context() as patch:
            patch.setattr(stepping, "forward", scarce)
            run(model, train_batch_size=4, adam_epsilon=1e-2, max_train_steps=2)
        ends.append(weights(model))
    assert largest_difference(*ends) < 1e-6
