"""Options of the loss, of the noise, of the photos, of the optimizer, and of the end: each does what it says."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from test_training import largest_difference, make_samples, settings, weights
from tiny_project import make_photo
from toy_checkpoints import open_checkpoints

from dreambooth import rng, trainer
from dreambooth.averaging import Average
from dreambooth.checkpoint import Checkpoints
from dreambooth.dataset import Posterior, Sample, collate, rows_of_step
from dreambooth.errors import OutOfMemoryError, TrainingError, is_out_of_memory
from dreambooth.images import to_square
from dreambooth.loss import row_losses
from dreambooth.models import Model, load_model
from dreambooth.optimizers import EXTRAS
from dreambooth.training import History, train
from dreambooth.views import views_of

ROLES = {"instance": "sks dog", "prior": "a dog"}


@pytest.fixture
def model(tiny_model_folder: Path) -> Model:
    return load_model(tiny_model_folder, device="cpu")


def run(model: Model, checkpoints: Checkpoints | None = None, **changes: Any) -> History:
    instance, prior = (make_samples(model, 3, role, f"a photo of {words}") for role, words in ROLES.items())
    return train(model, instance, prior, settings(**changes), None, checkpoints)


@pytest.mark.parametrize("B", [1, 2, 3])
def test_huber_is_the_square_near_zero_and_the_magnitude_far_away(B: int) -> None:
    differences = torch.tensor([1e-3, 100.0, 2.0])[:B]
    losses = row_losses(differences[:, None, None, None].expand(B, 4, 3, 2), torch.zeros(B, 4, 3, 2), 0.1)
    near, far, by_hand = 1e-6, 0.2 * (100.0 - 0.1), 0.2 * ((4 + 0.01) ** 0.5 - 0.1)
    assert losses.tolist() == pytest.approx([near, far, by_hand][:B], rel=1e-3)


def test_the_offset_shifts_whole_channels_of_the_noise_by_the_row() -> None:
    sample = Sample("a", Posterior(torch.zeros(4, 8, 8), torch.zeros(4, 8, 8)), "a", "instance")
    rows = rows_of_step(5, 3, [sample], [], 1.0, 0)
    plain, shifted = (collate(rows, 5, 1000, 0, offset, 3).noise for offset in (0.0, 0.1))
    shift = (shifted - plain) / 0.1
    assert torch.allclose(shift, shift[:, :, :1, :1].expand_as(shift), atol=1e-5)
    expected = rng.normal((4, 1, 1), 0, "noise-offset", 5, [0, 1, 2])
    assert torch.allclose(shift[:, :, :1, :1], expected, atol=1e-5)


def test_options_of_loss_and_noise_change_the_training(tiny_model_folder: Path) -> None:
    ends = []
    for changes in ({}, {"huber_c": 0.1}, {"noise_offset": 0.1}):
        model = load_model(tiny_model_folder, device="cpu")
        run(model, **changes)
        ends.append(weights(model))
    assert largest_difference(ends[0], ends[1]) > 0
    assert largest_difference(ends[0], ends[2]) > 0


def test_views_are_squares_along_the_longer_side_and_their_mirror_images() -> None:
    picture = make_photo(3, 96).crop((0, 0, 64, 96))
    views = views_of(picture, (32, 32), 2, True, 0, 0)
    assert len(views) == 6
    (middle, sizes), (second, places), *_ = views
    assert middle.tobytes() == to_square(picture, 32).tobytes()
    assert sizes == (96, 64, 8, 0, 32, 32)
    assert places[:2] == (96, 64)
    assert 0 <= places[2] <= 16
    assert second.tobytes() != middle.tobytes()
    assert views[3][0].transpose(Image.Transpose.FLIP_LEFT_RIGHT).tobytes() == middle.tobytes()
    assert [sizes for _, sizes in views[3:]] == [sizes for _, sizes in views[:3]]


def test_a_mirrored_view_begins_as_far_from_the_left_as_the_view_ends_from_the_right() -> None:
    picture = make_photo(3, 96).crop((0, 0, 96, 64))  # 32 pixels wider than high: 16 of a view of half the size
    views = views_of(picture, (32, 32), 2, True, 0, 0)
    for (_, sizes), (_, mirrored) in zip(views[:3], views[3:], strict=True):
        assert mirrored == (64, 96, 0, 16 - sizes[3], 32, 32)
    assert len({sizes[3] for _, sizes in views}) > 2


def test_a_square_photo_has_one_place_and_no_option_one_view() -> None:
    picture = Image.linear_gradient("L").convert("RGB")
    assert len(views_of(picture, (32, 32), 5, False, 0, 0)) == 1
    assert len(views_of(picture.resize((300, 200)), (32, 32), 0, False, 0, 0)) == 1


def test_a_row_takes_each_view_at_times_the_same_one_in_every_split() -> None:
    views = [(Posterior(torch.full((1, 2, 2), float(i)), torch.zeros(1, 2, 2)), (i,) * 6) for i in range(3)]
    sample = Sample("a", views[0][0], "a", "instance", views[0][1], variants=tuple(views[1:]))
    seen = []
    for step in range(20):
        rows = rows_of_step(step, 2, [sample], [], 1.0, 0)
        whole = collate(rows, step, 1000, 0, 0.0, 2)
        assert whole.sizes is not None
        assert whole.latents[:, 0, 0, 0].tolist() == whole.sizes[:, 0].tolist()
        assert torch.equal(torch.cat([collate([row], step, 1000, 0, 0.0, 1).latents for row in rows]), whole.latents)
        seen += whole.latents[:, 0, 0, 0].tolist()
    assert set(seen) == {0.0, 1.0, 2.0}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes", True),
        ("CUDA error: out of memory", True),
        ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("GET was unable to find an engine to execute this computation", True),
        ("CUDA error: an illegal memory access was encountered", False),
        ("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED", False),
    ],
)
def test_a_lack_of_memory_is_known_by_the_words_of_every_library(words: str, expected: bool) -> None:
    assert is_out_of_memory(RuntimeError(words)) == expected
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert is_out_of_memory(MemoryError("std::bad_alloc"))


def test_the_average_by_hand() -> None:
    weight = torch.zeros(2)
    average = Average({"w": weight}, 0.5)
    for step, expected in ((0, 0.9), (1, 0.9 + (2 - 0.9) * (1 - 2 / 11))):
        weight.fill_(step + 1.0)
        average.update([weight], step)
        assert torch.allclose(average.values["w"], torch.full((2,), expected))
    weight.fill_(0.0)
    average.update([weight], 1000)  # by now the decay itself
    assert torch.allclose(average.values["w"], torch.full((2,), 0.5 * expected))


def test_the_average_is_shipped_and_lies_between_the_first_and_the_last_weights(tiny_model_folder: Path) -> None:
    first, plain, averaged = (load_model(tiny_model_folder, device="cpu") for _ in range(3))
    losses = [record.loss for record in run(plain, max_train_steps=8).steps]
    history = run(averaged, max_train_steps=8, ema_decay=0.999)
    assert [record.loss for record in history.steps] == losses
    assert history.shipped_step is None  # no single one
    way, part = (largest_difference(weights(first), weights(model)) for model in (plain, averaged))
    assert 0 < part < way


def test_memory_that_runs_out_is_first_saved_by_computing_again_then_by_halves(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    expected = run(load_model(tiny_model_folder, device="cpu")).steps
    model = load_model(tiny_model_folder, device="cpu")
    fits = [False, True, False, False, True]
    original = trainer.forward

    def forward(own: Any, batch: Any) -> Any:
        if batch.timesteps.shape[0] == 4 and fits and not fits.pop(0):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return original(own, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "forward", forward)
        history = run(model, open_checkpoints(tmp_path), gradient_checkpointing="auto", checkpointing_steps=1)
    for mine, theirs in zip(history.steps, expected, strict=True):
        assert mine.loss == pytest.approx(theirs.loss, rel=1e-4)
    state = open_checkpoints(tmp_path).newest()
    assert state is not None
    assert (state.plain["checkpointing"], state.plain["parts"]) == (True, 2)
    again = load_model(tiny_model_folder, device="cpu")
    run(again, open_checkpoints(tmp_path), gradient_checkpointing="auto", checkpointing_steps=1)
    assert again.unet.is_gradient_checkpointing


def test_a_step_that_never_fits_says_what_was_tried(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(*arguments: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    monkeypatch.setattr(trainer, "forward", forward)
    with pytest.raises(OutOfMemoryError, match="at step 0, at half the batch too"):
        run(model, gradient_checkpointing="auto")


@pytest.mark.parametrize("name", EXTRAS)
def test_an_optimizer_that_is_not_installed_is_named_with_its_remedy(
    model: Model, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    package, extra = EXTRAS[name]
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(TrainingError, match=rf"train\.optimizer: {name} needs the package {package}.*\[{extra}\]"):
        run(model, optimizer=name)


@pytest.mark.parametrize(
    ("optimizer", "package", "how"),
    [
        ("prodigy", "prodigyopt", {"learning_rate": 1.0, "method": "lora", "rank": 2}),
        ("adamw_8bit", "bitsandbytes", {"learning_rate": 1e-3}),  # keeps the moments of under 4,096 weights in float32
    ],
)
def test_optimizers_of_other_packages_learn_and_resume_exactly(
    tiny_model_folder: Path, tmp_path: Path, optimizer: str, package: str, how: dict[str, Any]
) -> None:
    pytest.importorskip(package)
    how |= {"optimizer": optimizer, "checkpointing_steps": 2}
    straight, stopped, resumed = (load_model(tiny_model_folder, device="cpu") for _ in range(3))
    losses = [record.loss for record in run(straight, max_train_steps=6, **how).steps]
    run(stopped, open_checkpoints(tmp_path), max_train_steps=5, **how)
    history = run(resumed, open_checkpoints(tmp_path), max_train_steps=6, **how)
    assert [record.loss for record in history.steps] == losses
    assert largest_difference(weights(straight), weights(resumed)) == 0
    early, late = (open_checkpoints(tmp_path).load_step(step) for step in (2, 4))
    assert largest_difference(early.weights, late.weights) > 0
    if optimizer == "adamw_8bit":
        assert {moment.dtype for moment in late.moments.values()} == {torch.uint8, torch.float32}


def test_without_previews_frozen_text_encoders_leave_the_memory_and_the_training_is_the_same(
    tiny_model_folder: Path,
) -> None:
    whole, spare = (load_model(tiny_model_folder, device="cpu") for _ in range(2))
    samples = [make_samples(whole, 3, role, f"a photo of {words}") for role, words in ROLES.items()]
    spare.vae = None
    for model in (whole, spare):
        train(model, *samples, settings(train_text_encoder=False))
    assert spare.text_encoder is None
    assert whole.text_encoder is not None
    assert all(
        torch.equal(one, other) for one, other in zip(whole.unet.parameters(), spare.unet.parameters(), strict=True)
    )


def test_tf32_is_as_it_is_set(model: Model) -> None:
    for allowed in (False, True):
        run(model, max_train_steps=1, allow_tf32=allowed)
        assert torch.backends.cuda.matmul.allow_tf32 == allowed
