"""The benchmark at toy size: both sides really run, and every number follows from whole runs."""

import itertools
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import psutil
import pytest
from tiny_project import REPOSITORY, add_photos

from benchmarks import usage
from benchmarks.bench import (
    VARIANTS,
    Kept,
    Measured,
    comparison_key,
    derive,
    floors,
    main,
    measure,
    report,
    second_subject,
    table,
)
from benchmarks.floors import Peaks, Work, count_work
from benchmarks.recipe import Ours, Recipe, Reference, Variant, find_script
from benchmarks.usage import CommandError, Usage, run

# Stands in for train_dreambooth.py, which is not ours to store: it refuses what the real one does not know, draws what
# is missing into the class folder, and takes a moment for each step.
SCRIPT = """
import argparse, pathlib, time
parser = argparse.ArgumentParser()
for name in ("pretrained_model_name_or_path", "instance_data_dir", "class_data_dir", "output_dir", "instance_prompt",
             "class_prompt", "prior_generation_precision", "lr_scheduler", "mixed_precision"):
    parser.add_argument(f"--{name}", required=True)
for name in ("num_class_images", "sample_batch_size", "resolution", "train_batch_size", "gradient_accumulation_steps",
             "max_train_steps", "lr_warmup_steps", "checkpointing_steps", "seed"):
    parser.add_argument(f"--{name}", type=int, required=True)
for name in ("learning_rate", "prior_loss_weight"):
    parser.add_argument(f"--{name}", type=float, required=True)
for name in ("with_prior_preservation", "train_text_encoder"):
    parser.add_argument(f"--{name}", action="store_true", required=True)
given = parser.parse_args()
assert len(list(pathlib.Path(given.instance_data_dir).iterdir())) == 3
drawn = pathlib.Path(given.class_data_dir)
drawn.mkdir(exist_ok=True)
for number in range(len(list(drawn.iterdir())), given.num_class_images):
    time.sleep(0.05)
    (drawn / f"{number}.jpg").touch()
time.sleep(0.02 * given.max_train_steps)
pathlib.Path(given.output_dir).mkdir()
"""


@pytest.fixture
def recipe(tmp_path: Path, tiny_model_folder: Path) -> Recipe:
    add_photos(tmp_path / "photos", 3)
    (tmp_path / "photos/00.txt").write_text("a photo of {} at home")
    return Recipe(tiny_model_folder, tmp_path / "photos", "dog", 32, 10, 2, 1, 2, 1e-5, "no", 2)


def test_all_numbers_follow_from_four_whole_runs(recipe: Recipe) -> None:
    seconds = {"cold": 30.0, "warm": 20.0, "short": 11.0, "checkpoint": 23.0}
    runs = {variant: Usage(seconds[variant], 0, 100) for variant in VARIANTS}
    found = derive(runs, recipe, "wall")
    assert recipe.short_steps == 1
    assert (found["step"], found["startup"], found["image"], found["checkpoint"]) == (1, 10, 5, 3)


def test_ratios_stand_before_the_numbers_and_beside_their_floors() -> None:
    numbers = dict.fromkeys(("cold", "warm", "step", "image", "startup", "checkpoint", "memory"), 2.0) | {
        "gpu_memory": 0
    }
    one, other = Measured(numbers, numbers), Measured({name: 3 * value for name, value in numbers.items()}, numbers)
    found = {"ours": [one, one, one], "reference": [other, one, other]}
    least = {name: dict.fromkeys(numbers, 0.5) for name in found}
    line = table(found, least, "wall").splitlines()[2]
    assert line == "| whole recipe, cold | 3.00 | 2 s [2, 2] | 4.00 | 6 s [2, 6] | 12.00 |"
    assert "GPU" not in table(found, least, "wall")


def test_a_difference_that_was_not_seen_has_no_ratio() -> None:
    numbers = dict.fromkeys(("cold", "warm", "step", "image", "startup", "checkpoint", "memory", "gpu_memory"), -1.0)
    found = {"ours": [Measured(numbers, numbers)]}
    assert "| - |" in table(found, {"ours": numbers}, "wall").splitlines()[2]


def test_the_floor_of_a_step_is_its_arithmetic_over_the_peak(recipe: Recipe) -> None:
    least = floors(Work(step=10, denoising=3, decoding=4, trained_weights=10**6), Peaks(2, 4e6, 1), recipe, 2)
    assert least["step"] == 5
    assert least["image"] == (2 * 3 + 4) / 2
    assert least["cold"] - least["warm"] == recipe.class_images * least["image"]
    assert least["checkpoint"] == 3
    assert least["memory"] == 16


