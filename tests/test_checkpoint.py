"""Checkpoints: exact, whole, of one training only; named when they are not."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training import largest_difference, make_samples, settings, weights
from toy_checkpoints import names, open_checkpoints, save, state

from dreambooth import checkpoint, trainer, training
from dreambooth.checkpoint import KEEP, Checkpoints
from dreambooth.errors import TrainingError
from dreambooth.folders import DiskFullError, TornFolderError
from dreambooth.interruption import Interrupted
from dreambooth.models import Model, load_model
from dreambooth.training import History, train

STEPS = 6
FILES = ["weights.safetensors", "moments.safetensors", "plain.json", "records.json", "manifest.json"]


def run(model: Model, checkpoints: Checkpoints | None = None, **changes: Any) -> History:
    instance = make_samples(model, 3, "instance", "a photo of sks dog")
    prior = make_samples(model, 4, "prior", "a photo of a dog")
    values = {"max_train_steps": STEPS, "gradient_accumulation_steps": 2, "checkpointing_steps": 1}
    return train(model, instance, prior, settings(**values | changes), checkpoints=checkpoints)


@pytest.fixture(scope="module")
def straight(tiny_model_folder: Path) -> tuple[dict[str, torch.Tensor], History]:
    model = load_model(tiny_model_folder, device="cpu")
    history = run(model)
    return weights(model), history


def test_the_newest_ones_are_kept(tmp_path: Path) -> None:
    for step in range(1, 6):
        save(open_checkpoints(tmp_path), state(step))
    assert names(tmp_path) == ["step-0000004", "step-0000005"]
    assert KEEP == 2


def test_the_best_one_is_kept_until_a_better_one_comes(tmp_path: Path) -> None:
    checkpoints = open_checkpoints(tmp_path)
    for step, score in ((1, None), (2, 0.5), (3, None), (4, None), (5, None)):
        save(checkpoints, state(step), score)
    assert names(tmp_path) == ["best.json", "step-0000002", "step-0000004", "step-0000005"]
    assert json.loads((tmp_path / "best.json").read_text()) == {"checkpoint": "step-0000002", "score": 0.5, "step": 2}
    best = checkpoints.best()
    assert best is not None
    assert best.step == 2
    save(checkpoints, state(6), 0.4)
    assert names(tmp_path) == ["best.json", "step-0000005", "step-0000006"]


def test_a_torn_best_checkpoint_is_put_aside_and_the_last_weights_stay(tmp_path: Path) -> None:
    said: list[str] = []
    checkpoints = open_checkpoints(tmp_path, say=said.append)
    for step, score in ((1, 0.5), (2, None), (3, None)):
        save(checkpoints, state(step), score)
    weights = tmp_path / "step-0000001/weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert checkpoints.best() is None
    assert checkpoints.best() is None  # a second time too
    assert "weights.safetensors" in said[0]
    assert "torn-step-0000001" in names(tmp_path)


def test_the_pointer_is_written_again_if_a_stop_came_before_it(tmp_path: Path) -> None:
    checkpoints = open_checkpoints(tmp_path)
    save(checkpoints, state(1), 0.5)
    before = (tmp_path / "best.json").read_bytes()
    save(checkpoints, state(2), 0.4)
    (tmp_path / "best.json").write_bytes(before)
    assert open_checkpoints(tmp_path).newest() is not None
    assert json.loads((tmp_path / "best.json").read_text())["step"] == 2


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
@pytest.mark.fault(16)
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_used(tmp_path: Path, name: str, damage: str) -> None:
    said: list[str] = []
    checkpoints = open_checkpoints(tmp_path, say=said.append)
    save(checkpoints, state(1))
    newest = save(checkpoints, state(2))
    content = bytearray((newest / name).read_bytes())
    if damage == "remove":
        (newest / name).unlink()
    else:
        content[len(content) // 2] ^= 1
        (newest / name).write_bytes(content if damage == "flip" else content[:-3])
    with pytest.raises(TornFolderError, match=name):
        checkpoints.load(newest)
    with pytest.raises(TornFolderError, match=name):
        open_checkpoints(tmp_path, resume_from=newest).newest()
    found = checkpoints.newest()
    assert found is not None
    assert found.step == 1
    assert name in said[0]
    assert (tmp_path / "torn-step-0000002").is_dir()


def test_every_file_of_a_checkpoint_is_tried_above(tmp_path: Path) -> None:
    assert names(save(open_checkpoints(tmp_path), state(1))) == sorted(FILES)


def test_when_all_are_torn_there_is_none(tmp_path: Path) -> None:
    checkpoints = open_checkpoints(tmp_path)
    for step in (1, 2):
        (save(checkpoints, state(step)) / "manifest.json").unlink()
    assert checkpoints.newest() is None
    assert names(tmp_path) == ["torn-step-0000001", "torn-step-0000002"]


INPUTS = {"train": {"learning_rate": 1e-4, "seed": 0}, "versions": {"torch": "2.13"}, "device": "cpu", "processes": 1}


def test_a_checkpoint_of_other_parameters_is_refused_with_the_difference(tmp_path: Path) -> None:
    path = save(open_checkpoints(tmp_path, INPUTS), state(1))
    other = open_checkpoints(
        tmp_path / "other", INPUTS | {"train": {"learning_rate": 2e-4, "seed": 0}}, resume_from=path
    )
    with pytest.raises(TrainingError, match=r"another training: train.learning_rate was 0.0001, is 0.0002; take") as no:
        other.newest()
    assert "seed" not in str(no.value)
    with pytest.raises(TrainingError, match=r"processes was 1, is 2"):
        open_checkpoints(tmp_path, INPUTS | {"processes": 2}).newest()


def test_a_training_that_went_back_keeps_what_it_writes_and_lets_the_way_it_left_go(tmp_path: Path) -> None:
    said: list[str] = []
    checkpoints = open_checkpoints(tmp_path / "own", say=said.append)
    earlier = save(open_checkpoints(tmp_path / "earlier"), state(1))
    for step, score in ((2, None), (3, 0.5)):
        save(checkpoints, state(step), score)
    back = open_checkpoints(tmp_path / "own", say=said.append, resume_from=earlier)
    found = back.newest()
    assert found is not None
    assert found.step == 1
    assert names(tmp_path / "own") == ["best.json", "step-0000002", "step-0000003"]  # until there is something newer
    save(back, state(2), None)
    assert names(tmp_path / "own") == ["step-0000002"]
    assert said[-1] == "removed step-0000003: the training went back to before them"
    assert back.best() is None


def test_the_second_one_is_copied_into_the_memory_of_the_first_which_is_whole_by_then(tmp_path: Path) -> None:
    checkpoints, weight, places = open_checkpoints(tmp_path), torch.tensor([1.0, 2.0]), []
    for step in (1, 2):
        checkpoints.begin_save(state(step, weights={"unet.w": weight}))
        weight += 1
        assert checkpoints._copy is not None
        places.append(checkpoints._copy.weights["unet.w"].data_ptr())
    checkpoints.finish()
    assert places[0] == places[1]
    assert checkpoints._copy is None  # no memory is held for a checkpoint that does not come
    saved = [checkpoints.load_step(step).weights["unet.w"].tolist() for step in (1, 2)]
    assert saved == [[1.0, 2.0], [2.0, 3.0]]


def test_a_training_that_begins_anew_beside_a_state_of_other_values_says_which_differ(tmp_path: Path) -> None:
    other = save(open_checkpoints(tmp_path / "rex-0123abcd", INPUTS), state(1))
    save(open_checkpoints(tmp_path / "rex-2-0123abcd", INPUTS), state(1))  # of another subject
    said: list[str] = []
    changed = INPUTS | {"train": {"learning_rate": 2e-4, "seed": 0}}
    assert open_checkpoints(tmp_path / "rex-4567cdef", changed, said.append).newest() is None
    assert said == [
        f"warning: begins anew: {other} is of another training, which differs in train.learning_rate; take these "
        "values back to go on with that one"
    ]


@pytest.mark.fault(40)
def test_another_library_or_device_is_a_warning_with_both_and_is_remembered(tmp_path: Path) -> None:
    save(open_checkpoints(tmp_path, INPUTS), state(1))
    said: list[str] = []
    changed = INPUTS | {"versions": {"torch": "2.14"}, "device": "cuda"}
    checkpoints = open_checkpoints(tmp_path, changed, said.append)
    assert checkpoints.newest() is not None
    assert said[0].startswith("warning: device was 'cpu', is 'cuda': what follows may differ")
    assert said[1].startswith("warning: versions.torch was '2.13', is '2.14'")
    save(checkpoints, state(2))
    again = open_checkpoints(tmp_path, changed)
    assert again.newest() is not None
    assert again.changes == ["device was 'cpu', is 'cuda'", "versions.torch was '2.13', is '2.14'"]


@pytest.mark.fault(20)
def test_a_checkpoint_that_does_not_fit_is_refused_with_both_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = open_checkpoints(tmp_path)
    save(checkpoints, state(1))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=3_000_000))
    big = state(2, weights={"unet.w": torch.zeros(1_000_000)})
    with pytest.raises(DiskFullError, match=r"needs 4,\d+,\d+ bytes, 3,000,000 are free"):
        checkpoints.begin_save(big)
    assert names(tmp_path) == ["step-0000001"]


def test_what_goes_wrong_beside_the_training_is_raised_at_the_next_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = open_checkpoints(tmp_path)
    save(checkpoints, state(1))

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.safetensors.torch, "save_file", full)
    checkpoints.begin_save(state(2))
    with pytest.raises(DiskFullError, match=r"needs [\d,]+ bytes, [\d,]+ are free; step-0000001 is whole"):
        checkpoints.begin_save(state(3))
    checkpoints.finish()


def test_a_checkpoint_of_other_weights_is_refused(tiny_model_folder: Path, tmp_path: Path) -> None:
    records = {"steps": [], "evaluations": []}
    save(open_checkpoints(tmp_path), state(1, records=records))
    with pytest.raises(TrainingError, match="other weights"):
        run(load_model(tiny_model_folder, device="cpu"), open_checkpoints(tmp_path))


def test_without_memory_for_a_copy_the_checkpoint_is_whole_before_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(checkpoint, "free_memory", lambda: checkpoint._SPARE + 11)
    checkpoints = open_checkpoints(tmp_path, say=said.append)
    weight = torch.tensor([1.0])
    checkpoints.begin_save(state(1, weights={"unet.w": weight}))  # 4 bytes and 8 of the moments: 12 in all
    weight += 1
    assert [line.partition(":")[0] for line in said] == ["the training stands still for a checkpoint"]
    found = open_checkpoints(tmp_path).newest()
    assert found is not None
    assert found.weights["unet.w"].tolist() == [1.0]


def test_a_training_without_memory_for_copies_resumes_exactly(
    tiny_model_folder: Path,
    straight: tuple[dict[str, torch.Tensor], History],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(checkpoint, "free_memory", lambda: 0)
    monkeypatch.setattr(checkpoint, "SHARD", 1 << 14)
    run(load_model(tiny_model_folder, device="cpu"), open_checkpoints(tmp_path), max_train_steps=4)
    assert len(list((tmp_path / "step-0000003").glob("moments-*.safetensors"))) > 1
    model = load_model(tiny_model_folder, device="cpu")
    assert run(model, open_checkpoints(tmp_path)) == straight[1]
    assert largest_difference(weights(model), straight[0]) == 0


@pytest.mark.fault(16)
def test_what_fills_several_files_is_read_as_one_and_each_is_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "SHARD", 8)
    tensors = {name: torch.full((size,), float(size)) for name, size in {"a": 1, "b": 1, "c": 5, "d": 2}.items()}
    path = save(open_checkpoints(tmp_path), state(1, weights=tensors))
    assert sorted(file.name for file in path.glob("weights*")) == [
        "weights-1.safetensors", "weights-2.safetensors", "weights.safetensors",
    ]  # fmt: skip
    found = open_checkpoints(tmp_path).newest()
    assert found is not None
    assert {name: tensor.tolist() for name, tensor in found.weights.items()} == {
        name: tensor.tolist() for name, tensor in tensors.items()
    }
    (path / "weights-2.safetensors").unlink()
    assert open_checkpoints(tmp_path).newest() is None


def test_weights_and_moments_keep_their_order_in_memory(tiny_model_folder: Path, tmp_path: Path) -> None:
    """The fused kernel reads a weight and its moments in the order of memory, whatever their strides say."""
    seen: list[tuple[Any, Any]] = []
    step = torch.optim.AdamW.step

    def watch(self: Any, *arguments: Any, **named: Any) -> Any:
        for weight, entry in self.state.items():
            seen.append((weight.stride(), entry["exp_avg"].stride()))
        return step(self, *arguments, **named)

    def train_to(step: int) -> None:
        model = load_model(tiny_model_folder, device="cpu")
        model.unet.to(memory_format=torch.channels_last)  # as on a GPU
        run(model, open_checkpoints(tmp_path), max_train_steps=step)

    train_to(3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", watch)
        train_to(4)
    assert any(len(weight) == 4 and weight[1] == 1 for weight, _ in seen)
    assert all(weight == moment for weight, moment in seen)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux tells what is mapped to memory")
def test_a_training_does_not_keep_the_file_of_its_weights_in_memory(tiny_model_folder: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_model_folder, tmp_path / "base")
    file = str(base / "unet/diffusion_pytorch_model.safetensors")
    model = load_model(base, device="cpu")
    assert file in Path("/proc/self/maps").read_text()
    run(model, max_train_steps=1)
    assert file not in Path("/proc/self/maps").read_text()


def signalled_in(step: int) -> Callable[..., Any]:
    original, calls = trainer.train_step, iter(range(1000))

    def signalled(*arguments: Any) -> Any:
        if next(calls) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    return signalled


@pytest.mark.fault(17)
def test_a_signal_finishes_the_step_and_saves(
    tiny_model_folder: Path, tmp_path: Path, straight: tuple[dict[str, torch.Tensor], History]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "train_step", signalled_in(0))
        with pytest.raises(Interrupted, match="after step 1 of 6, state saved") as stopped:
            run(load_model(tiny_model_folder, device="cpu"), open_checkpoints(tmp_path), checkpointing_steps=None)
    assert stopped.value.exit_code == 75
    model = load_model(tiny_model_folder, device="cpu")
    history = run(model, open_checkpoints(tmp_path), checkpointing_steps=None)
    assert largest_difference(weights(model), straight[0]) == 0
    assert history == straight[1]


@pytest.mark.parametrize("spoiled", [2, 3])
@pytest.mark.fault(22)
def test_a_training_that_diverges_keeps_its_last_finite_checkpoint(
    tiny_model_folder: Path, tmp_path: Path, spoiled: int
) -> None:
    model = load_model(tiny_model_folder, device="cpu")
    original = trainer.train_step

    def spoil(self: Any, rows: Any, step: int, rate: float) -> Any:
        result = original(self, rows, step, rate)
        if step == spoiled:  # a step too large: its own loss was finite
            with torch.no_grad():
                model.unet.conv_out.bias.fill_(float("inf"))
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "train_step", spoil)
        with pytest.raises(TrainingError, match=f"weights are not finite after step {spoiled}") as stopped:
            run(model, open_checkpoints(tmp_path))
    assert stopped.value.code == "E_DIVERGED"
    newest = open_checkpoints(tmp_path).newest()
    assert newest is not None
    assert newest.step == spoiled
    assert all(weight.isfinite().all() for weight in newest.weights.values())


def out_of_memory_in(step: int, times: int) -> Callable[..., Any]:
    """Return a `forward` whose second micro-batch of a step finds no memory, some times."""
    original, left = trainer.forward, iter(range(times))
    calls = iter(range(1000))

    def forward(*arguments: Any) -> Any:
        if next(calls) >= 2 * step + 1 and next(left, None) is not None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return original(*arguments)

    return forward


@pytest.mark.fault(21)
def test_a_step_without_memory_is_taken_again_in_halves(
    tiny_model_folder: Path, tmp_path: Path, straight: tuple[dict[str, torch.Tensor], History]
) -> None:
    sizes: list[int] = []
    model = load_model(tiny_model_folder, device="cpu")
    model.unet.conv_in.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "forward", out_of_memory_in(1, 1))
        history = run(model, open_checkpoints(tmp_path), adam_epsilon=1e-2, max_train_steps=3)
    plain = load_model(tiny_model_folder, device="cpu")
    expected = run(plain, adam_epsilon=1e-2, max_train_steps=3)
    assert sizes == [4, 4, 4, *[2] * 8]  # rows of both roles: 2 x 4; 4 and then none; 4 x 2 from there on
    assert largest_difference(weights(model), weights(plain)) < 1e-6
    for halved, whole in zip(history.steps, expected.steps, strict=True):
        assert halved.loss == pytest.approx(whole.loss, rel=1e-5)


def test_halves_are_remembered_by_a_checkpoint(tiny_model_folder: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "forward", out_of_memory_in(1, 1))
        run(load_model(tiny_model_folder, device="cpu"), open_checkpoints(tmp_path), max_train_steps=3)
    newest = open_checkpoints(tmp_path).newest()
    assert newest is not None
    assert newest.plain["parts"] == 4


@pytest.mark.parametrize(
    ("changes", "times", "said"),
    [
        ({"halve_batch_on_out_of_memory": False}, 1, "at step 1; .*or allow train.halve_batch_on_out_of_memory"),
        ({"train_batch_size": 1}, 1, "a batch of 1 has no half; lower"),
        ({}, 2, "at step 1, at half the batch too; lower"),
    ],
)
@pytest.mark.fault(21)
def test_a_step_that_does_not_fit_stops_with_advice_and_keeps_the_state(
    tiny_model_folder: Path, tmp_path: Path, changes: dict[str, Any], times: int, said: str
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "forward", out_of_memory_in(1, times))
        with pytest.raises(TrainingError, match=said) as stopped:
            run(load_model(tiny_model_folder, device="cpu"), open_checkpoints(tmp_path), **changes)
    assert stopped.value.code == "E_OUT_OF_MEMORY"
    newest = open_checkpoints(tmp_path).newest()
    assert newest is not None
    assert newest.step == 1


@pytest.mark.fault(21)
def test_a_lack_of_memory_in_the_optimizer_is_not_tried_again(tiny_model_folder: Path, tmp_path: Path) -> None:
    """Some weights may have moved, and AdamW keeps a state that it has begun to make."""
    steps: list[int] = []
    original = torch.optim.AdamW.step

    def step(self: Any, *arguments: Any, **named: Any) -> Any:
        steps.append(1)
        if len(steps) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")
        return original(self, *arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        with pytest.raises(TrainingError, match=r"allocate 20 MiB in the optimizer at step 1; train fewer") as stopped:
            run(load_model(tiny_model_folder, device="cpu"), open_checkpoints(tmp_path))
    assert stopped.value.code == "E_OUT_OF_MEMORY"
    assert len(steps) == 2
    newest = open_checkpoints(tmp_path).newest()
    assert newest is not None
    assert newest.step == 1


def test_a_mistake_of_ours_is_not_taken_for_a_lack_of_memory(tiny_model_folder: Path) -> None:
    def fail(*arguments: Any) -> Any:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "forward", fail)
        with pytest.raises(RuntimeError, match="mat1"):
            run(load_model(tiny_model_folder, device="cpu"))


def test_the_answer_to_a_stop_waits_for_the_checkpoint(tiny_model_folder: Path, tmp_path: Path) -> None:
    checkpoints = open_checkpoints(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "train_step", signalled_in(2))
        with pytest.raises(Interrupted):
            run(load_model(tiny_model_folder, device="cpu"), checkpoints, checkpointing_steps=2)
    assert names(tmp_path) == ["step-0000002", "step-0000003"]
    assert training.FLUSH_EVERY > 3  # the records of a stop were not due
