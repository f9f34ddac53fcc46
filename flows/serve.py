"""Serve every deployment of prefect.yaml from one process, without a pool and a worker: python -m flows.serve.

The schedules, triggers and limits are those of prefect.yaml; nothing is said twice.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

# As in prefect.yaml, before prefect reads its settings; a command by hand asks a sick server less often.
os.environ.setdefault("PREFECT_CLIENT_MAX_RETRIES", "8")
os.environ.setdefault("PREFECT_CLIENT_RETRY_EXTRA_CODES", "500,504")

from prefect import serve
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import ConcurrencyLimitConfig
from prefect.deployments.runner import RunnerDeployment
from prefect.events import DeploymentEventTrigger
from prefect.exceptions import ObjectNotFound
from prefect.flows import Flow
from prefect.schedules import Cron
from prefect.types.entrypoint import EntrypointType

from dreambooth.errors import PipelineError
from flows.leaving import leaving_a_service_when_told
from flows.program import exit_code, has_server, reached
from flows.project import find_root

FLOW_RUNS_AT_ONCE = 4  # flow runs: a retraining waits for those of its subjects


def deployments(root: Path) -> list[RunnerDeployment]:
    """Return what prefect.yaml of a project deploys, to be served by this process.

    Args:
        root: the project.

    Raises:
        PipelineError: it has no prefect.yaml.
    """
    file = root / "prefect.yaml"
    if not file.is_file():
        raise PipelineError(f"{file} is not there; copy it from the repository of dreambooth")
    content = _plain(file.read_text(encoding="utf-8"))
    return [_deployment(entry) for entry in content["deployments"]]


def _plain(text: str) -> Any:
    """Read prefect.yaml as Prefect does: our own reader refuses the anchors that it is written with."""
    from ruamel.yaml import YAML

    return YAML(typ="safe", pure=True).load(text)


def _deployment(entry: dict[str, Any]) -> RunnerDeployment:
    module, _, name = entry["entrypoint"].rpartition(".")
    flow: Flow[..., Any] = getattr(import_module(module), name)
    schedules = [Cron(one["cron"], timezone=one["timezone"], slug=one["slug"]) for one in entry.get("schedules", ())]
    triggers: list[Any] = [DeploymentEventTrigger.model_validate(one) for one in entry.get("triggers", ())]
    limit = entry.get("concurrency_limit")
    deployment = flow.to_deployment(
        entry["name"],
        description=entry["description"],
        parameters=entry.get("parameters"),
        schedules=schedules or None,
        triggers=triggers or None,
        concurrency_limit=ConcurrencyLimitConfig.model_validate(limit) if limit else None,
        entrypoint_type=EntrypointType.MODULE_PATH,
    )
    assert isinstance(deployment, RunnerDeployment)
    return deployment


def main() -> int:
    """Serve until it is stopped."""
    argparse.ArgumentParser(prog="python -m flows.serve", description=__doc__).parse_args()
    return exit_code(_serve)


def _serve() -> list[str]:
    root = find_root()
    os.environ["DREAMBOOTH_HOME"] = str(root)
    with reached(), leaving_a_service_when_told(has_server()):
        served = deployments(root)
        _require_no_pool([f"{one.flow_name}/{one.name}" for one in served])
        serve(*served, limit=FLOW_RUNS_AT_ONCE, pause_on_shutdown=False)  # the nights without it are made up for
    return []


def _require_no_pool(names: Sequence[str]) -> None:
    """Refuse deployments that workers start: to be served takes their pool, pull step and environment from them.

    Raises:
        PipelineError: the server has one of them with a work pool.
    """
    pools = dict[str, str]()
    with get_client(sync_client=True) as client:
        for name in names:
            with suppress(ObjectNotFound):
                pools[name] = client.read_deployment_by_name(name).work_pool_name or ""
    if taken := [name for name, pool in pools.items() if pool]:
        raise PipelineError(
            f"{', '.join(taken)}: workers of the pool {pools[taken[0]]} start them, and would no longer; "
            f"leave it to them, or, for each: prefect deployment delete {taken[0]}"
        )


if __name__ == "__main__":
    sys.exit(main())