def test_the_arithmetic_of_a_step_grows_with_its_rows(recipe: Recipe) -> None:
    one, four = (count_work(recipe.base, rows, recipe.resolution) for rows in (recipe.train_batch_size, 4))
    assert four.step == 4 * one.step
    assert one.step > 3 * one.denoising / 2  # forward and backward are three times the forward, and there is the text


def test_both_sides_are_told_the_same(recipe: Recipe, tmp_path: Path) -> None:
    ours = Ours(recipe, tmp_path / "ours").parameters("checkpoint")
    words = Reference(recipe, Path("x.py"), tmp_path / "reference").command("checkpoint")
    told = dict(itertools.pairwise(words))
    for name in (
        "train_batch_size",
        "max_train_steps",
        "learning_rate",
        "seed",
        "checkpointing_steps",
        "mixed_precision",
    ):
        assert told[f"--{name}"] == str(ours["train"][name]), name
    assert told["--num_class_images"] == str(ours["prior"]["num_class_images"])
    assert told["--sample_batch_size"] == str(ours["prior"]["batch_size"])
    assert told["--resolution"] == str(ours["base"]["resolution"])
    assert ours["train"]["train_text_encoder"]
    assert ours["train"]["prior_loss_weight"] == float(told["--prior_loss_weight"])
    assert recipe.steps // 2 < ours["train"]["checkpointing_steps"] < recipe.steps  # one checkpoint, whoever writes it


class Counting:
    """A side that notes its runs, and is stopped in one of them."""

    def __init__(self, name: str, stop_at: int | None = None) -> None:
        self.name, self.runs, self.stop_at = name, 0, stop_at

    def run(self, variant: Variant) -> Usage:
        if self.runs == self.stop_at:
            raise KeyboardInterrupt
        self.runs += 1
        return Usage(float(self.runs), 0, 0)


def test_a_benchmark_that_was_stopped_goes_on_with_the_first_run_that_is_missing(
    recipe: Recipe, tmp_path: Path
) -> None:
    kept = tmp_path / "runs.json"
    with pytest.raises(KeyboardInterrupt):
        measure([Counting("ours"), Counting("reference", stop_at=2)], recipe, 1, kept)
    ours, reference = Counting("ours"), Counting("reference")
    found = measure([ours, reference], recipe, 1, kept)
    assert (ours.runs, reference.runs) == (1, 2)  # of four each; three and two were there
    assert found["reference"][0].wall["warm"] == 2


def test_the_next_subject_is_told_by_the_reference_cold_and_ours_warm() -> None:
    ours, reference = ({"cold": 6.0, "warm": 2.0}, {"cold": 12.0, "warm": 5.0})
    found = {"ours": [Measured(ours, ours)], "reference": [Measured(reference, reference)]}
    assert "**6.00**" in second_subject(found, "wall")
    assert not second_subject({"ours": found["ours"]}, "wall")


def test_neither_side_gets_captions(recipe: Recipe, tmp_path: Path) -> None:
    assert (recipe.photos / "00.txt").exists()
    Ours(recipe, tmp_path / "ours")
    Reference(recipe, Path("x.py"), tmp_path / "reference")
    assert not list(tmp_path.glob("ours/**/00.txt"))
    assert not list(tmp_path.glob("reference/**/*.txt"))


def test_who_stops_the_benchmark_stops_what_it_measures(tmp_path: Path) -> None:
    program = (
        "import os, sys; from benchmarks.usage import run; from dreambooth.interruption import on_stop; from pathlib "
        "import Path\nwith on_stop(lambda number, frame: sys.exit(1)): run([sys.executable, '-c', \"import os, time; "
        "open('pid', 'w').write(str(os.getpid())); time.sleep(60)\"], Path('.'), os.environ, Path('log'))"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, env=environment)
    while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text()):
        assert process.poll() is None
        time.sleep(0.1)
    process.terminate()
    process.wait(30)
    with suppress(psutil.NoSuchProcess):  # its starter is gone too, so that another one has to bury it
        assert psutil.Process(int((tmp_path / "pid").read_text())).wait(10) is None


def test_a_command_that_fails_shows_its_last_lines(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match=r"exited with 3:\nno such thing"):
        run(
            [sys.executable, "-c", "print('no such thing'); raise SystemExit(3)"],
            tmp_path,
            os.environ,
            tmp_path / "log",
        )


