"""What takes another way through the code on a GPU: `python -m pytest -m gpu tests/test_gpu.py` (`make gpu`).

Expected to take a minute or two, not run on any yet. `make nightly` runs what it can of them on a CPU, so that they are
right when a card appears.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from test_methods import METHODS
from test_training import make_samples, settings
from tiny_pipelines import write_sd, write_sdxl
from tiny_project import make_project, tiny_values, write_params
from torch import Tensor
from toy_checkpoints import open_checkpoints

from dreambooth import dataset, methods
from dreambooth.checkpoint import Checkpoints, State
from dreambooth.dataset import Posterior, Sample
from dreambooth.families import drawn_sizes
from dreambooth.interruption import Interrupted
from dreambooth.models import load_model
from dreambooth.params import Train, load_params
from dreambooth.sampling import SCHEDULERS, SamplerSettings, draw
from dreambooth.trainer import Trainer, capture, prepare, release, restore, take_step
from dreambooth.training import Listeners, StepRecord, train
from stages import evaluate, export, prior, validate
from stages import train as train_stage

MOST_SKIPPED = 20  # steps that the scaler of fp16 skips until its scale fits: it is halved each time, from 2^16
# How far a step may be from that of the CPU in float32: losses and norm relative, and the angle between gradients.
# On a CPU bf16 is 1e-2 and 1 - 6e-4.
LOSS = {"no": 1e-3, "bf16": 3e-2, "fp16": 1e-2}
COSINE = {"no": 0.9999, "bf16": 0.99, "fp16": 0.998}
# How far weights may be from those of the same steps, as a part of their way: a GPU adds up in another order each time.
# Without the moments a resumed training is half of the way off.
AGAIN = 0.1


@pytest.fixture(params=[pytest.param("cpu", marks=pytest.mark.nightly), pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU that torch can use, or it is hidden: python -m pytest -m gpu shows it")
    return torch.device("cuda", 0) if request.param == "cuda" else torch.device("cpu")


@pytest.fixture(scope="module", params=["sd1", "sdxl"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / request.param
    return write_sdxl(folder) if request.param == "sdxl" else write_sd(folder)


@dataclass(frozen=True)
class Step:
    """What came of one step."""

    numbers: dict[str, float]
    gradient: Tensor
    """Of all weights, clipped, as the optimizer remembers it."""
    parts: int
    checkpointing: bool


@contextmanager
def prepared(
    base: Path, device: torch.device, values: Train, samples: Sequence[Sample]
) -> Iterator[tuple[Trainer, Callable[[int], dict[str, Tensor]]]]:
    """Yield a trainer, and what takes a step by its number."""
    model = load_model(base, device=device, unet_dtype=methods.frozen_dtype(values))
    methods.add_token(model, values, "sks", "dog")
    chosen = [sample for sample in samples if sample.role == "instance" or values.reads_class_rows]
    by_role = [[sample for sample in chosen if sample.role == role] for role in ("instance", "prior")]
    trainer = prepare(model, chosen, values)

    def take(step: int) -> dict[str, Tensor]:
        rows = dataset.rows_of_step(step, trainer.rows_per_step, *by_role, values.prior_loss_weight, values.seed)
        for _ in range(MOST_SKIPPED):
            told = take_step(trainer, rows, step, values.learning_rate)
            # The flag of accelerate says nothing of this where the fused kernel skips by itself.
            if told["grad_norm"].isfinite():
                break
        return told

    try:
        yield trainer, take
    finally:
        release(model)


def one_step(base: Path, device: torch.device, values: Train, samples: Sequence[Sample]) -> Step:
    with prepared(base, device, values, samples) as (trainer, take):
        told = take(0)
        moments = capture(trainer, 1, {}).moments
        rows = [moments[name].cpu().flatten() for name in sorted(moments) if name.endswith("/exp_avg")]
        numbers = {name: value.item() for name, value in told.items()}
        return Step(numbers, torch.cat(rows), trainer.parts, trainer.checkpointing)


def photos(base: Path) -> list[Sample]:
    """Return rows whose latents the CPU has encoded, three of the subject and three of its class."""
    model = load_model(base, device="cpu")
    instance = make_samples(model, 3, "instance", "a photo of sks dog")
    return instance + make_samples(model, 3, "prior", "a photo of a dog")


def assert_near(found: Step, wanted: Step, precision: str) -> None:
    assert found.numbers == pytest.approx(wanted.numbers, rel=LOSS[precision], nan_ok=True)
    cosine = torch.nn.functional.cosine_similarity(found.gradient, wanted.gradient, dim=0)
    assert cosine > COSINE[precision]


def require(device: torch.device, precision: str) -> None:
    if precision == "fp16" and device.type == "cpu":
        pytest.skip("a CPU does not train in fp16")


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("how", [*({"method": one} for one in METHODS), {"method": "lora", "use_dora": True}])
def test_a_step_is_that_of_the_cpu_in_float32(
    base: Path, device: torch.device, how: dict[str, Any], precision: str
) -> None:
    require(device, precision)
    values = settings(**how, rank=2, lora_alpha=2.0, train_text_encoder=True, allow_tf32=False)
    samples = photos(base)
    wanted = one_step(base, torch.device("cpu"), values, samples)
    found = one_step(base, device, values.model_copy(update={"mixed_precision": precision}), samples)
    assert_near(found, wanted, precision)


@pytest.mark.parametrize(
    "changes",
    [{}, {"mixed_precision": "fp16"}, {"method": "lora", "rank": 2, "mixed_precision": "bf16"}, {"ema_decay": 0.9}],
)
def test_a_training_that_was_stopped_goes_on_to_the_weights_of_a_straight_one(
    base: Path, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    require(device, changes.get("mixed_precision", "no"))
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    values = settings(**{"max_train_steps": 6, "checkpointing_steps": 2, "allow_tf32": False} | changes)
    samples = photos(base)
    straight, _ = trained(base, device, values, samples)
    checkpoints = open_checkpoints(tmp_path)
    with pytest.raises(Interrupted, match="after step 4"):
        trained(base, device, values, samples, checkpoints, stop_after=4)
    resumed, records = trained(base, device, values, samples, open_checkpoints(tmp_path))
    assert [record.step for record in records] == list(range(6))
    first, _ = trained(base, device, values.model_copy(update={"learning_rate": 1e-12}), samples)
    assert (resumed - straight).norm() < AGAIN * (straight - first).norm()


def trained(
    base: Path,
    device: torch.device,
    values: Train,
    samples: Sequence[Sample],
    checkpoints: Checkpoints | None = None,
    stop_after: int | None = None,
) -> tuple[Tensor, list[StepRecord]]:
    """Train, and return the weights of the UNet in one row, on the CPU."""
    model = load_model(base, device=device, unet_dtype=methods.frozen_dtype(values))
    instance, prior_rows = ([sample for sample in samples if sample.role == role] for role in ("instance", "prior"))

    def look(records: list[StepRecord]) -> None:
        if records[-1].step + 1 == stop_after:
            raise Interrupted(f"stopped after step {stop_after}")

    history = train(model, instance, prior_rows, values, Listeners(records=look), checkpoints)
    weights = {name: weight for name, weight in model.unet.named_parameters() if weight.dtype == torch.float32}
    return torch.cat([weights[name].detach().cpu().flatten() for name in sorted(weights)]), history.steps


def test_the_state_of_the_fused_optimizer_is_read_back_in_the_order_of_the_weights(
    base: Path, device: torch.device, tmp_path: Path
) -> None:
    """The weights of a UNet on a GPU are channels_last, and a file holds them row after row."""
    values, samples = settings(allow_tf32=False), photos(base)
    with prepared(base, device, values, samples) as (trainer, take):
        take(0)
        kernel = trainer.model.unet.conv_in.weight
        if device.type == "cuda":
            assert kernel.is_contiguous(memory_format=torch.channels_last)
            assert not kernel.is_contiguous()
        assert trainer.optimizer.param_groups[0]["fused"]
        checkpoints = open_checkpoints(tmp_path)
        checkpoints.begin_save(capture(trainer, 1, {}))
        checkpoints.finish()
        take(1)
        straight = in_a_row(capture(trainer, 2, {}))
    saved = open_checkpoints(tmp_path).newest()
    assert saved is not None
    with prepared(base, device, values, samples) as (trainer, take):
        restore(trainer, saved)
        own = capture(trainer, 1, {})
        assert {name.rpartition("/")[2] for name in own.moments} == {"exp_avg", "exp_avg_sq", "step"}
        for name, moment in own.moments.items():
            weight = own.weights[name.rpartition("/")[0]]
            assert moment.device.type == device.type or not moment.shape
            assert moment.stride() == weight.stride() or not moment.shape
            assert torch.equal(moment.cpu(), saved.moments[name])
        for name, weight in own.weights.items():
            assert torch.equal(weight.cpu(), saved.weights[name])
        take(1)
        resumed = in_a_row(capture(trainer, 2, {}))
    assert (resumed - straight).norm() < AGAIN * (straight - in_a_row(saved)).norm()


def in_a_row(state: State) -> Tensor:
    return torch.cat([state.weights[name].detach().cpu().flatten() for name in sorted(state.weights)])


def test_a_step_that_does_not_fit_into_the_memory_is_taken_with_less_of_it(base: Path, device: torch.device) -> None:
    """Real memory runs out: the process may have half of what the plain way would have taken above the thrifty one."""
    if device.type == "cpu":
        pytest.skip("memory of a CPU has no limit of a process")
    values, samples = settings(train_batch_size=16, allow_tf32=False, gradient_checkpointing=False), large_rows()
    plain, most = measured(base, device, values, samples)
    for allowed, thrifty in (
        ({"gradient_checkpointing": "auto"}, {"gradient_checkpointing": True}),
        ({}, {"train_batch_size": 8, "gradient_accumulation_steps": 2}),
    ):
        _, least = measured(base, device, values.model_copy(update=thrifty), samples)
        assert least < 0.8 * most
        with limited_to((least + most) // 2, device):
            found = one_step(base, device, values.model_copy(update=allowed), samples)
        assert (found.checkpointing, found.parts) == ((True, 1) if allowed else (False, 2))
        assert_near(found, plain, "no")


def large_rows() -> list[Sample]:
    """Return rows of 128 pixels: their activations are hundreds of megabytes, the tiny weights nothing."""
    chance, sizes = torch.Generator().manual_seed(0), drawn_sizes(128)
    words = {"instance": "a photo of sks dog", "prior": "a photo of a dog"}
    return [
        Sample(
            f"{role}-{i}",
            Posterior(torch.randn(4, 64, 64, generator=chance), torch.zeros(4, 64, 64)),
            text,
            role,
            sizes,
        )
        for role, text in words.items()
        for i in range(16)
    ]


def measured(base: Path, device: torch.device, values: Train, samples: Sequence[Sample]) -> tuple[Step, int]:
    """Take a step with all memory; return the most that was reserved of it."""
    give_back(device)
    step = one_step(base, device, values, samples)
    return step, torch.cuda.max_memory_reserved(device)


def give_back(device: torch.device) -> None:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)


@contextmanager
def limited_to(size: int, device: torch.device) -> Iterator[None]:
    """Let this process have so many bytes of the GPU at most."""
    give_back(device)
    torch.cuda.set_per_process_memory_fraction(size / torch.cuda.get_device_properties(device).total_memory, device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_picture_in_float16_is_near_that_of_the_cpu_in_float32(
    base: Path, device: torch.device, scheduler: str
) -> None:
    drawn = []
    for place, dtype in ((torch.device("cpu"), torch.float32), (device, torch.float16)):
        model = load_model(base, dtype, place)
        settings_ = SamplerSettings(scheduler, 4, 3.0, 32)
        images = draw(model, ["a photo of a dog", "a cat in space"], [1, 2], settings_)
        drawn.append(np.stack([np.asarray(image) for image in images]).astype(int))
    differences = np.abs(drawn[0] - drawn[1])
    assert drawn[0].std() > 5  # neither is black, as what is not finite would be
    assert differences.mean() < 0.5  # on a CPU 0.05 and at most 1
    assert differences.max() <= 4


def test_every_stage_runs_on_it(
    base: Path, device: torch.device, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = tiny_values()
    half = {"cpu": "no", "cuda": "fp16"}[device.type]
    values["train"] |= {"mixed_precision": half, "preview_steps": 2, "evaluation_steps": 2, "checkpointing_steps": 1}
    values["base"]["inference_dtype"] = "float32" if device.type == "cpu" else "float16"
    root = make_project(tmp_path / "project", base, values)
    params = load_params(root / "params.yaml")
    validate.run(params, "biscuit", root)
    prior.run(params, "dog", root)
    for stage in (train_stage, evaluate, export):
        stage.run(params, "biscuit", root)
    said = capsys.readouterr().out
    assert f"prior dog: computes on {device}" in said
    assert f"4 steps on {device}" in said
    assert f"evaluate biscuit: computes on {device}" in said
    assert "warning: no previews" not in said
    assert pd.read_csv(root / "models/biscuit/loss.csv")["loss"].notna().all()
    assert (root / "export/biscuit/model_index.json").is_file()


def test_two_processes_take_the_steps_of_one(base: Path, device: torch.device, tmp_path: Path) -> None:
    if device.type == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("two processes need two cards, and there is one")
    values, losses = tiny_values(), []
    values["train"] |= {"allow_tf32": False, "gradient_checkpointing": False}
    root = make_project(tmp_path / "project", base, values)
    for count in (1, 2):
        values["train"] |= {"num_processes": count, "train_batch_size": 2 // count}
        write_params(root, values)
        params = load_params(root / "params.yaml")
        validate.run(params, "biscuit", root)
        prior.run(params, "dog", root)
        train_stage.run(params, "biscuit", root)
        losses.append(pd.read_csv(root / "models/biscuit/loss.csv")["loss"])
    assert losses[1].tolist() == pytest.approx(losses[0].tolist(), rel=1e-2)
