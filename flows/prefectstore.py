"""Find and erase what Prefect keeps of a subject: flow runs, task runs, states, logs, artifacts, events."""

import json
import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from uuid import UUID

from dreambooth.params import names_id

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import Artifact, FlowRun

# The tables whose rows belong to a run; a deployment is made by a person, and is named instead of deleted.
TABLES = (
    "log", "artifact", "artifact_collection", "flow_run_input", "task_run_state_cache", "task_run_state", "task_run",
    "flow_run_state", "flow_run", "event_resources", "events",
)  # fmt: skip
TEXT = ("CHAR", "TEXT", "JSON", "UUID")
FAILED = ("FAILED", "CRASHED")


def count(subject_id: str) -> int:
    """Count the flow runs that name a subject, in the local database or on the server."""
    if server():
        with _client() as client:
            return len(_runs_of_server(client, subject_id))
    with _database() as connection:
        return len(_runs(connection, subject_id)) if connection else 0


def erase(subject_id: str) -> list[str]:
    """Erase the flow runs that name a subject, with all that hangs on them; return what could not be reached.

    A run of several subjects goes as a whole: its log names all of them. So does a run that failed with a reason that
    names the subject: one for an unknown subject lists those that are known.
    """
    if server():
        return _erase_on_server(subject_id)
    if _database_file() is None:
        return [
            "flow runs that name the subject in the database of Prefect, which is no SQLite: start its server, then "
            "PREFECT_API_URL=http://HOST:4200/api dreambooth forget"
        ]
    with _database() as connection:
        if connection is None:
            return []
        runs = _runs(connection, subject_id)
        keys = _keys(subject_id)
        marks = [*runs, *_task_runs(connection, runs), *(f'"{key}"' for key in keys)]  # events quote the artifact's key
        for table in TABLES:
            for column in _text_columns(connection, table):
                for mark in marks:
                    connection.execute(f"DELETE FROM {table} WHERE instr({column}, ?)", [mark])
        for table in ("artifact", "artifact_collection"):
            for key in keys:
                connection.execute(f"DELETE FROM {table} WHERE key = ?", [key])
        _erase_events(connection, subject_id)
        left = _deployments(connection, subject_id)
        connection.commit()
        connection.isolation_level = None
        connection.execute("VACUUM")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return left


def server() -> str | None:
    """Return the server that flows use: of the environment (empty: none), else of the profile of Prefect."""
    if "PREFECT_API_URL" in os.environ:
        return os.environ["PREFECT_API_URL"]
    from prefect.settings import PREFECT_API_URL

    url: str | None = PREFECT_API_URL.value()
    return url


@contextmanager
def _client() -> "Iterator[SyncPrefectClient]":
    """Ask the server.

    Raises:
        PipelineError: it does not answer.
    """
    from prefect.client.orchestration import get_client

    from flows.program import reached

    elsewhere = "; or erase where its database is, if that is SQLite: PREFECT_API_URL= dreambooth forget"
    with reached(elsewhere), get_client(sync_client=True) as client:
        yield client


@contextmanager
def _database() -> Iterator[sqlite3.Connection | None]:
    """Open the local database of Prefect; None where there is none."""
    file = _database_file()
    if file is None or not file.is_file():
        yield None
        return
    with closing(sqlite3.connect(file, timeout=60)) as connection:
        yield connection


def _database_file() -> Path | None:
    """Return the file of the database that the environment, or the profile of Prefect, names; None: it is no SQLite."""
    from prefect.settings import Settings

    # Of today: Prefect keeps what it found when it was imported.
    named = Settings().server.database.connection_url
    url = named.get_secret_value() if named else ""
    return Path(urlsplit(url).path.removeprefix("/")) if url.startswith("sqlite") else None


def _runs(connection: sqlite3.Connection, subject_id: str) -> list[str]:
    """Return the ids of the flow runs whose parameters, task runs, artifacts or reasons to fail name a subject."""
    if "flow_run" not in _tables(connection):
        return []
    found = {row[0] for row in connection.execute("SELECT id, parameters FROM flow_run") if _says(row[1], subject_id)}
    failed = f"SELECT flow_run_id, message FROM flow_run_state WHERE type IN {FAILED}"
    found |= {run for run, message in connection.execute(failed) if names_id(message or "", subject_id)}
    names = f"SELECT flow_run_id FROM task_run WHERE name LIKE '%@{subject_id}' OR name LIKE '% {subject_id}'"
    keys = f"SELECT flow_run_id FROM artifact WHERE key IN ({', '.join(map(repr, _keys(subject_id)))})"
    # A table of a retraining is JSON inside JSON, so its quotes have backslashes.
    quoted = f'\\"{subject_id}\\"'
    rows = f"SELECT flow_run_id FROM artifact WHERE key = 'retrain' AND instr(data, '{quoted}')"
    for query in (names, keys, rows):
        found |= {row[0] for row in connection.execute(query) if row[0]}
    return sorted(found)


