"""The one process that serves every deployment of prefect.yaml: no pool, no worker."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from toy_project import REPOSITORY, kill_tree, post, prefect, quiet, ran
from waiting import await_true

from dreambooth.interruption import is_alive

pytestmark = pytest.mark.slow


def test_one_process_runs_what_is_asked_for_and_keeps_the_schedule(
    project: Path, prefect_home: Path, prefect_server: str
) -> None:
    shutil.copy(REPOSITORY / "prefect.yaml", project / "prefect.yaml")
    (project / "fail-export-rex").touch()  # so that nothing has to be registered
    environment = {**quiet(prefect_home), "PREFECT_API_URL": prefect_server}
    environment["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
    log = project / "serve.log"
    command = [sys.executable, "-m", "flows.serve"]
    with (
        log.open("w") as out,
        subprocess.Popen(command, cwd=project, env=environment, stdout=out, stderr=out) as served,
    ):
        try:
            await_true(lambda: "generate/batch" in log.read_text() or served.poll() is not None, 120)
            assert served.poll() is None, log.read_text()
            prefect(environment, "deployment", "run", "personalize/local", "--param", 'subject="rex"')
            wanted = {"deployments": {"name": {"any_": ["local"]}}, "sort": "EXPECTED_START_TIME_DESC", "limit": 1}
            await_true(lambda: post(prefect_server, "flow_runs/filter", wanted)[0]["state_type"] == "FAILED", 200, 1)
            assert {"train@rex", "export@rex"} <= set(ran(project))
            nightly = {
                "deployments": {"name": {"any_": ["nightly"]}},
                "flow_runs": {"state": {"name": {"any_": ["Scheduled"]}}},
            }
            await_true(lambda: post(prefect_server, "flow_runs/filter", nightly))
        finally:
            served.terminate()


def test_ctrl_c_ends_it_with_its_temporary_server_and_the_stage_that_runs(project: Path, tmp_path: Path) -> None:
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
            os.killpg(served.pid, signal.SIGINT)
            assert served.wait(25) == 0  # Prefect would ask its server for minutes
        finally:
            kill_tree(served.pid)
    assert "\nstopping: the stages save their state first" in log.read_text()
    assert not [process for process in below if is_alive(process)]


def test_outside_of_a_project_or_without_what_it_serves_a_line_says_so(project: Path, tmp_path: Path) -> None:
    environment = {**quiet(tmp_path / "prefect"), "PYTHONPATH": str(REPOSITORY)}
    for folder, message in ((tmp_path, "no dvc.yaml and params.yaml in "), (project, f"{project}/prefect.yaml is not")):
        done = subprocess.run(
            [sys.executable, "-m", "flows.serve"],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 9
        assert done.stderr.startswith(f"E_PIPELINE: {message}")
        assert len(done.stderr.splitlines()) == 1