def test_the_memory_of_a_command_is_its_own_whatever_its_starter_holds(tmp_path: Path) -> None:
    program = (
        "import os, sys; from benchmarks.usage import run; from pathlib import Path\nmuch = b'x' * 300_000_000\n"
        "print(run([sys.executable, '-c', 'pass'], Path('.'), os.environ, Path('log')).memory)"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    told = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, check=True
    )
    assert 1 < float(told.stdout) < 50


def test_the_cost_of_a_command_is_that_of_its_process(tmp_path: Path) -> None:
    work = "x = bytearray(200 << 20)\nfor i in range(3_000_000): pass"
    cost = run([sys.executable, "-c", work], tmp_path, os.environ, tmp_path / "log")
    assert cost.memory > 200
    assert cost.cpu > 0


def test_a_port_for_a_server_is_one_that_nobody_has_and_no_outgoing_connection_gets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    free = usage.free_port()
    handed_out = Path("/proc/sys/net/ipv4/ip_local_port_range")
    assert not handed_out.exists() or usage.PORTS.stop <= int(handed_out.read_text().split()[0])
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setattr(usage, "PORTS", [taken.getsockname()[1], free])
        assert {usage.free_port() for _ in range(20)} == {free}


def test_the_script_is_found_in_a_checkout(tmp_path: Path) -> None:
    place = tmp_path / "examples/dreambooth"
    place.mkdir(parents=True)
    (place / "train_dreambooth.py").touch()
    assert find_script(tmp_path) == find_script(place) == place / "train_dreambooth.py"
    with pytest.raises(FileNotFoundError, match="--reference"):
        find_script(tmp_path / "nothing")


@pytest.mark.slow
@pytest.mark.parametrize("there", [("short", "checkpoint"), pytest.param((), marks=pytest.mark.nightly)])
def test_the_benchmark_runs_at_toy_size_and_says_what_it_did_not_measure(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: Sequence[str]
) -> None:
    """Each of our four runs is four processes: those that are there were measured before a stop."""
    script = tmp_path / "train_dreambooth.py"
    script.write_text(SCRIPT)
    recipe = replace(recipe, steps=3, train_batch_size=1)
    for variant in there:
        folder = tmp_path / "scratch" / comparison_key(recipe, script)
        folder.mkdir(parents=True, exist_ok=True)
        Kept(folder / "runs.json").run(f"1 {variant} ours", lambda: Usage(9.0, 9.0, 99.0))
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    arguments = {
        "reference": tmp_path, "base": recipe.base, "photos": recipe.photos, "resolution": 32, "steps": 3,
        "class-images": 2, "train-batch-size": 1, "sample-batch-size": 2, "sampler-steps": 2, "repeats": 1,
        "scratch": tmp_path / "scratch", "peak-size": 64, "out": tmp_path / "results",
    }  # fmt: skip
    path = main([word for name, value in arguments.items() for word in (f"--{name}", str(value))])
    text = path.read_text()
    assert "GPU: not measured." in text
    assert text.index("| reference / ours |") < text.index("whole recipe, cold")
    for label in ("whole recipe, cold", "whole recipe, class images there", "a step", "a class image", "start-up"):
        assert text.count(f"| {label}") == 2
    assert path.parent == tmp_path / "results"
    assert "The next subject of the class" in text
    assert not list((tmp_path / "scratch").iterdir())


def test_without_a_reference_ours_alone_is_reported(recipe: Recipe) -> None:
    numbers = dict.fromkeys(("cold", "warm", "step", "image", "startup", "checkpoint", "memory", "gpu_memory"), 1.0)
    text = report({"ours": [Measured(numbers, numbers)]}, {"ours": numbers}, recipe, Peaks(1, 1, 1), None)
    assert "The reference was not measured: no --reference." in text
    assert "reference / ours" not in text


PROGRAMS = [
    path.stem
    for path in (REPOSITORY / "benchmarks").glob("*.py")
    if f"python -m benchmarks.{path.stem}" in path.read_text()
]


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_says_what_is_measured_and_how(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = import_module(f"benchmarks.{name}")
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as done:
        module.main()
    assert done.value.code == 0
    assert module.__doc__ in capsys.readouterr().out


def test_help_names_the_arithmetic() -> None:
    from benchmarks import bench

    assert "(cold - warm) / images" in str(bench.__doc__)
