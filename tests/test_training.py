"""The training on a tiny real pipeline: what moves, what must not, and what is the same however it is split."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_project import REPOSITORY, make_photo

from dreambooth.dataset import Sample
from dreambooth.errors import TrainingError
from dreambooth.families import drawn_sizes
from dreambooth.latents import encode_image
from dreambooth.models import Model, load_model
from dreambooth.params import Train, load_params
from dreambooth.schedule import learning_rate_at, max_train_steps
from dreambooth.trainer import require_float32
from dreambooth.training import Listeners, StepRecord, train

GOLDEN = Path(__file__).parent / "golden/training.json"


@pytest.fixture
def model(tiny_model_folder: Path) -> Model:
    return load_model(tiny_model_folder, device="cpu")


def settings(**changes: Any) -> Train:
    values = load_params(REPOSITORY / "params.yaml").train.model_dump()
    values |= {"max_train_steps": 4, "train_batch_size": 2, "learning_rate": 1e-3, "lr_scheduler": "constant"}
    values |= {"snr_gamma": 5.0, "evaluation_steps": None, "preview_steps": None}
    return Train(**values | changes)


def make_samples(model: Model, count: int, role: Any, prompt: str) -> list[Sample]:
    first = 0 if role == "instance" else 100
    return [
        Sample(f"{role}-{i}", encode_image(model, make_photo(first + i, 32)), prompt, role, drawn_sizes(32))
        for i in range(count)
    ]


def run(model: Model, prior_count: int = 4, **changes: Any) -> list[StepRecord]:
    instance = make_samples(model, 3, "instance", "a photo of sks dog")
    prior = make_samples(model, prior_count, "prior", "a photo of a dog")
    return train(model, instance, prior, settings(**changes)).steps


def weights(model: Model) -> dict[str, torch.Tensor]:
    parts = {"unet": model.unet, "text_encoder": model.text_encoder, "vae": model.vae}
    return {
        f"{part}.{name}": value.clone() for part, module in parts.items() for name, value in module.state_dict().items()
    }


def largest_difference(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    return max((one[name].float() - two[name].float()).abs().max().item() for name in one)


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize(("text_encoder", "expected"), [(True, {"unet", "text_encoder"}), (False, {"unet"})])
def test_only_the_chosen_parts_move_and_the_autoencoder_stays_bit_identical(
    model: Model, text_encoder: bool, expected: set[str]
) -> None:
    before = weights(model)
    run(model, train_text_encoder=text_encoder)
    assert moved(before, weights(model)) == expected
    assert not any(parameter.requires_grad for parameter in model.unet.parameters())
    assert not model.unet.training


def test_the_loss_falls(model: Model) -> None:
    history = run(model, max_train_steps=60, learning_rate=3e-3)
    losses = [record.loss for record in history]
    assert sum(losses[-15:]) < 0.8 * sum(losses[:15])


def test_the_same_seed_gives_the_same_weights_and_another_does_not(tiny_model_folder: Path) -> None:
    ends = []
    for seed in (0, 0, 1):
        model = load_model(tiny_model_folder, device="cpu")
        torch.manual_seed(len(ends))  # the global generator has no say
        run(model, seed=seed)
        ends.append(weights(model))
    assert largest_difference(ends[0], ends[1]) == 0
    assert largest_difference(ends[0], ends[2]) > 0


@pytest.mark.parametrize(("batch", "accumulation"), [(2, 2), (1, 4)])
def test_accumulation_gives_the_step_of_the_whole_batch(tiny_model_folder: Path, batch: int, accumulation: int) -> None:
    ends, histories = [], []
    for changes in ({"train_batch_size": 4}, {"train_batch_size": batch, "gradient_accumulation_steps": accumulation}):
        model = load_model(tiny_model_folder, device="cpu")
        # a large epsilon keeps Adam from blowing rounding differences of tiny gradients up to whole steps
        histories.append(run(model, max_train_steps=3, adam_epsilon=1e-2, **changes))
        ends.append(weights(model))
    assert largest_difference(*ends) < 1e-6
    for whole, split in zip(*histories, strict=True):
        assert math.isclose(whole.loss, split.loss, rel_tol=1e-4)
        assert math.isclose(whole.loss_instance, split.loss_instance, rel_tol=1e-4)
        assert math.isclose(whole.grad_norm, split.grad_norm, rel_tol=1e-3)


def test_gradients_are_clipped_to_the_norm(model: Model) -> None:
    seen: list[float] = []
    step = torch.optim.AdamW.step

    def watch(self: Any, *arguments: Any, **named: Any) -> Any:
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        seen.append(torch.stack([gradient.norm() for gradient in gradients]).norm().item())
        return step(self, *arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", watch)
        history = run(model, max_grad_norm=0.01)
    assert all(record.grad_norm > 0.02 for record in history)
    assert seen == pytest.approx([0.01] * 4, rel=1e-3)


def test_the_two_losses_are_reported_apart_and_add_up(model: Model) -> None:
    for record in run(model, prior_loss_weight=0.5, snr_gamma=None):
        assert record.loss == pytest.approx(record.loss_instance + 0.5 * record.loss_prior, rel=1e-5)


def test_without_class_images_there_is_no_prior_loss(model: Model) -> None:
    history = run(model, prior_count=0)
    assert all(math.isnan(record.loss_prior) for record in history)
    assert all(math.isfinite(record.loss) for record in history)


def test_the_weight_of_the_prior_changes_the_training(tiny_model_folder: Path) -> None:
    ends = []
    for weight in (1.0, 0.1):
        model = load_model(tiny_model_folder, device="cpu")
        run(model, prior_loss_weight=weight)
        ends.append(weights(model))
    assert largest_difference(*ends) > 0


def test_a_loss_that_is_not_finite_stops_the_training_with_its_step(model: Model) -> None:
    with torch.no_grad():
        model.unet.conv_out.bias.fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"the loss is nan, .* at step 0: .*learning_rate"):
        run(model)


def test_a_gradient_that_is_not_finite_stops_the_training(model: Model) -> None:
    def spoil(module: Any, inputs: Any, output: torch.Tensor) -> None:
        output.register_hook(lambda gradient: gradient * float("inf"))

    model.unet.conv_in.register_forward_hook(spoil)
    with pytest.raises(TrainingError, match=r"the gradient's norm (nan|inf) at step 0"):
        run(model)


def test_weights_below_float32_are_refused() -> None:
    with pytest.raises(TrainingError, match="float32"):
        require_float32([torch.nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))])


def test_bfloat16_autocast_keeps_float32_weights_and_noise(model: Model) -> None:
    dtypes: set[tuple[torch.dtype, torch.dtype]] = set()
    model.unet.conv_in.register_forward_hook(lambda _, inputs, output: dtypes.add((inputs[0].dtype, output.dtype)))
    history = run(model, mixed_precision="bf16")
    assert dtypes == {(torch.float32, torch.bfloat16)}
    assert {parameter.dtype for parameter in model.unet.parameters()} == {torch.float32}
    assert all(math.isfinite(record.loss) for record in history)


def test_half_precision_without_a_gpu_is_refused(model: Model) -> None:
    with pytest.raises(TrainingError, match="fp16 needs a GPU"):
        run(model, mixed_precision="fp16")


def test_gradient_checkpointing_gives_the_same_training(tiny_model_folder: Path) -> None:
    histories, calls = [], []
    for checkpointing in (False, True):
        model = load_model(tiny_model_folder, device="cpu")
        seen: list[int] = []
        model.unet.down_blocks[0].resnets[0].conv1.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        histories.append(run(model, gradient_checkpointing=checkpointing))
        calls.append(len(seen))
    assert calls == [4, 8]  # once in the forward pass, once more in the backward pass
    for plain, recomputed in zip(*histories, strict=True):
        assert plain.loss == pytest.approx(recomputed.loss, rel=1e-5)


def test_records_arrive_in_order_and_each_once(model: Model) -> None:
    arrived: list[StepRecord] = []
    instance = make_samples(model, 3, "instance", "a photo of sks dog")
    history = train(model, instance, [], settings(max_train_steps=23), Listeners(records=arrived.extend)).steps
    assert [record.step for record in arrived] == list(range(23))
    assert [asdict(one)["loss"] for one in arrived] == [asdict(one)["loss"] for one in history]


def test_a_subject_prompt_never_meets_a_class_image(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    from dreambooth import trainer as stepping

    pairs: set[tuple[bool, str]] = set()
    forward = stepping.forward

    def watch(trainer: Any, batch: Any) -> Any:
        pairs.update(zip(batch.is_instance.tolist(), batch.prompts, strict=True))
        return forward(trainer, batch)

    monkeypatch.setattr(stepping, "forward", watch)
    run(model, train_batch_size=3, gradient_accumulation_steps=2)
    assert pairs == {(True, "a photo of sks dog"), (False, "a photo of a dog")}


def test_a_frozen_text_encoder_runs_once(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    forward = model.text_encoder.forward
    monkeypatch.setattr(
        model.text_encoder, "forward", lambda ids, **more: (calls.append(len(ids)), forward(ids, **more))[1]
    )
    run(model, train_text_encoder=False)
    assert calls == [2]


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_target_is_the_one_that_the_model_predicts(
    model: Model, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dreambooth import loss

    targets: list[str] = []
    original = loss.prediction_target
    monkeypatch.setattr(loss, "prediction_target", lambda *given: (targets.append(given[0]), original(*given))[1])
    model.scheduler_config["prediction_type"] = kind
    run(model)
    assert targets == [kind] * 4


def test_a_model_that_predicts_anything_else_is_refused(model: Model) -> None:
    model.scheduler_config["prediction_type"] = "sample"
    with pytest.raises(TrainingError, match="predicts 'sample'"):
        run(model)


@pytest.mark.parametrize(
    ("scheduler", "warmup", "expected"),
    [
        ("constant", 0, [1, 1, 1, 1]),
        ("constant", 2, [0.5, 1, 1, 1]),
        ("linear", 0, [1, 0.75, 0.5, 0.25]),
        ("linear", 2, [0.5, 1, 1, 0.5]),
        ("cosine", 0, [1, 0.5 + 0.5 * math.cos(math.pi / 4), 0.5, 0.5 - 0.5 * math.cos(math.pi / 4)]),
    ],
)
def test_the_learning_rate_by_hand(scheduler: str, warmup: int, expected: Sequence[float]) -> None:
    values = settings(lr_scheduler=scheduler, lr_warmup_steps=warmup, learning_rate=1.0)
    assert [learning_rate_at(step, values, 4) for step in range(4)] == pytest.approx(expected)


@pytest.mark.parametrize(("photos", "steps"), [(1, 400), (5, 500), (12, 1200), (100, 1200)])
def test_unset_steps_follow_the_number_of_photos(photos: int, steps: int) -> None:
    assert max_train_steps(settings(max_train_steps=None), photos) == steps
    assert max_train_steps(settings(max_train_steps=7), photos) == 7


def test_the_losses_are_those_that_were_recorded(model: Model) -> None:
    """Renew after a wanted change: RENEW_GOLDEN=1 python -m pytest tests/test_training.py -k recorded."""
    losses = [record.loss for record in run(model, gradient_accumulation_steps=2, snr_gamma=5.0)]
    if os.environ.get("RENEW_GOLDEN"):
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(json.dumps(losses) + "\n")
    assert losses == pytest.approx(json.loads(GOLDEN.read_text()), rel=2e-3)
