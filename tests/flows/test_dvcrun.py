import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from toy_project import dvc, ran
from waiting import await_true

from dreambooth.errors import PipelineError
from dreambooth.interruption import is_alive, tell
from flows import commandline, dvcrun
from flows.dvcrun import DvcRunner, StageRun

BUSY = "ERROR: failed to reproduce 'train@rex': 'models/rex' is busy, it is being blocked by:\n  (PID 1): dvc repro\n"


def fake_dvc(folder: Path, program: str) -> None:
    """Put a package called dvc into a folder: `python -m dvc` runs it when that is the current folder."""
    (folder / "dvc").mkdir()
    (folder / "dvc" / "__init__.py").touch()
    (folder / "dvc" / "__main__.py").write_text(program)


@pytest.mark.slow
def test_a_stage_runs_once_is_unchanged_then_and_comes_back_from_the_cache(project: Path) -> None:
    lines: list[str] = []
    runner = DvcRunner(project)
    first = runner.run("prior@dog", lines.append)
    assert (first.outcome, first.note) == ("ran", "prior dog: 0 reused, 2 generated")
    assert runner.run("prior@dog", lines.append).outcome == "unchanged"
    (project / "build" / "classes" / "dog" / "00000.png").unlink()
    assert runner.run("prior@dog", lines.append).outcome == "restored"
    assert ran(project) == ["prior@dog"]
    assert [line for line in lines if "|" in line] == [" 50%|=====     | 1/2", "100%|==========| 2/2"]
    assert all(line.strip() for line in lines)


@pytest.mark.slow
def test_what_a_person_ran_by_hand_is_unchanged_for_the_runner(project: Path) -> None:
    dvc(project, "repro", "validate@rex")
    assert DvcRunner(project).run("validate@rex", print).outcome == "unchanged"


@pytest.mark.slow
def test_a_failed_stage_is_told_with_its_name_its_code_and_its_exit_code(project: Path) -> None:
    (project / "fail-prior-dog").touch()
    with pytest.raises(PipelineError) as caught:
        DvcRunner(project).run("prior@dog", print)
    words = "prior@dog: E_TRAIN: the loss is NaN at step 3; lower train.learning_rate (exit 6)"
    assert str(caught.value) == words


def test_an_unknown_stage_is_told_in_the_words_of_dvc(project: Path) -> None:
    with pytest.raises(PipelineError, match=r"^train@tom: .*train@tom.*\(exit 255\)$"):
        DvcRunner(project).run("train@tom", print)


def test_photos_that_are_gone_are_told_in_the_words_of_dvc(project: Path) -> None:
    dvc(project, "add", "data/subjects/rex")
    shutil.rmtree(project / "data/subjects/rex")
    with pytest.raises(PipelineError, match=r"rex\.dvc: .*missing data 'source': data/subjects/rex \(exit 255\)"):
        DvcRunner(project).run("data/subjects/rex.dvc", print)


def test_a_crash_is_told_by_the_last_line_of_its_traceback(tmp_path: Path) -> None:
    program = (
        "print('Traceback ...'); print('ValueError: 7 is odd'); print('ERROR: failed to reproduce x: exited with 1')"
    )
    fake_dvc(tmp_path, program + "; raise SystemExit(255)")
    with pytest.raises(PipelineError, match=r"^train@rex: ValueError: 7 is odd \(exit 1\)$"):
        DvcRunner(tmp_path).run("train@rex", print)


def test_every_problem_of_a_stage_is_told(tmp_path: Path) -> None:
    fake_dvc(tmp_path, "print('E_PHOTOS: a.jpg is empty'); print('E_PHOTOS: b.jpg is empty'); raise SystemExit(255)")
    with pytest.raises(PipelineError, match=r"E_PHOTOS: a.jpg is empty \| E_PHOTOS: b.jpg is empty \(exit 255\)"):
        DvcRunner(tmp_path).run("validate@rex", print)


def test_a_stage_that_saved_its_state_says_so(tmp_path: Path) -> None:
    fake_dvc(tmp_path, "print('ERROR: failed to reproduce x: exited with 75'); raise SystemExit(255)")
    with pytest.raises(PipelineError, match="stopped with its state saved; run it again to continue"):
        DvcRunner(tmp_path).run("train@rex", print)


RUNNING = "E_RUNNING: the training of rex is already running: pid 7 on box; wait for it, or stop it"
EXIT_75 = "print('ERROR: failed to reproduce x: exited with 75'); raise SystemExit(255)"


def test_a_stage_that_another_process_runs_is_told_with_its_pid_and_host(tmp_path: Path) -> None:
    fake_dvc(tmp_path, f"print({RUNNING!r}); {EXIT_75}")
    pauses: list[float] = []
    with pytest.raises(PipelineError) as caught:
        DvcRunner(tmp_path, patience=3, sleep=pauses.append).run("train@rex", print)
    assert str(caught.value) == f"train@rex: {RUNNING} (exit 75)"
    assert pauses == [1.0, 2.0]


def test_a_stage_that_another_process_runs_is_waited_for(tmp_path: Path) -> None:
    fake_dvc(
        tmp_path,
        "from pathlib import Path\n"
        f"if not Path('tried').exists():\n    Path('tried').touch(); print({RUNNING!r}); {EXIT_75}\n"
        "print('Running stage rex')\n",
    )
    pauses: list[float] = []
    assert DvcRunner(tmp_path, sleep=pauses.append).run("train@rex", print).outcome == "ran"
    assert pauses == [1.0]


