"""A training whose process is killed ends with the same bytes as one that was not: real processes, real signals."""

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from processes import FORKED, kill_this_process_at_write, kill_this_process_in
from test_checkpoint import names, state
from test_training import settings
from tiny_project import REPOSITORY, make_project, tiny_values

from dreambooth import rng, trainer, training
from dreambooth.checkpoint import Checkpoints
from dreambooth.dataset import Posterior, Sample
from dreambooth.folders import DiskFullError, read_manifest
from dreambooth.interruption import RESUME, Interrupted
from dreambooth.models import load_model

pytestmark = pytest.mark.slow

STEPS, ACCUMULATION = 12, 2
FULL = {"max_train_steps": STEPS, "gradient_accumulation_steps": ACCUMULATION, "train_batch_size": 1}


def samples(role: Any, count: int) -> list[Sample]:
    """Return samples with latents of their own, without an autoencoder."""
    mean = rng.normal((4, 16, 16), 1, role, 0, range(count))
    prompt = "a photo of sks dog" if role == "instance" else "a photo of a dog"
    return [Sample(f"{role}-{i}", Posterior(mean[i], 0.1 * mean[i].abs()), prompt, role) for i in range(count)]


def run_in_process(base: Path, folder: Path, answer: Path, changes: dict[str, Any], kill: tuple[Any, ...] = ()) -> None:
    """Train; write the sha256 of weights, moments and records; exit with 75 after a stop."""
    trainers: list[trainer.Trainer] = []
    prepare = training.prepare
    training.prepare = lambda *given: (trainers.append(prepare(*given)), trainers[-1])[1]
    if kill:
        kill_this_process_in(trainer, "forward", *kill)
    checkpoints = Checkpoints(folder, {"processes": int(os.environ.get("WORLD_SIZE", "1"))})
    values = settings(**FULL | {"checkpointing_steps": 3} | changes)
    model = load_model(base, device="cpu")
    try:
        history = training.train(model, samples("instance", 3), samples("prior", 4), values, None, checkpoints)
    except Interrupted:
        raise SystemExit(RESUME) from None
    end = trainer.capture(trainers[0], STEPS, {})
    content = [
        safetensors.torch.save(dict(end.weights)),
        safetensors.torch.save(dict(end.moments)),
        repr(history).encode(),
    ]
    answer.write_text(json.dumps([hashlib.sha256(part).hexdigest() for part in content]))


def start(*arguments: Any) -> Any:
    process = FORKED.Process(target=run_in_process, args=arguments)
    process.start()
    return process


def finish(*arguments: Any) -> int:
    process = start(*arguments)
    process.join()
    return int(process.exitcode)


