"""Every deployment of prefect.yaml with a real server, a process pool and a worker."""

import json
import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings
from toy_project import REPOSITORY, make_toy_project, post, prefect, quiet, worker
from waiting import await_true

from dreambooth import versions
from dreambooth.images import read_provenance
from flows import prefectstore

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
DEPLOYMENTS = {"local", "clone", "nightly", "on-photos", "approve", "batch"}


@pytest.fixture(scope="module")
def site(
    prefect_home: Path, prefect_server: str, tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path
) -> Iterator[tuple[Path, dict[str, str], str]]:
    """A project whose exports can be registered, all deployments, and a worker; yield project, environment, API."""
    folder = tmp_path_factory.mktemp("site")
    root = make_toy_project(folder / "project", {"biscuit": "dog"})
    shutil.copytree(tiny_model_folder, root / "pipeline")
    environment = {
        **quiet(prefect_home),
        "PREFECT_API_URL": prefect_server,
        "DREAMBOOTH_HOME": str(root),
        "DREAMBOOTH_CACHE": str(folder / "cache"),
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")]),
    }
    prefect(environment, "work-pool", "create", "dreambooth", "--type", "process", "--overwrite")
    prefect(environment, "work-pool", "set-concurrency-limit", "dreambooth", "4")
    prefect(environment, "deploy", "--all")
    with worker(environment, folder / "worker.log", "one"):
        yield root, environment, prefect_server


def start(environment: dict[str, str], deployment: str, **parameters: Any) -> str:
    """Start a flow run as a person would; return its id."""
    given = [word for name, value in parameters.items() for word in ("--param", f"{name}={json.dumps(value)}")]
    said = prefect(environment, "deployment", "run", deployment, *given)
    return next(line.split("UUID:")[1].strip() for line in said.splitlines() if "UUID:" in line)


def state(api: str, run: str) -> tuple[str, str, str]:
    found = post(api, "flow_runs/filter", {"flow_runs": {"id": {"any_": [run]}}})[0]
    return str(found["state_name"]), str(found["state"]["message"]), str(found["state"]["type"])


def ended(api: str, run: str) -> str:
    """Wait until a run has ended or waits for a person; return how."""
    await_true(lambda: state(api, run)[2] not in ("SCHEDULED", "PENDING", "RUNNING", "CANCELLING"), 300, 1)
    return state(api, run)[0]