def _keys(subject_id: str) -> list[str]:
    """Return the keys of the artifacts of a subject."""
    return [f"{kind}-{subject_id}" for kind in ("subject", "prompts", "approve", "pictures")]


def _erase_events(connection: sqlite3.Connection, subject_id: str) -> None:
    """Erase the events that a subject itself was the resource of: its photos changed."""
    for table in ("event_resources", "events"):
        if table in _tables(connection):
            connection.execute(f"DELETE FROM {table} WHERE resource_id = ?", [f"subject.{subject_id}"])
    if "events" in _tables(connection):  # that they started something
        connection.execute("DELETE FROM events WHERE instr(payload, ?)", [f'"subject.{subject_id}"'])


def _says(parameters: str, subject_id: str) -> bool:
    """Tell whether the parameters of a run name a subject; an id has no quotes."""
    told = json.dumps(json.loads(parameters or "{}"))
    return f'"{subject_id}"' in told or f'"subject.{subject_id}"' in told


def _task_runs(connection: sqlite3.Connection, runs: list[str]) -> list[str]:
    return [
        row[0] for run in runs for row in connection.execute("SELECT id FROM task_run WHERE flow_run_id = ?", [run])
    ]


def _deployments(connection: sqlite3.Connection, subject_id: str) -> list[str]:
    return [
        f"Prefect deployment {name!r} has the subject in its parameters; change or delete it"
        for name, parameters in connection.execute("SELECT name, parameters FROM deployment")
        if _says(parameters, subject_id)
    ]


def _tables(connection: sqlite3.Connection) -> set[str]:
    return {row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}


def _text_columns(connection: sqlite3.Connection, table: str) -> list[str]:
    columns = connection.execute(f"PRAGMA table_info({table})").fetchall()
    return [f'"{column[1]}"' for column in columns if column[2].upper().startswith(TEXT)]


def _runs_of_server(client: "SyncPrefectClient", subject_id: str) -> set[UUID]:
    """Return the ids of the flow runs on a server whose parameters, tasks, artifacts or reasons name a subject."""
    from prefect.client.schemas.filters import TaskRunFilter, TaskRunFilterName

    found = {run.id for run in _pages(client.read_flow_runs) if _names(run, subject_id)}
    alike = TaskRunFilter(name=TaskRunFilterName(like_=subject_id))
    tasks = _pages(partial(client.read_task_runs, task_run_filter=alike))
    of_tasks = {one.flow_run_id for one in tasks if one.name.endswith((f"@{subject_id}", f" {subject_id}"))}
    of_artifacts = {one.flow_run_id for one in _artifacts_of_server(client, subject_id)}
    return found | {run for run in of_tasks | of_artifacts if run is not None}


def _artifacts_of_server(client: "SyncPrefectClient", subject_id: str) -> list["Artifact"]:
    """Return the artifacts of a subject, and the tables of retrainings that have a row for it."""
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey

    keys = _keys(subject_id)
    chosen = ArtifactFilter(key=ArtifactFilterKey(any_=[*keys, "retrain"]))
    found = _pages(partial(client.read_artifacts, artifact_filter=chosen))
    return [one for one in found if one.key in keys or f'"{subject_id}"' in str(one.data)]


def _pages(read: Callable[..., Sequence[Any]]) -> Iterator[Any]:
    """Ask a server for one page after the other."""
    offset = 0
    while page := read(offset=offset, limit=200):
        yield from page
        offset += len(page)


def _names(run: "FlowRun", subject_id: str) -> bool:
    failed = run.state is not None and run.state.type.value in FAILED
    reason = run.state.message if run.state and failed else None
    return _says(json.dumps(run.parameters, default=str), subject_id) or names_id(reason or "", subject_id)


def _erase_on_server(subject_id: str) -> list[str]:
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

    with _client() as client:
        runs = sorted(_runs_of_server(client, subject_id))
        artifacts = {one.id for one in _artifacts_of_server(client, subject_id)}
        for part in (runs[at : at + 200] for at in range(0, len(runs), 200)):
            of_runs = FlowRunFilter(id=FlowRunFilterId(any_=part))
            artifacts |= {one.id for one in _pages(partial(client.read_artifacts, flow_run_filter=of_runs))}
        for artifact in artifacts:
            client.delete_artifact(artifact)
        for run in runs:
            client.delete_flow_run(run)
    url = urlsplit(server() or "")
    return [
        f"events and logs that Prefect at {url.hostname} keeps of deleted runs: they go with its retention, "
        "or, if its database is SQLite, where that is: PREFECT_API_URL= dreambooth forget"
    ]
