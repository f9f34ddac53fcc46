"""The servers of MLflow and Prefect die in the middle of a training and come back: nothing of the work is lost."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tiny_project import REPOSITORY, make_project, tiny_values
from toy_project import await_health, await_true, kill_tree, post, prefect, quiet, worker

from dreambooth import tracking
from dreambooth.versions import find

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
STEPS = 1500


class Server:
    """A server on a port and with a database of its own, which can be killed and started again on both."""

    def __init__(self, command: list[str], health: str, environment: dict[str, str], folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.address = f"http://127.0.0.1:{self.port}"
        self._command = [sys.executable, "-m", *command, "--host", "127.0.0.1", "--port", str(self.port)]
        self._health, self._environment, self._folder = health, environment, folder
        self.start()

    def start(self) -> None:
        log = self._folder / "log"
        with log.open("a") as out:
            self._process = subprocess.Popen(
                self._command, cwd=self._folder, env=self._environment, stdout=out, stderr=out, start_new_session=True
            )
        await_health(self.address + self._health, log)

    def kill(self) -> None:
        kill_tree(self._process.pid)
        self._process.wait()


@contextmanager
def servers(folder: Path) -> Iterator[tuple[Server, Server]]:
    """Start MLflow and Prefect with what docs/operations.md sets for them."""
    leases = "prefect.server.concurrency.lease_storage.filesystem"
    homes = [folder / "mlflow", folder / "prefect"]
    for home in homes:
        home.mkdir()
    quietly = {name: value for name, value in quiet(homes[1]).items() if name != "MLFLOW_TRACKING_URI"}
    quietly["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{quietly['PATH']}"  # mlflow starts uvicorn by name
    mlflow = ["mlflow", "server", "--workers", "1", "--backend-store-uri", f"sqlite:///{homes[0]}/mlflow.db"]
    alone = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    leased = {"PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": leases}
    started: list[Server] = []
    try:
        started.append(Server(mlflow, "/health", quietly | alone, homes[0]))
        started.append(Server(["prefect", "server", "start"], "/api/health", quietly | leased, homes[1]))
        yield started[0], started[1]
    finally:
        for one in started:
            one.kill()


@pytest.fixture
def training_project(tmp_path: Path, tiny_model_folder: Path) -> Path:
    """A project with this repository's dvc.yaml and code whose training takes a minute."""
    from dvc.repo import Repo

    values = tiny_values()
    values["train"] |= {"max_train_steps": STEPS, "checkpointing_steps": 200}
    root = make_project(tmp_path / "project", tiny_model_folder, values)
    for name in ("dreambooth", "stages"):
        shutil.copytree(REPOSITORY / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "dvc.yaml", root)
    Repo.init(str(root), no_scm=True).close()
    return root


def test_both_servers_die_in_a_training_and_come_back(training_project: Path, tmp_path: Path) -> None:
    with servers(tmp_path) as (mlflow, prefect_server):
        print(mlflow.address, prefect_server.address)
        api = f"{prefect_server.address}/api"
        environment = {
            **quiet(tmp_path / "prefect"),
            "PREFECT_API_URL": api,
            "MLFLOW_TRACKING_URI": mlflow.address,
            "DREAMBOOTH_HOME": str(training_project),
            "PYTHONPATH": str(REPOSITORY),
        }
        environment.pop("DREAMBOOTH_TRACKING", None)
        prefect(environment, "work-pool", "create", "dreambooth", "--type", "process")
        prefect(environment, "gcl", "create", "gpu", "--limit", "1")
        prefect(environment, "deploy", "--name", "local")
        subprocess.run([sys.executable, "-m", "flows.cli", "automations"], env=environment, check=True, cwd=training_project)
        prefect(environment, "deployment", "run", "personalize/local", "--param", 'subject="biscuit"')
        with worker(environment, tmp_path / "worker.log", "one"):
            began = time.monotonic()
            checkpoints = training_project / ".scratch/checkpoints"
            await_true(lambda: list(checkpoints.glob("*/*")), 400, 0.2)
            print("first checkpoint", time.monotonic() - began)
            mlflow.kill(); prefect_server.kill()
            print("killed", time.monotonic() - began)
            time.sleep(float(os.environ.get("OUTAGE", "5")))
            prefect_server.start()
            print("prefect back", time.monotonic() - began)
            mlflow.start()
            print("mlflow back", time.monotonic() - began, list(checkpoints.glob("*/*")))
            def look() -> bool:
                run = post(api, "flow_runs/filter", {})[0]
                print(round(time.monotonic() - began), run["state_name"], run["run_count"], run["state"]["message"])
                return run["state_type"] in ("COMPLETED", "FAILED") 
            await_true(look, 400, 3)
            print(post(api, "v2/concurrency_limits/filter", {}))
            print(post(api, "task_runs/filter", {}))
            for s in post(api, "flow_run_states/filter", {}) if False else []: print(s)
