"""A training that was stopped ends with the same bits as one that was not."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training import largest_difference, make_samples, settings, weights
from tiny_project import REPOSITORY, make_project, tiny_values

from dreambooth import training
from dreambooth.checkpoint import KEEP, Checkpoints, State
from dreambooth.errors import TrainingError
from dreambooth.folders import DiskFullError, TornFolderError, content_hash
from dreambooth.interruption import Interrupted
from dreambooth.models import Model, load_model
from dreambooth.training import StepRecord, train

STEPS = 6


def run(model: Model, checkpoints: Checkpoints | None = None, **changes: Any) -> list[StepRecord]:
    instance = make_samples(model, 3, "instance", "a photo of sks dog")
    prior = make_samples(model, 4, "prior", "a photo of a dog")
    values = {"max_train_steps": STEPS, "gradient_accumulation_steps": 2, "checkpointing_steps": 1}
    return train(model, instance, prior, settings(**values | changes), checkpoints=checkpoints)


@pytest.fixture(scope="module")
def straight(tiny_model_folder: Path) -> tuple[dict[str, torch.Tensor], list[StepRecord]]:
    model = load_model(tiny_model_folder, device="cpu")
    history = run(model)
    return weights(model), history


def fall_over_in_step(step: int, part: int) -> Callable[..., Any]:
    """Return a `forward` that fails in a step, at the first or the second of its two micro-batches."""
    original, calls = training.forward, iter(range(10_000))

    def forward(*arguments: Any) -> Any:
        if next(calls) == 2 * step + part:
            raise MemoryError("the process is gone")
        return original(*arguments)

    return forward


@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("step", range(STEPS))
def test_a_stop_at_any_point_and_a_resume_end_with_the_same_bits(
    tiny_model_folder: Path,
    tmp_path: Path,
    straight: tuple[dict[str, torch.Tensor], list[StepRecord]],
    step: int,
    part: int,
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "forward", fall_over_in_step(step, part))
        with pytest.raises(MemoryError):
            run(load_model(tiny_model_folder, device="cpu"), Checkpoints(tmp_path))
    said: list[str] = []
    model = load_model(tiny_model_folder, device="cpu")
    history = run(model, Checkpoints(tmp_path, said.append))
    assert said == ([f"continues after step {step}"] if step else [])
    assert largest_difference(weights(model), straight[0]) == 0
    assert history == straight[1]


def state(step: int) -> State:
    return State(
        step, {"unet.w": torch.full((3,), float(step))}, {"optimizer": {"m": torch.zeros(2)}}, [{"step": step}]
    )


def test_the_newest_ones_are_kept(tmp_path: Path) -> None:
    for step in range(1, 6):
        Checkpoints(tmp_path).save(state(step))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-0000004", "step-0000005"]
    assert KEEP == 2


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.pt", "records.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_used(tmp_path: Path, name: str, damage: str) -> None:
    said: list[str] = []
    checkpoints = Checkpoints(tmp_path, said.append)
    checkpoints.save(state(1))
    newest = checkpoints.save(state(2))
    content = bytearray((newest / name).read_bytes())
    if damage == "remove":
        (newest / name).unlink()
    else:
        content[len(content) // 2] ^= 1
        (newest / name).write_bytes(content if damage == "flip" else content[:-3])
    with pytest.raises(TornFolderError):
        checkpoints.load(newest)
    found = checkpoints.newest()
    assert found is not None
    assert found.step == 1
    assert name in said[0]
    assert (tmp_path / "torn-step-0000002").is_dir()


def test_a_stop_while_a_checkpoint_is_written_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state(1))

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        checkpoints.save(state(2))
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000001"]


def test_a_checkpoint_that_does_not_fit_is_refused_with_both_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state(1))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=3_000_000))
    big = State(2, {"unet.w": torch.zeros(1_000_000)}, {}, [])
    with pytest.raises(DiskFullError, match="needs 4 MB, 3 MB are free"):
        checkpoints.save(big)
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000001"]


def test_a_checkpoint_of_other_weights_is_refused(tiny_model_folder: Path, tmp_path: Path) -> None:
    Checkpoints(tmp_path).save(state(1))
    with pytest.raises(TrainingError, match="other weights"):
        run(load_model(tiny_model_folder, device="cpu"), Checkpoints(tmp_path))


def test_a_signal_finishes_the_step_and_saves(
    tiny_model_folder: Path, tmp_path: Path, straight: tuple[dict[str, torch.Tensor], list[StepRecord]]
) -> None:
    original = training.train_step

    def signalled(trainer: Any, batches: Any, rate: float) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return original(trainer, batches, rate)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "train_step", signalled)
        with pytest.raises(Interrupted, match="after step 1 of 6, state saved") as stopped:
            run(load_model(tiny_model_folder, device="cpu"), Checkpoints(tmp_path), checkpointing_steps=None)
    assert stopped.value.exit_code == 75
    model = load_model(tiny_model_folder, device="cpu")
    run(model, Checkpoints(tmp_path), checkpointing_steps=None)
    assert largest_difference(weights(model), straight[0]) == 0


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_killed_stage_continues_and_ends_with_the_same_bytes(
    tmp_path: Path, tiny_model_folder: Path, number: signal.Signals, code: int
) -> None:
    from dreambooth.params import load_params
    from stages import prior, train, validate

    values = tiny_values()
    values["train"] |= {"max_train_steps": 80, "checkpointing_steps": 10, "train_batch_size": 1}
    root = make_project(tmp_path / "project", tiny_model_folder, values)
    params = load_params(root / "params.yaml")
    validate.run(params, "biscuit", root)
    prior.run(params, "dog", root)
    command = [sys.executable, "-m", "stages.train", "biscuit"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(command, cwd=root, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list((root / ".scratch").glob("checkpoints/*/step-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(timeout=60) == code
    assert not (root / "models/biscuit").exists()
    again = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True)
    assert "continues after step" in again.stdout
    assert not list((root / ".scratch/checkpoints").iterdir())
    resumed = content_hash(root / "models/biscuit")
    train.run(params, "biscuit", root)
    assert content_hash(root / "models/biscuit") == resumed


@pytest.mark.slow
def test_a_stage_ends_with_whoever_started_it(tmp_path: Path, tiny_model_folder: Path) -> None:
    values = tiny_values()
    values["train"] |= {"max_train_steps": 100_000, "train_batch_size": 1}
    root = make_project(tmp_path / "project", tiny_model_folder, values)
    from dreambooth.params import load_params
    from stages import prior, validate

    params = load_params(root / "params.yaml")
    validate.run(params, "biscuit", root)
    prior.run(params, "dog", root)
    starter = (
        "import subprocess, sys, time; "
        "child = subprocess.Popen([sys.executable, '-m', 'stages.train', 'biscuit'], stderr=subprocess.DEVNULL); "
        "print(child.pid, flush=True); time.sleep(600)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", starter],
        cwd=root, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, stdout=subprocess.PIPE, text=True,
    ) as parent:  # fmt: skip
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        next(line for line in parent.stdout if "steps on cpu" in line)
        time.sleep(1)
        parent.kill()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{child}").exists() and "Z" not in Path(f"/proc/{child}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline, "the training outlived its parent"
        time.sleep(0.1)
    assert list((root / ".scratch").glob("checkpoints/*/step-*"))
