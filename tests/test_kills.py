"""A training whose process is killed ends with the same bytes as one that was not: real processes, real signals."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import psutil
import pytest
import safetensors.torch
import torch
from processes import FORKED, kill_this_process_at_write, kill_this_process_in
from test_training import settings
from tiny_families import write_sdxl
from tiny_project import REPOSITORY, make_project, tiny_values
from toy_checkpoints import names, open_checkpoints, save, state
from waiting import await_true, free_port

from dreambooth import interruption, launcher, methods, rng, trainer, training
from dreambooth.checkpoint import Checkpoints
from dreambooth.dataset import Posterior, Sample
from dreambooth.families import drawn_sizes
from dreambooth.folders import DiskFullError, read_manifest
from dreambooth.interruption import RESUME, Interrupted
from dreambooth.models import load_model

pytestmark = pytest.mark.slow

STEPS, ACCUMULATION = 12, 2
FULL = {"max_train_steps": STEPS, "gradient_accumulation_steps": ACCUMULATION, "train_batch_size": 1}


def samples(role: Any, count: int, mixed: bool = False) -> list[Sample]:
    """Return samples with latents of their own, without an autoencoder; mixed: every second one is lower."""
    drawn = rng.normal((4, 16, 16), 1, role, 0, range(count))
    mean = [latents[:, : 12 if mixed and i % 2 else 16] for i, latents in enumerate(drawn)]
    prompt = "a photo of sks dog" if role == "instance" else "a photo of a dog"
    return [
        Sample(f"{role}-{i}", Posterior(mean[i], 0.1 * mean[i].abs()), prompt, role, drawn_sizes(32))
        for i in range(count)
    ]


def run_in_process(base: Path, folder: Path, answer: Path, changes: dict[str, Any], kill: tuple[Any, ...] = ()) -> None:
    """Train; write the sha256 of weights, moments and records; exit with 75 after a stop."""
    trainers: list[trainer.Trainer] = []
    prepare = training.prepare
    training.prepare = lambda *given: (trainers.append(prepare(*given)), trainers[-1])[1]
    if kill:
        kill_this_process_in(trainer, "forward", *kill)
    checkpoints = open_checkpoints(folder, {"processes": int(os.environ.get("WORLD_SIZE", "1"))})
    values = settings(**FULL | {"checkpointing_steps": 3} | changes)
    model = load_model(base, device="cpu")
    methods.add_token(model, values, "sks", "dog")
    try:
        instance = samples("instance", 3, values.aspect_buckets)
        history = training.train(model, instance, samples("prior", 4), values, None, checkpoints)
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
    try:
        process.join()
    finally:
        process.kill()  # if this test is over before it is
    return int(process.exitcode)


@pytest.fixture(scope="module")
def straight(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("straight")
    assert finish(tiny_model_folder, folder / "checkpoints", folder / "answer", {"checkpointing_steps": None}) == 0
    return (folder / "answer").read_text()


@pytest.mark.parametrize(
    ("call", "number"),
    [
        *((call, signal.SIGKILL) for call in range(STEPS * ACCUMULATION)),
        *((call, signal.SIGTERM) for call in range(0, STEPS * ACCUMULATION, ACCUMULATION)),  # acts at the step's end
    ],
)
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


OTHERS = {
    "lora": {"method": "lora", "rank": 2, "train_text_encoder": True, "ema_decay": 0.9},
    "textual_inversion": {"method": "textual_inversion"},
    "pivotal": {"method": "pivotal", "use_dora": True, "embedding_learning_rate": 1e-2},
}


@pytest.fixture(scope="module")
def straight_of(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    answers = {}
    for name, changes in OTHERS.items():
        folder = tmp_path_factory.mktemp(name)
        where = tiny_model_folder, folder / "checkpoints", folder / "answer", changes | {"checkpointing_steps": None}
        assert finish(*where) == 0
        answers[name] = (folder / "answer").read_text()
    assert len(set(answers.values())) == len(OTHERS)
    return answers


@pytest.mark.parametrize(("call", "number"), [(8, signal.SIGKILL), (13, signal.SIGTERM)])
@pytest.mark.parametrize("name", OTHERS)
def test_what_is_added_to_a_frozen_model_resumes_as_exactly(
    tiny_model_folder: Path, tmp_path: Path, straight_of: dict[str, str], name: str, call: int, number: signal.Signals
) -> None:
    where = tiny_model_folder, tmp_path / "checkpoints", tmp_path / "answer", OTHERS[name]
    assert finish(*where, (call, number)) == (RESUME if number == signal.SIGTERM else -signal.SIGKILL)
    assert finish(*where) == 0
    assert (tmp_path / "answer").read_text() == straight_of[name]


def save_and_die(folder: Path, write: int, half: bool) -> None:
    if half:
        original = safetensors.torch.save_file

        def torn(tensors: Any, path: Path) -> None:
            original(tensors, path)
            os.truncate(path, path.stat().st_size // 2)

        safetensors.torch.save_file = torn
    kill_this_process_at_write(folder, write)
    save(open_checkpoints(folder), state(3), 0.5)


@pytest.mark.fault(15)
def test_killed_at_any_write_of_a_checkpoint_the_one_before_it_or_the_whole_new_one_is_found(tmp_path: Path) -> None:
    """Every file that is opened for writing, every rename and every removal on the way is a point of its own."""
    found: list[int] = []
    kinds: set[str] = set()
    for write in range(100):
        folder = tmp_path / str(write)
        for step in (1, 2):
            save(open_checkpoints(folder), state(step), 0.6)
        process = FORKED.Process(target=save_and_die, args=(folder, write, write == 1))
        process.start()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        kinds.add((folder / "killed").read_text())
        (folder / "killed").unlink()
        checkpoints = open_checkpoints(folder)
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
    checkpoints = open_checkpoints(small_disk / "checkpoints")
    first = save(checkpoints, megabytes(1, 1))
    with pytest.raises(DiskFullError, match=r"a checkpoint needs 3,\d+,\d+ bytes, [12],\d+,\d+ are free; make room"):
        checkpoints.begin_save(megabytes(2, 3))
    read_manifest(first)


@pytest.mark.fault(19)
def test_a_disk_that_fills_up_in_between_leaves_the_last_checkpoint_and_no_half_one(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = open_checkpoints(small_disk / "checkpoints")
    save(checkpoints, megabytes(1, 1))
    checkpoints.begin_save(megabytes(2, 1))
    checkpoints.finish()
    monkeypatch.setattr(Checkpoints, "require_space", lambda self, needed, what: None)  # another program is faster
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
    port = free_port()
    ranks = [
        FORKED.Process(target=rank_in_process, args=(number, port, folder / "noise", *arguments)) for number in (0, 1)
    ]
    for process in ranks:
        process.start()
    try:
        wait([process.sentinel for process in ranks])
        if all(process.exitcode in (None, 0, RESUME) for process in ranks):
            for process in ranks:
                process.join()
    finally:
        for process in ranks:  # one that failed would be waited for by the other for ever
            process.kill()
            process.join()
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


@pytest.mark.parametrize(
    ("family", "method", "buckets"),
    [
        ("sd", "full", False), ("sd", "lora", False), ("sd", "textual_inversion", False), ("sdxl", "full", False),
        ("sd", "full", True),
    ],
)  # fmt: skip
def test_two_processes_take_the_steps_of_one_with_the_whole_batch(
    tiny_model_folder: Path, tmp_path: Path, family: str, method: str, buckets: bool
) -> None:
    """Adam's epsilon is large, so that it does not blow rounding differences of tiny gradients up to whole steps.

    With buckets the two have different numbers of forward passes in a step.
    """
    changes = {"method": method, "adam_epsilon": 1e-2, "max_train_steps": 4, "gradient_accumulation_steps": 1}
    changes |= {"aspect_buckets": buckets}
    base = write_sdxl(tmp_path / "sdxl", tiny_model_folder) if family == "sdxl" else tiny_model_folder
    ends = []
    for name, batch in (("two", 1), ("one", 2)):
        folder = tmp_path / name
        folder.mkdir()
        where = base, folder / "checkpoints", folder / "answer"
        values = changes | {"train_batch_size": batch, "checkpointing_steps": 3}
        if name == "two":
            assert finish_two(folder, *where, values) == [0, 0]
        else:
            assert finish(*where, values) == 0
        ends.append(open_checkpoints(folder / "checkpoints", {"processes": 1 + (name == "two")}).newest())
    two, one = ends
    assert two is not None
    assert one is not None
    assert two.step == one.step == 3
    for weight in one.weights:
        assert torch.allclose(two.weights[weight], one.weights[weight], atol=1e-6), weight
    for mine, theirs in zip(two.records["steps"], one.records["steps"], strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


@pytest.mark.parametrize(("number", "codes"), [(signal.SIGKILL, [-9, -9]), (signal.SIGTERM, [RESUME, RESUME])])
def test_two_processes_of_which_one_is_told_to_stop_resume_exactly(
    tiny_model_folder: Path, tmp_path: Path, two_straight: Path, number: signal.Signals, codes: list[int]
) -> None:
    where = tiny_model_folder, tmp_path / "checkpoints", tmp_path / "answer", {}
    assert finish_two(tmp_path, *where, (15, number)) == codes
    assert finish_two(tmp_path, *where) == [0, 0]
    for name in ("answer-0", "answer-1"):
        assert (tmp_path / name).read_text() == (two_straight / name).read_text()


def prepared_project(root: Path, base: Path, values: dict[str, Any]) -> Path:
    """Make a project in which only the training is left to do."""
    from dreambooth.params import load_params
    from stages import prior, validate

    make_project(root, base, values)
    params = load_params(root / "params.yaml")
    validate.run(params, "biscuit", root)
    prior.run(params, "dog", root)
    return root


def trained_in(root: Path, launcher: Sequence[str] = (), **environment: str) -> "subprocess.Popen[str]":
    """Start the stage, what it says on both streams in one pipe."""
    command = [sys.executable, *launcher, "-m", "stages.train", "biscuit"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)} | environment
    return subprocess.Popen(
        command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def launched(root: Path) -> "subprocess.Popen[str]":
    """Start the stage in two processes that meet over gloo; without a GPU --multi_gpu starts what it is told."""
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"]
    launcher += ["--main_process_port=0", "--mixed_precision=no", "--dynamo_backend=no"]
    return trained_in(root, launcher, OMP_NUM_THREADS="1")


def test_the_stage_under_accelerate_launch_is_killed_and_ends_with_the_same_bytes(
    tmp_path: Path, tiny_model_folder: Path
) -> None:
    values = tiny_values()
    values["train"] |= {"max_train_steps": 60, "checkpointing_steps": 5, "train_batch_size": 1}
    straight = prepared_project(tmp_path / "straight", tiny_model_folder, values)
    shutil.copytree(straight, tmp_path / "killed")
    with launched(straight) as process:
        process.communicate()
    assert process.returncode == 0

    with launched(tmp_path / "killed") as process:
        await_checkpoint(tmp_path / "killed")
        for rank in psutil.Process(process.pid).children(recursive=True):
            rank.kill()
    assert process.returncode != 0
    with launched(tmp_path / "killed") as process:
        said, _ = process.communicate()
    assert process.returncode == 0
    assert "train biscuit: continues after step " in said
    for name in ("unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors", "loss.csv"):
        ends = [(tmp_path / which / "models/biscuit" / name).read_bytes() for which in ("straight", "killed")]
        assert ends[0] == ends[1], name


def await_checkpoint(root: Path) -> None:
    await_true(
        lambda: list(root.glob(".scratch/checkpoints/*/step-*")), 300, 0.05, otherwise="no checkpoint was written"
    )


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.fault(17)
def test_a_signal_of_the_group_and_of_the_runner_above_are_one_and_a_later_one_ends_at_once() -> None:
    program = """