def test_a_stage_that_was_told_to_stop_says_that_its_state_is_saved(tmp_path: Path) -> None:
    fake_dvc(tmp_path, f"print('E_INTERRUPTED: stopped after step 1 of 6, state saved'); {EXIT_75}")
    with pytest.raises(PipelineError, match="stopped with its state saved; run it again to continue"):
        DvcRunner(tmp_path).run("train@rex", print)


@pytest.mark.fault(25)
def test_busy_files_are_waited_for_twice_as_long_each_time(tmp_path: Path) -> None:
    fake_dvc(
        tmp_path,
        "from pathlib import Path\n"
        "tries = Path('tries')\n"
        "count = len(tries.read_text()) if tries.exists() else 0\n"
        "tries.write_text('x' * (count + 1))\n"
        f"if count < 3:\n    print({BUSY!r})\n    raise SystemExit(255)\n"
        "print('Running stage')\n",
    )
    pauses: list[float] = []
    lines: list[str] = []
    run = DvcRunner(tmp_path, sleep=pauses.append).run("train@rex", lines.append)
    assert isinstance(run, StageRun)
    assert pauses == [1.0, 2.0, 4.0]
    assert "train@rex: another process works on the same files; trying again in 4 s" in lines


def test_patience_ends(tmp_path: Path) -> None:
    fake_dvc(tmp_path, f"print({BUSY!r}); raise SystemExit(255)")
    pauses: list[float] = []
    with pytest.raises(PipelineError, match="is busy, it is being blocked by"):
        DvcRunner(tmp_path, patience=100, sleep=pauses.append).run("train@rex", print)
    assert pauses == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0]


def test_a_stage_that_prints_is_busy_is_not_run_again(tmp_path: Path) -> None:
    fake_dvc(tmp_path, "print('the line is busy, it is being blocked by a bus'); raise SystemExit(255)")
    pauses: list[float] = []
    with pytest.raises(PipelineError):
        DvcRunner(tmp_path, sleep=pauses.append).run("train@rex", print)
    assert pauses == []


@pytest.mark.slow
@pytest.mark.fault(25)
def test_two_runs_of_one_stage_at_once_execute_it_once(project: Path) -> None:
    (project / "toy.py").write_text((project / "toy.py").read_text().replace("def main", "time.sleep(1)\n\n\ndef main"))
    program = (
        "import sys; from pathlib import Path; from flows.dvcrun import DvcRunner;"
        "print(DvcRunner(Path(sys.argv[1])).run('prior@dog', print).outcome)"
    )
    command = [sys.executable, "-c", program, str(project)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outcomes = sorted(child.communicate()[0].splitlines()[-1] for child in both)
    assert outcomes == ["ran", "unchanged"]
    assert ran(project) == ["prior@dog"]


@pytest.mark.slow
def test_no_process_survives_an_interrupted_parent(project: Path) -> None:
    (project / "slow-prior-dog").touch()
    program = (
        "import sys; from pathlib import Path; from flows.dvcrun import DvcRunner;"
        "DvcRunner(Path(sys.argv[1])).run('prior@dog', print)"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(project)], stderr=subprocess.DEVNULL) as parent:
        await_true(lambda: (project / "started-prior-dog").exists())
        below = psutil.Process(parent.pid).children(recursive=True)
        assert len({_group(process.pid) for process in below} | {_group(parent.pid)}) == 1
        parent.send_signal(signal.SIGINT)
        parent.wait(20)
    assert len(below) >= 2
    assert not [process for process in below if is_alive(process)]


def test_a_process_is_alive_until_it_is_dead_buried_or_not() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        process = psutil.Process(child.pid)
        assert is_alive(process)
        tell(process.kill)
        await_true(lambda: process.status() == psutil.STATUS_ZOMBIE)
        assert not is_alive(process)
    assert not is_alive(process)


def test_a_process_that_may_not_be_told_is_let_be() -> None:
    def refuse() -> None:
        raise psutil.AccessDenied(1)

    tell(refuse)


def test_a_stopped_runner_starts_nothing(project: Path) -> None:
    runner = DvcRunner(project)
    runner.stop()
    with pytest.raises(PipelineError, match="not started, the run was stopped"):
        runner.run("prior@dog", print)
    assert ran(project) == []


def test_a_runner_that_is_stopped_tells_the_last_words_of_its_stages(tmp_path: Path) -> None:
    fake_dvc(
        tmp_path,
        "import signal, sys, time\n"
        "def stop(number, frame): print('E_INTERRUPTED: stopped after step 3 of 9, state saved'); sys.exit(255)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "print('ready')\n"
        "time.sleep(60)\n",
    )
    runner, ready = DvcRunner(tmp_path), threading.Event()
    thread = threading.Thread(target=lambda: _refused(lambda: runner.run("train@rex", lambda _: ready.set())))
    thread.start()
    assert ready.wait(30)
    assert dvcrun.stop_all()["train@rex"] == "stopped after step 3 of 9, state saved"
    thread.join(30)
    assert not thread.is_alive()
    assert runner.stop() == {}


def test_python_of_a_stage_is_the_python_that_runs() -> None:
    environment = commandline.child_environment(Path())
    assert environment["PATH"].startswith(str(Path(sys.executable).parent))
    assert environment["DVC_NO_ANALYTICS"] == "1"


def _refused(call: Callable[[], object]) -> None:
    with pytest.raises(PipelineError):
        call()


def _group(pid: int) -> int:
    return os.getpgid(pid)
