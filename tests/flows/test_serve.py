"""The one process that serves every deployment of prefect.yaml: no pool, no worker."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from servers import prefect_with_leases, running
from toy_project import REPOSITORY, kill_tree, post, prefect, quiet, ran
from waiting import await_true

from dreambooth.interruption import is_alive

pytestmark = pytest.mark.slow
COMMAND = [sys.executable, "-m", "flows.serve"]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """What a process needs that serves beside a server of its own, on which nothing is deployed."""
    folder = tmp_path_factory.mktemp("prefect")
    server = prefect_with_leases(folder)
    with running(server):
        paths = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
        yield {**quiet(folder), "PREFECT_API_URL": f"{server.address}/api", "PYTHONPATH": paths}


def test_one_process_runs_what_is_asked_for_and_keeps_the_schedule_also_once_it_has_ended(
    project: Path, environment: dict[str, str]
) -> None:
    shutil.copy(REPOSITORY / "prefect.yaml", project / "prefect.yaml")
    (project / "fail-export-rex").touch()  # so that nothing has to be registered
    api, log = environment["PREFECT_API_URL"], project / "serve.log"
    with (
        log.open("w") as out,
        subprocess.Popen(COMMAND, cwd=project, env=environment, stdout=out, stderr=out) as served,
    ):
        try:
            await_true(lambda: "generate/batch" in log.read_text() or served.poll() is not None, 120)
            assert served.poll() is None, log.read_text()
            prefect(environment, "deployment", "run", "personalize/local", "--param", 'subject="rex"')
            wanted = {"deployments": {"name": {"any_": ["local"]}}, "sort": "EXPECTED_START_TIME_DESC", "limit": 1}
            await_true(lambda: post(api, "flow_runs/filter", wanted)[0]["state_type"] == "FAILED", 200, 1)
            assert {"train@rex", "export@rex"} <= set(ran(project))
            nightly = {
                "deployments": {"name": {"any_": ["nightly"]}},
                "flow_runs": {"state": {"name": {"any_": ["Scheduled"]}}},
            }
            await_true(lambda: post(api, "flow_runs/filter", nightly))
        finally:
            served.terminate()
    assert {one["paused"] for one in post(api, "deployments/filter", {})} == {False}


def test_what_workers_start_is_not_taken_from_them(project: Path, environment: dict[str, str]) -> None:
    shutil.copy(REPOSITORY / "prefect.yaml", project / "prefect.yaml")
    api = environment["PREFECT_API_URL"]
    prefect(environment, "work-pool", "create", "dreambooth", "--type", "process", "--overwrite")
    prefect(environment, "deploy", "--all")
    before = post(api, "deployments/filter", {})
    assert {one["work_pool_name"] for one in before} == {"dreambooth"}
    done = subprocess.run(
        COMMAND, cwd=project, env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 9
    assert done.stderr.startswith("E_PIPELINE: personalize/local, personalize/clone, ")
    assert done.stderr.endswith("for each: prefect deployment delete personalize/local\n")
    assert len(done.stderr.splitlines()) == 1
    kept = ("id", "paused", "pull_steps", "job_variables", "work_pool_name")
    assert [[one[key] for key in kept] for one in post(api, "deployments/filter", {})] == [
        [one[key] for key in kept] for one in before
    ]


def test_the_doctor_names_a_deployment_that_is_switched_off(project: Path, environment: dict[str, str]) -> None:
    api, doctor = environment["PREFECT_API_URL"], [sys.executable, "-m", "flows.cli", "doctor"]
    prefect(environment, "work-pool", "create", "dreambooth", "--type", "process", "--overwrite")
    prefect(environment, "deploy", "--name", "nightly", "--name", "batch")
    wanted = {"deployments": {"name": {"any_": ["nightly"]}}}
    (nightly,) = post(api, "deployments/filter", wanted)
    for what, told in (("resume", False), ("pause", True)):
        post(api, f"deployments/{nightly['id']}/{what}_deployment", {})
        done = subprocess.run(doctor, cwd=project, env=environment, capture_output=True, text=True, check=False)
        assert ("paused, so nothing starts by itself: nightly" in " ".join(done.stdout.split())) == told, done.stdout


@pytest.mark.parametrize(("stop", "number"), [(os.killpg, signal.SIGINT), (os.kill, signal.SIGTERM)])
def test_ctrl_c_and_sigterm_end_it_with_its_temporary_server_and_the_stage_that_runs(
    project: Path, tmp_path: Path, stop: Callable[[int, int], None], number: signal.Signals
) -> None:
    shutil.copy(REPOSITORY / "prefect.yaml", project / "prefect.yaml")
    (project / "slow-train-rex").touch()
    environment = {**quiet(tmp_path / "prefect"), "PYTHONPATH": str(REPOSITORY)}
    environment.pop("PREFECT_API_URL", None)
    log, command = project / "serve.log", [sys.executable, "-m", "flows.serve"]
    with (
        log.open("w") as out,
        subprocess.Popen(
            command, cwd=project, env=environment, stdout=out, stderr=out, start_new_session=True
        ) as served,
    ):
        try:
            await_true(lambda: "generate/batch" in log.read_text() or served.poll() is not None, 120)
            (api,) = re.findall(r"Starting temporary server on (\S+)", log.read_text())
            there = environment | {"PREFECT_API_URL": f"{api}/api"}
            prefect(there, "deployment", "run", "personalize/local", "--param", 'subject="rex"')
            await_true((project / "started-train-rex").exists, 120)
            below = psutil.Process(served.pid).children(recursive=True)
            stop(served.pid, number)
            assert served.wait(25) == 0  # Prefect would ask its server for minutes
        finally:
            kill_tree(served.pid)
    assert "\nstopping: the stages save their state first" in log.read_text()
    assert not [process for process in below if is_alive(process)]


def test_outside_of_a_project_or_without_what_it_serves_a_line_says_so(project: Path, tmp_path: Path) -> None:
    environment = {**quiet(tmp_path / "prefect"), "PYTHONPATH": str(REPOSITORY)}
    for folder, message in ((tmp_path, "no dvc.yaml and params.yaml in "), (project, f"{project}/prefect.yaml is not")):
        done = subprocess.run(
            COMMAND,
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 9
        assert done.stderr.startswith(f"E_PIPELINE: {message}")
        assert len(done.stderr.splitlines()) == 1