import time
from dreambooth.interruption import stop_request
with stop_request() as stop:
    print("ready", flush=True)
    while not stop:
        time.sleep(0.05)
    print("saving", flush=True)
    time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.terminate()
        process.terminate()
        assert process.stdout.readline() == "saving\n"
        time.sleep(interruption.ONE_REQUEST + 0.5)
        assert process.poll() is None
        process.terminate()
        assert process.wait(60) == 128 + signal.SIGTERM


def test_who_is_stopping_already_is_not_told_again_that_its_starter_is_gone() -> None:
    """DVC dies of a signal to the group, and its stage saves its state."""
    program = """
import os, signal, subprocess, time
import psutil
from dreambooth import interruption
gone = subprocess.Popen(["true"])
starter = psutil.Process(gone.pid)
gone.wait()
with interruption.stop_request() as stop:
    os.kill(os.getpid(), signal.SIGTERM)
    while not stop:
        time.sleep(0.05)
    time.sleep(interruption.ONE_REQUEST + 0.5)  # the same signal would be a second request
    interruption._follow(starter)
    time.sleep(0.2)
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=60, check=False).returncode == 0


@pytest.mark.parametrize(
    "shell", ["bash", pytest.param("sh", marks=pytest.mark.nightly)]
)  # bash makes way for the stage, the dash of Debian stays above it
@pytest.mark.fault(24)
def test_a_killed_dvc_repro_leaves_no_process_and_the_next_one_continues(
    tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch, shell: str
) -> None:
    monkeypatch.setenv("SHELL", f"/bin/{shell}")
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
        await_checkpoint(root)
        owner = json.loads((root / ".scratch/locks/train-biscuit.json").read_text())
        assert alive(owner["pid"])
        process.kill()  # and nobody buries it yet
        await_true(lambda: not alive(owner["pid"]), 30, otherwise="the training did not end after dvc repro")
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
    values = tiny_values()
    values["train"] |= {"max_train_steps": 3000, "checkpointing_steps": 5, "train_batch_size": 1}
    root = prepared_project(tmp_path / "project", tiny_model_folder, values)
    command = [sys.executable, "-m", "stages.train", "biscuit"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(command, cwd=root, env=environment, stderr=subprocess.PIPE, text=True) as process:
        await_checkpoint(root)
        process.terminate()
        assert process.stderr is not None
        said = process.stderr.read()
    assert process.returncode == RESUME
    assert "E_INTERRUPTED: stopped by SIGTERM after step" in said
    newest = max(root.glob(".scratch/checkpoints/*/step-*"))
    text = (root / "params.yaml").read_text()
    (root / "params.yaml").write_text(text.replace("adam_beta1: 0.9", "adam_beta1: 0.8"))
    finished = subprocess.run(
        [*command, "--resume-from", str(newest)], cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 6
    assert f"{newest} is of another training: train.adam_beta1 was 0.9, is 0.8; take" in finished.stderr


def test_the_stage_starts_the_processes_itself_and_is_stopped_and_resumed_as_one(
    tmp_path: Path, tiny_model_folder: Path
) -> None:
    values = tiny_values()
    values["train"] |= {"max_train_steps": 150, "checkpointing_steps": 5, "train_batch_size": 1, "num_processes": 2}
    values["train"] |= {"method": "lora", "rank": 2, "evaluation_steps": 50, "load_best_model_at_end": True}
    root = prepared_project(tmp_path / "project", tiny_model_folder, values)
    with trained_in(root) as process:
        await_checkpoint(root)
        process.terminate()
        assert process.stdout is not None
        said = process.stdout.read()
    assert process.returncode == RESUME, said
    assert not (root / "models/biscuit").exists()
    with trained_in(root) as process:
        assert process.stdout is not None
        said = process.stdout.read()
    assert process.returncode == 0, said
    assert said.count("continues after step") >= 1
    assert said.count("150 steps on cpu") == 1  # one of them writes and tells
    assert read_manifest(root / "models/biscuit")["inputs"]["processes"] == 2
    assert (root / "models/biscuit/loss.csv").read_text().count("\n") == 151
    assert (root / "models/biscuit/evaluation_loss.csv").read_text().count("\n") == 4  # of the first one, for both


SLOW_DISK = """
import sys, time
from pathlib import Path
from dreambooth import checkpoint, launcher, processes
if "WORLD_SIZE" not in __import__("os").environ:
    sys.exit(launcher.start_all([sys.executable, __file__], 2, Path.cwd()))
