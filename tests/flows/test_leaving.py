"""A run that is told to stop: real signals to the whole process group, as a terminal sends them."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from toy_project import REPOSITORY, kill_tree, make_origin, post, quiet
from waiting import await_true

from dreambooth.interruption import ONE_REQUEST, is_alive
from flows.copies import SWEEPS
from flows.leaving import in_words

SAVES = """
    if stage == "train":
        from dreambooth.interruption import stop_request
        with stop_request() as stop:
            Path(f"started-{stage}-{key}").touch()
            while not stop:
                time.sleep(0.1)
            time.sleep(float(Path("seconds").read_text()))
            Path(os.environ.get("TOY_SAVED", "saved")).touch()
            sys.stderr.write("E_INTERRUPTED: stopped after step 3 of 9, state saved\\n")
            raise SystemExit(75)
"""


@pytest.fixture
def saving(project: Path) -> Path:
    """A project whose training goes on until it is told to stop, and then takes a second to save its state.

    As many as stand in the file `seconds`.
    """
    (project / "seconds").write_text("1")
    toy = project / "toy.py"
    mark = '    sys.stderr.write("\\r'
    toy.write_text(toy.read_text().replace(mark, SAVES + mark))
    return project


@contextmanager
def training(
    root: Path, prefect_home: Path, server: str | None, is_piped: bool = False
) -> Iterator[subprocess.Popen[bytes]]:
    """Start `dreambooth run rex` as a terminal does, in a group of its own, and wait until it trains."""
    environment = {**quiet(prefect_home), "COLUMNS": "160", "PYTHONPATH": str(REPOSITORY)}
    environment["SHELL"] = "/bin/sh"  # as in a container: a dash that would stay between DVC and its stage
    environment.pop("PREFECT_API_URL", None)
    command = [sys.executable, "-m", "flows.cli", "run", "rex"]
    with (root / "said").open("w") as said:
        run = subprocess.Popen(
            command, cwd=root, env=environment | ({"PREFECT_API_URL": server} if server else {}),
            stdout=subprocess.PIPE if is_piped else said, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        await_true(lambda: run.poll() is not None or (root / "started-train-rex").exists(), patience=120)
        assert run.poll() is None, (root / "said").read_text()
        time.sleep(0.5)
        yield run
    finally:
        kill_tree(run.pid)
        run.wait()


@pytest.mark.slow
@pytest.mark.fault(17)
@pytest.mark.parametrize(
    ("number", "is_group"), [(signal.SIGTERM, False), (signal.SIGTERM, True), (signal.SIGINT, True)]
)
def test_a_sweep_that_is_told_to_stop_lets_its_stage_save_its_state_says_so_and_leaves_no_process(
    saving: Path, tmp_path: Path, number: signal.Signals, is_group: bool
) -> None:
    """A service manager tells the command alone, `timeout` and a terminal its whole group."""
    (saving / "data/base/emoji64/kept").touch()  # git knows no empty folder
    make_origin(saving)
    saved = tmp_path / "saved"
    environment = {**os.environ, "COLUMNS": "160", "PYTHONPATH": str(REPOSITORY), "TOY_SAVED": str(saved)}
    command = [sys.executable, "-m", "flows.cli", "sweep", "rex", "-S", "train.seed=1,2"]
    with (saving / "said").open("w") as said:
        run = subprocess.Popen(
            command, cwd=saving, env=environment, stdout=said, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        experiments = saving / SWEEPS
        await_true(lambda: run.poll() is not None or any(experiments.glob("*/started-train-rex")), patience=120)
        assert run.poll() is None, (saving / "said").read_text()
        below = psutil.Process(run.pid).children(recursive=True)
        assert len(below) >= 2  # DVC and the stage
        (os.killpg if is_group else os.kill)(run.pid, number)
        assert run.wait(60) == 75
        assert not [process for process in below if is_alive(process)]
    finally:
        kill_tree(run.pid)
        run.wait()
    assert saved.exists()
    assert (saving / "said").read_text().splitlines()[-2:] == [
        "stopping: the stages save their state first; the same signal again ends them at once",
        "E_INTERRUPTED: stopped; the same command continues",
    ]
    assert not list((saving / "reports").glob("sweep-*.csv"))  # nothing failed


def locks_of_dvc(root: Path) -> object:
    return json.loads((root / ".dvc/tmp/rwlock").read_text())


@pytest.mark.slow
@pytest.mark.fault(17)
@pytest.mark.parametrize(("number", "twice"), [(signal.SIGINT, False), (signal.SIGTERM, False), (signal.SIGTERM, True)])
def test_a_run_that_is_told_to_stop_says_in_one_line_that_the_state_is_saved_and_leaves_no_process(
    saving: Path, prefect_home: Path, number: signal.Signals, twice: bool
) -> None:
    """Twice as `timeout` does: the process that it started, then its group."""
    with training(saving, prefect_home, server=None) as run:
        below = psutil.Process(run.pid).children(recursive=True)
        assert len(below) >= 3  # the server, DVC and the stage
        began = time.monotonic()
        if twice:
            os.kill(run.pid, number)
        os.killpg(run.pid, number)
        assert run.wait(60) == 75
        assert time.monotonic() - began < 60  # without its server Prefect would go on for minutes
        assert not [process for process in below if is_alive(process)]
    said = (saving / "said").read_text()
    assert (saving / "saved").exists()
    assert said.splitlines()[-2:] == [
        "stopping: the stages save their state first; the same signal again ends them at once",
        "E_INTERRUPTED: train@rex: stopped after step 3 of 9, state saved; dreambooth run rex continues",
    ]
    assert "Traceback" not in said
    assert "ERROR" not in said
    locks_of_dvc(saving)


@pytest.mark.slow
@pytest.mark.fault(17)
def test_a_second_ctrl_c_ends_a_run_at_once_and_leaves_no_process_and_no_torn_lock(
    saving: Path, prefect_home: Path
) -> None:
    (saving / "seconds").write_text("300")
    with training(saving, prefect_home, server=None) as run:
        below = psutil.Process(run.pid).children(recursive=True)
        os.killpg(run.pid, signal.SIGINT)
        await_true(lambda: "stopping: " in (saving / "said").read_text(), pause=0.05)
        time.sleep(ONE_REQUEST)
        os.killpg(run.pid, signal.SIGINT)
        assert run.wait(60) == 130
        assert not [process for process in below if is_alive(process)]
    assert "Traceback" not in (saving / "said").read_text()
    assert not (saving / "saved").exists()
    locks_of_dvc(saving)


@pytest.mark.slow
@pytest.mark.fault(17)
def test_a_run_that_nobody_reads_any_more_ends_as_well(saving: Path, prefect_home: Path) -> None:
    """As `dreambooth run 2>&1 | tee log`: Ctrl-C ends tee first."""
    with training(saving, prefect_home, server=None, is_piped=True) as run:
        assert run.stdout is not None
        run.stdout.close()
        os.killpg(run.pid, signal.SIGINT)
        assert run.wait(60) == 75
    assert (saving / "saved").exists()


@pytest.mark.slow
@pytest.mark.fault(17)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 75), (signal.SIGTERM, -signal.SIGTERM)])
def test_a_server_that_stays_hears_that_a_run_was_stopped(
    saving: Path, prefect_home: Path, prefect_server: str, number: signal.Signals, code: int
) -> None:
    with training(saving, prefect_home, prefect_server) as run:
        os.killpg(run.pid, number)
        assert run.wait(60) == code
        await_true((saving / "saved").exists, patience=60)  # SIGTERM is Prefect's there, which waits for no stage
    said = (saving / "said").read_text()
    if number == signal.SIGINT:
        assert said.splitlines()[-1].startswith("E_INTERRUPTED: train@rex: stopped after step 3 of 9, state saved; ")
    assert "Traceback" not in said
    wanted = {"sort": "START_TIME_DESC", "flow_runs": {"start_time": {"is_null_": False}}, "limit": 1}
    assert post(prefect_server, "flow_runs/filter", wanted)[0]["state"]["type"] == "CRASHED"


def test_what_was_stopped_is_told_by_stage_with_the_command_that_goes_on() -> None:
    stopped = {"train@rex": "stopped after step 3 of 9, state saved", "prior@cat": ""}
    told = "train@rex: stopped after step 3 of 9, state saved, prior@cat: stopped; dreambooth run rex tom continues"
    assert in_words(stopped, ["rex", "tom"]) == told
    assert in_words({}, ["rex"]) == "stopped; dreambooth run rex continues"