def runs_of(api: str, deployment: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = post(api, "flow_runs/filter", {"deployments": {"name": {"any_": [deployment]}}})
    return found


def test_a_deployment_runs_and_registers_and_the_other_ways_find_nothing_to_do(
    site: tuple[Path, dict[str, str], str],
) -> None:
    root, environment, api = site
    assert {one["name"] for one in post(api, "deployments/filter", {})} >= DEPLOYMENTS
    run = start(environment, "personalize/local", subject="biscuit")
    assert ended(api, run) == "Completed", state(api, run)
    found = versions.find(root, "biscuit")
    assert found is not None
    assert found.version == 1
    # Nothing is stale any more, for a retraining either.
    assert ended(api, run := start(environment, "retrain/nightly")) == "Skipped", state(api, run)
    assert state(api, run)[1] == "skipped: unchanged"


def test_the_schedule_has_runs_in_the_future(site: tuple[Path, dict[str, str], str]) -> None:
    _, _, api = site
    await_true(lambda: any(run["state_name"] == "Scheduled" for run in runs_of(api, "nightly")))
    assert all(run["expected_start_time"] for run in runs_of(api, "nightly"))


def test_an_approval_waits_is_given_and_moves_the_alias(site: tuple[Path, dict[str, str], str]) -> None:
    root, environment, api = site
    run = start(environment, "promote/approve", subject="biscuit")
    assert ended(api, run) == "Suspended", state(api, run)
    assert versions.find(root, "biscuit", alias="champion") is None
    shown = {one["key"]: one["data"] for one in post(api, "artifacts/filter", {})}
    assert "promote: identity" in shown["approve-biscuit"]
    post(api, f"flow_runs/{run}/resume", {"run_input": {"approve": True}})
    assert ended(api, run) == "Completed", state(api, run)
    champion = versions.find(root, "biscuit", alias="champion")
    assert champion is not None
    assert champion.version == 1
    # The same question again needs no person: the challenger is the champion.
    assert ended(api, start(environment, "promote/approve", subject="biscuit")) == "Completed"


def test_an_event_brings_the_subject_up_to_date_whose_photos_changed(site: tuple[Path, dict[str, str], str]) -> None:
    root, environment, api = site
    (root / "ran.log").unlink(missing_ok=True)
    photo = next((root / "data/subjects/biscuit").iterdir())
    photo.write_bytes(photo.read_bytes() + b"\0")
    emit = ["event", "emit", "subject.images.updated", "--resource-id", "subject.biscuit"]
    prefect(environment, *emit)
    await_true(lambda: runs_of(api, "on-photos"), 120, 1)
    run = runs_of(api, "on-photos")[0]
    assert run["parameters"]["subject"] == "subject.biscuit"
    assert ended(api, run["id"]) == "Completed", state(api, run["id"])
    assert "validate@biscuit" in (root / "ran.log").read_text()


def test_a_batch_draws_with_the_champion(site: tuple[Path, dict[str, str], str]) -> None:
    root, environment, api = site
    run = start(environment, "generate/batch", subject="biscuit", prompts=["a photo of {} in space"], count=2)
    assert ended(api, run) == "Completed", state(api, run)
    assert len(list((root / "build/biscuit/generated").glob("a-photo*.png"))) == 2
    options = {"steps": 1, "guidance": 2.5, "negative": "blur", "size": 40, "batch_size": 2}
    run = start(environment, "generate/batch", subject="biscuit", prompts=["{} at home"], count=2, **options)
    assert ended(api, run) == "Completed", state(api, run)
    for number in range(2):
        (picture,) = (root / "build/biscuit/generated").glob(f"sks-*at-home-v1-steps1-*-{number}.png")
        about = read_provenance(picture.read_bytes())
        found = {name: about[name] for name in ("num_inference_steps", "guidance_scale", "negative_prompt")}
        assert found == {"num_inference_steps": 1, "guidance_scale": 2.5, "negative_prompt": "blur"}
        assert (about["resolution"], about["batch_size"]) == (40, 2)


@pytest.mark.fault(35)
def test_of_many_missed_runs_of_the_schedule_one_is_made_up_for(site: tuple[Path, dict[str, str], str]) -> None:
    _, _, api = site
    of_the_pool = {"work_pools": {"name": {"any_": ["dreambooth"]}}}  # other tests have deployments of their own
    deployment = next(one["id"] for one in post(api, "deployments/filter", of_the_pool) if one["name"] == "nightly")

    def start_missed(hours: float) -> str:
        due = (datetime.now(UTC) - timedelta(hours=hours)).isoformat()
        wanted = {"type": "SCHEDULED", "state_details": {"scheduled_time": due}}
        body = {"state": wanted, "parameters": {"subject": "biscuit"}}
        return str(post(api, f"deployments/{deployment}/create_flow_run", body)["id"])

    how = [ended(api, run) for run in [start_missed(hours) for hours in range(6, 0, -1)]]
    assert len([one for one in how if one not in ("CaughtUp", "Cancelled")]) == 1, how
    assert ended(api, start_missed(hours=0.5)) == "CaughtUp"  # the server did not cancel it: nothing ran beside it


def test_a_run_for_an_unknown_subject_says_which_are_known(site: tuple[Path, dict[str, str], str]) -> None:
    _, environment, api = site
    run = start(environment, "personalize/local", subject="tom")
    assert ended(api, run) == "Failed"
    assert "known: biscuit" in state(api, run)[1]


def test_forgetting_erases_what_events_approvals_and_retrainings_say_of_a_subject(
    site: tuple[Path, dict[str, str], str], prefect_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    with (
        closing(sqlite3.connect(prefect_home / "prefect.db", timeout=60)) as source,
        closing(sqlite3.connect(tmp_path / "prefect.db")) as copy,  # the server goes on with its own
    ):
        source.backup(copy)
        places = {"artifact": ("key", "data"), "flow_run": ("name", "parameters"), "events": ("resource", "payload")}

        def told() -> list[str]:
            where = [(table, column) for table, columns in places.items() for column in columns]
            query = "SELECT count(*) FROM {} WHERE instr({}, 'biscuit')"
            return [table for table, column in where if copy.execute(query.format(table, column)).fetchone()[0]]

        assert set(told()) == set(places)
        assert prefectstore.erase("biscuit") == []
        assert told() == []


@pytest.mark.fault(44)
@pytest.mark.threat(23)
def test_forgetting_erases_on_a_server_also_runs_of_all_subjects_and_their_artifacts(
    site: tuple[Path, dict[str, str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last test of this site: nothing is left of its subject. `personalize/local` without a subject runs all."""
    _, environment, api = site
    run = start(environment, "personalize/local")
    assert ended(api, run) == "Completed", state(api, run)
    monkeypatch.setenv("PREFECT_API_URL", api)
    with temporary_settings({PREFECT_API_URL: api}):
        assert prefectstore.count("biscuit") > 0
        assert [line.partition(" that")[0] for line in prefectstore.erase("biscuit")] == ["events and logs"]
        assert prefectstore.count("biscuit") == 0
    assert post(api, "flow_runs/filter", {"flow_runs": {"id": {"any_": [run]}}}) == []
    artifacts, offset = [], 0
    while page := post(api, "artifacts/filter", {"offset": offset}):
        artifacts += page
        offset += len(page)
    assert [one["key"] for one in artifacts if "biscuit" in json.dumps(one)] == []