write = checkpoint._save_sharded
def slowly(*arguments):
    if Path("slow").exists():
        time.sleep(3)
    write(*arguments)
checkpoint._save_sharded = slowly
sys.argv = ["stages.train", "biscuit"]
from stages.entry import main
from stages.train import run
main(run, options=("resume_from",))
"""


@pytest.mark.fault(17)
def test_the_other_processes_wait_for_the_one_that_saves(tmp_path: Path, tiny_model_folder: Path) -> None:
    """Else the launcher takes the first that leaves for a failure, and ends the one that saves."""
    values = tiny_values()
    values["train"] |= {"max_train_steps": 3000, "checkpointing_steps": 3, "train_batch_size": 1, "num_processes": 2}
    values["train"] |= {"method": "lora", "rank": 2}
    root = prepared_project(tmp_path / "project", tiny_model_folder, values)
    (root / "slowly.py").write_text(SLOW_DISK)
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, str(root / "slowly.py")]
    with subprocess.Popen(command, cwd=root, env=environment, stderr=subprocess.PIPE, text=True) as process:
        await_checkpoint(root)
        (root / "slow").touch()
        process.terminate()
        assert process.stderr is not None
        said = process.stderr.read()
    assert process.returncode == RESUME, said
    step = re.findall(r"after step (\d+) of 3000, state saved", said)[0]
    newest = max(root.glob(".scratch/checkpoints/*/step-*"))
    assert int(newest.name.removeprefix("step-")) == int(step)
    read_manifest(newest)


def test_the_code_of_the_process_that_fails_first_is_the_answer_and_none_is_left(tmp_path: Path) -> None:
    program = "import os, sys, time; sys.exit(75) if os.environ['RANK'] == '1' else time.sleep(600)"
    assert launcher.start_all([sys.executable, "-c", program], 3, tmp_path) == 75
    program = "import os; assert os.environ['WORLD_SIZE'] == '2'; open(os.environ['RANK'], 'w')"
    assert launcher.start_all([sys.executable, "-c", program], 2, tmp_path) == 0
    assert names(tmp_path) == ["0", "1"]