@pytest.fixture(scope="module")
def straight(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("straight")
    assert finish(tiny_model_folder, folder / "checkpoints", folder / "answer", {"checkpointing_steps": None}) == 0
    return (folder / "answer").read_text()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("call", range(STEPS * ACCUMULATION))
@pytest.mark.fault(18)
def test_interrupted_in_any_forward_pass_a_training_ends_with_the_same_bytes(
    tiny_model_folder: Path, tmp_path: Path, straight: str, call: int, number: signal.Signals
) -> None:
    where = tiny_model_folder, tmp_path / "checkpoints", tmp_path / "answer", {}
    code = finish(*where, (call, number))
    in_the_last_step = call // ACCUMULATION == STEPS - 1
    if number == signal.SIGTERM and in_the_last_step:
        assert code == 0  # nothing is left to be done later
    else:
        assert code == (RESUME if number == signal.SIGTERM else -signal.SIGKILL)
        assert not (tmp_path / "answer").exists()
        assert finish(*where) == 0
    assert (tmp_path / "answer").read_text() == straight


def save_and_die(folder: Path, write: int, half: bool) -> None:
    if half:
        original = safetensors.torch.save_file

        def torn(tensors: Any, path: Path) -> None:
            original(tensors, path)
            os.truncate(path, path.stat().st_size // 2)

        safetensors.torch.save_file = torn
    kill_this_process_at_write(folder, write)
    Checkpoints(folder).save(state(3), 0.5)


@pytest.mark.fault(15)
def test_killed_at_any_write_of_a_checkpoint_the_one_before_it_or_the_whole_new_one_is_found(tmp_path: Path) -> None:
    """Every file that is opened for writing, every rename and every removal on the way is a point of its own."""
    found: list[int] = []
    kinds: set[str] = set()
    for write in range(100):
        folder = tmp_path / str(write)
        for step in (1, 2):
            Checkpoints(folder).save(state(step), 0.6)
        process = FORKED.Process(target=save_and_die, args=(folder, write, write == 1))
        process.start()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        kinds.add((folder / "killed").read_text())
        (folder / "killed").unlink()
        checkpoints = Checkpoints(folder)
        newest, best = checkpoints.newest(), checkpoints.best()
        assert newest is not None
        assert best is not None
        assert newest.step == best.step
        assert torch.equal(newest.weights["unet.w"], torch.full((3,), float(newest.step)))
        assert not [name for name in names(folder) if name.startswith(".")]
        found.append(newest.step)
    assert found == sorted(found)
    assert found.count(2) >= 6
    assert found.count(3) >= 3
    assert {kind.split()[0] for kind in kinds} == {"open", "os.mkdir", "os.rename", "shutil.rmtree"}
    written = ["plain.json", "records.json", "manifest.json", "best.json"]
    assert [name for name in written if name in " ".join(kinds)] == written


def megabytes(step: int, size: int) -> Any:
    return state(step, weights={"unet.w": torch.full((size * 250_000,), float(step))})


@pytest.mark.fault(20)
def test_a_disk_without_room_is_named_with_both_numbers_and_the_last_checkpoint_is_whole(small_disk: Path) -> None:
    checkpoints = Checkpoints(small_disk / "checkpoints")
    first = checkpoints.save(megabytes(1, 1))
    with pytest.raises(DiskFullError, match=r"a checkpoint needs 3,\d+,\d+ bytes, [12],\d+,\d+ are free; make room"):
        checkpoints.begin_save(megabytes(2, 3))
    read_manifest(first)


@pytest.mark.fault(19)
def test_a_disk_that_fills_up_in_between_leaves_the_last_checkpoint_and_no_half_one(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(small_disk / "checkpoints")
    checkpoints.save(megabytes(1, 1))
    checkpoints.begin_save(megabytes(2, 1))
    checkpoints.finish()
    monkeypatch.setattr(Checkpoints, "_require_space", lambda self, state: None)  # another program is faster
    checkpoints.begin_save(megabytes(3, 2))
    with pytest.raises(DiskFullError, match=r"needs 2,\d+,\d+ bytes, [\d,]+ are free; step-0000002 is whole"):
        checkpoints.finish()
    assert names(small_disk / "checkpoints") == ["step-0000001", "step-0000002"]
    newest = checkpoints.newest()
    assert newest is not None
    assert newest.step == 2


def rank_in_process(number: int, port: int, seen: Path, *arguments: Any) -> None:
    """Be one of two processes that a launcher would have started; note what noise it draws."""
    world = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in world.items()})
    normal = rng.normal

    def watch(*given: Any) -> torch.Tensor:
        drawn = normal(*given)
        if given[2] not in ("noise", "posterior"):
            return drawn
        with (seen / str(number)).open("a") as file:
            file.writelines(f"{hashlib.sha256(row.numpy().tobytes()).hexdigest()}\n" for row in drawn)
        return drawn

    seen.mkdir(exist_ok=True)
    rng.normal = watch
    base, folder, answer, changes, *kill = arguments
    answer = answer.with_name(f"{answer.name}-{number}")
    run_in_process(base, folder, answer, changes, *(kill if number == 1 else ()))


def finish_two(folder: Path, *arguments: Any) -> list[int]:
    """Run two ranks; once one has died the other is ended, as a launcher would."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [
        FORKED.Process(target=rank_in_process, args=(number, port, folder / "noise", *arguments)) for number in (0, 1)
    ]
    for process in ranks:
        process.start()
    ranks[1].join()
    if ranks[1].exitcode < 0:
        ranks[0].kill()
    ranks[0].join()
    return [process.exitcode for process in ranks]


@pytest.fixture(scope="module")
def two_straight(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    assert finish_two(folder, tiny_model_folder, folder / "checkpoints", folder / "answer", {}) == [0, 0]
    return folder


def test_two_processes_end_alike_and_share_no_noise(two_straight: Path) -> None:
    assert (two_straight / "answer-0").read_text() == (two_straight / "answer-1").read_text()
    first, second = (set((two_straight / "noise" / name).read_text().split()) for name in "01")
    assert len(first) == len(second) == 2 * STEPS * ACCUMULATION * 2  # posterior and noise, of both roles
    assert not first & second


@pytest.mark.parametrize(("number", "codes"), [(signal.SIGKILL, [-9, -9]), (signal.SIGTERM, [RESUME, RESUME])])
def test_two_processes_of_which_one_is_told_to_stop_resume_exactly(
    tiny_model_folder: Path, tmp_path: Path, two_straight: Path, number: signal.Signals, codes: list[int]
) -> None:
    where = tiny_model_folder, tmp_path / "checkpoints", tmp_path / "answer", {}
    assert finish_two(tmp_path, *where, (15, number)) == codes
    assert finish_two(tmp_path, *where) == [0, 0]
    for name in ("answer-0", "answer-1"):
        assert (tmp_path / name).read_text() == (two_straight / name).read_text()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def await_true(condition: Any, what: str, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


@pytest.mark.parametrize("shell", ["bash", "sh"])  # bash makes way for the stage, the dash of Debian stays above it
@pytest.mark.fault(24)
def test_a_killed_dvc_repro_leaves_no_process_and_the_next_one_continues(
    tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch, shell: str
) -> None:
    monkeypatch.setenv("SHELL", f"/bin/{shell}")
    for name in ("DVC_SITE_CACHE_DIR", "DVC_GLOBAL_CONFIG_DIR", "DVC_SYSTEM_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("DVC_NO_ANALYTICS", "1")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    values = tiny_values()
    values["train"] |= {"max_train_steps": 3000, "checkpointing_steps": 5, "train_batch_size": 1}
    values["prior"] |= {"num_class_images": 2}
    root = make_project(tmp_path / "project", tiny_model_folder, values)
    for name in ("dreambooth", "stages"):
        shutil.copytree(REPOSITORY / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "dvc.yaml", root)
    dvc = [sys.executable, "-m", "dvc"]
    subprocess.run([*dvc, "init", "--no-scm", "--quiet"], cwd=root, check=True)
    repro = [*dvc, "repro", "train@biscuit"]
    with subprocess.Popen(repro, cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        await_true(lambda: list(root.glob(".scratch/checkpoints/*/step-*")), "no checkpoint was written")
        owner = json.loads((root / ".scratch/locks/train-biscuit.json").read_text())
        assert alive(owner["pid"])
        process.kill()
    await_true(lambda: not alive(owner["pid"]), "the training outlived dvc repro", seconds=30)
    (saved,) = root.glob(".scratch/checkpoints/*")
    steps = int(max(names(saved)).removeprefix("step-"))
    with subprocess.Popen(repro, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        said = next(line for line in process.stdout if "continues" in line)
        process.kill()
    assert said == f"train biscuit: continues after step {steps}\n"


@pytest.mark.fault(17)
def test_a_stage_that_is_told_to_stop_exits_with_75_and_one_that_resumes_elsewhere_says_why_not(
    tmp_path: Path, tiny_model_folder: Path
) -> None:
    from dreambooth.params import load_params
    from stages import prior, validate

    values = tiny_values()
    values["train"] |= {"max_train_steps": 3000, "checkpointing_steps": 5, "train_batch_size": 1}
    root = make_project(tmp_path / "project", tiny_model_folder, values)
    params = load_params(root / "params.yaml")
    validate.run(params, "biscuit", root)
    prior.run(params, "dog", root)
    command = [sys.executable, "-m", "stages.train", "biscuit"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(command, cwd=root, env=environment, stderr=subprocess.PIPE, text=True) as process:
        await_true(lambda: list(root.glob(".scratch/checkpoints/*/step-*")), "no checkpoint was written")
        process.terminate()
        assert process.stderr is not None
        said = process.stderr.read()
    assert process.returncode == RESUME
    assert "E_INTERRUPTED: stopped by <Signals.SIGTERM: 15> after step" in said
    newest = max(root.glob(".scratch/checkpoints/*/step-*"))
    text = (root / "params.yaml").read_text()
    (root / "params.yaml").write_text(text.replace("adam_beta1: 0.9", "adam_beta1: 0.8"))
    finished = subprocess.run(
        [*command, "--resume-from", str(newest)], cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 6
    assert f"{newest} is of another training: train.adam_beta1 was 0.9, is 0.8; take" in finished.stderr
