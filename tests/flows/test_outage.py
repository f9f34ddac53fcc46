"""The servers of MLflow and Prefect are killed in the middle of a training and come back: no work is lost."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from servers import mlflow_with_database, prefect_with_leases, running
from tiny_project import make_project, tiny_values
from toy_project import REPOSITORY, post, prefect, quiet, worker
from waiting import await_true

from dreambooth import mlflowstore, versions

pytestmark = [pytest.mark.slow, pytest.mark.nightly, pytest.mark.timeout(1800)]
STEPS = 600
CURVES = ("loss", "loss_instance", "loss_prior", "grad_norm", "learning_rate")


@pytest.fixture
def training_project(tmp_path: Path, tiny_model_folder: Path) -> Path:
    """A project with this repository's dvc.yaml and code, whose training takes longer than the servers to start."""
    from dvc.repo import Repo

    values = tiny_values()
    values["train"] |= {"max_train_steps": STEPS, "checkpointing_steps": 50}
    root = make_project(tmp_path / "project", tiny_model_folder, values)
    for name in ("dreambooth", "stages"):
        shutil.copytree(REPOSITORY / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "dvc.yaml", root)
    Repo.init(str(root), no_scm=True).close()
    return root


@pytest.mark.fault(28)
def test_both_servers_die_in_a_training_and_the_run_completes_with_every_metric(
    training_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow, server = mlflow_with_database(tmp_path / "mlflow"), prefect_with_leases(tmp_path / "prefect")
    api = f"{server.address}/api"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow.address)
    monkeypatch.delenv("DREAMBOOTH_TRACKING")
    environment = {
        **quiet(tmp_path / "prefect"),
        "PREFECT_API_URL": api,
        "DREAMBOOTH_HOME": str(training_project),
        "PYTHONPATH": str(REPOSITORY),
    }
    with running(mlflow, server):
        prefect(environment, "work-pool", "create", "dreambooth", "--type", "process")
        prefect(environment, "gcl", "create", "gpu", "--limit", "1")
        prefect(environment, "deploy", "--name", "local")
        apply_automations(environment, training_project)
        start(environment)
        with worker(environment, tmp_path / "worker.log", "one"):
            checkpoints = training_project / ".scratch/checkpoints"
            await_true(lambda: any(checkpoints.glob("*/*")), 400, 0.2)
            began = time.monotonic()
            mlflow.kill()
            server.kill()
            assert not (training_project / "models/biscuit").exists()
            time.sleep(float(os.environ.get("OUTAGE", 5)))
            mlflow.start()
            server.start()
            mlflow.await_it()
            server.await_it()
            sys.stdout.write(f"both servers were away for {time.monotonic() - began:.0f} s\n")
            (run,) = ended(api, 1)
            assert run["state_name"] == "Completed", run["state"]
            assert_all_metrics(training_project)
            found = versions.find(training_project, "biscuit")
            assert found is not None
            assert found.version == 1
            # The slots of the GPU and of the deployment are free, and there is nothing left to do.
            limits = post(api, "v2/concurrency_limits/filter", {})
            assert {one["active_slots"] for one in limits} == {0}, limits
            start(environment)
            assert {run["state_name"] for run in ended(api, 2)} == {"Completed"}
            assert "stages are up to date" in (tmp_path / "worker.log").read_text()


def assert_all_metrics(root: Path) -> None:
    client, experiment = mlflowstore.connect(root)
    (run,) = client.search_runs([experiment])
    assert run.info.status == "FINISHED"
    for name in CURVES:
        steps = sorted(point.step for point in client.get_metric_history(run.info.run_id, name))
        assert steps == list(range(STEPS)), f"{name}: {len(steps)} of {STEPS}"
    assert not list((root / ".scratch/unsent").iterdir())


def start(environment: dict[str, str]) -> None:
    prefect(environment, "deployment", "run", "personalize/local", "--param", 'subject="biscuit"')


def ended(api: str, count: int) -> list[dict[str, Any]]:
    """Wait until so many runs have ended; return them."""
    final = {"flow_runs": {"state": {"type": {"any_": ["COMPLETED", "FAILED", "CANCELLED"]}}}}
    await_true(lambda: len(post(api, "flow_runs/filter", final)) == count, 900, 2)
    runs: list[dict[str, Any]] = post(api, "flow_runs/filter", final)
    return runs


def apply_automations(environment: dict[str, str], root: Path) -> None:
    command = [sys.executable, "-m", "flows.cli", "automations"]
    subprocess.run(command, cwd=root, env=environment, check=True, capture_output=True)
