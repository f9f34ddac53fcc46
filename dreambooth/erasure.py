"""Erase what MLflow holds of a subject: versions, log, uploads, runs, their files, and the room they leave behind."""

import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from dreambooth.aliases import log_name
from dreambooth.mlflowstore import connect, database_file, explain, paged, tracking_uri
from dreambooth.redaction import redact
from dreambooth.versions import HASH_TAG, all_versions, explained, is_there

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient


@dataclass(frozen=True)
class Holdings:
    """What MLflow holds of one subject."""

    versions: tuple[int, ...] = ()
    models: tuple[str, ...] = ()
    """Ids of logged models: uploads, whether a version came of them or not."""
    runs: tuple[str, ...] = ()
    log_entries: int = 0
    exports: tuple[str, ...] = ()
    """Content hashes of the exports that the versions were made from."""


def holdings(root: Path, subject_id: str) -> Holdings:
    """List what MLflow holds of a subject, deleted things too where the database is local."""
    if not is_there(root):
        return Holdings()
    with explained(root, f"list what it holds of {subject_id}", "try again when it answers"):
        client, _ = connect(root)
        versions = all_versions(client, subject_id)
        return Holdings(
            tuple(int(version.version) for version in versions),
            tuple(sorted(set(_models(client, root, subject_id)))),
            tuple(sorted(set(_runs(client, subject_id)))),
            len(all_versions(client, log_name(subject_id))),
            tuple(version.tags[HASH_TAG] for version in versions if HASH_TAG in version.tags),
        )


def erase(root: Path, subject_id: str) -> list[str]:
    """Erase all of it; return what could not be reached. Called again, it goes on where it was interrupted."""
    if not is_there(root):
        return []
    remedy = f"what is erased stays erased, go on: dreambooth forget {subject_id} --yes"
    with explained(root, f"erase {subject_id}", remedy):
        client, _ = connect(root)
        found = holdings(root, subject_id)
        for name in (subject_id, log_name(subject_id)):
            _delete_registered(client, name)
        left = [fault for model_id in found.models for fault in _delete_model(client, root, model_id)]
        left += [fault for run_id in found.runs for fault in _delete_run(client, root, run_id)]
    file = database_file(tracking_uri(root))
    if file is not None:
        _vacuum(file)
    elif found.models or found.runs:
        left.append(f"rows of deleted runs in {redact(tracking_uri(root))}: there, run: mlflow gc, then VACUUM")
    return left


def _models(client: "MlflowClient", root: Path, name: str) -> Iterator[str]:
    experiments = [one.experiment_id for one in paged(client.search_experiments)]
    if experiments:
        found = paged(client.search_logged_models, experiments, filter_string=f"name = '{name}'")
        yield from (model.model_id for model in found)
    if (file := database_file(tracking_uri(root))) is not None:  # those that somebody deleted, but not for good
        with closing(sqlite3.connect(file, timeout=60)) as connection:
            deleted = connection.execute("SELECT model_id FROM logged_models WHERE name = ?", [name]).fetchall()
        yield from (row[0] for row in deleted)


def _runs(client: "MlflowClient", name: str) -> Iterator[str]:
    from mlflow.entities import ViewType

    experiments = [one.experiment_id for one in paged(client.search_experiments, view_type=ViewType.ALL)]
    if not experiments:
        return
    for query in (f"tags.subject = '{name}'", f"params.subject = '{name}'", f"attributes.run_name = '{name}'"):
        found = paged(client.search_runs, experiments, query, run_view_type=ViewType.ALL)
        yield from (run.info.run_id for run in found)


def _delete_registered(client: "MlflowClient", name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.delete_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise


def _delete_model(client: "MlflowClient", root: Path, model_id: str) -> Iterator[str]:
    store = _local_store(root)
    model = store.get_logged_model(model_id, allow_deleted=True) if store else client.get_logged_model(model_id)
    yield from _delete_files(model.artifact_location)
    if store is None:
        client.delete_logged_model(model_id)
        return
    store._hard_delete_logged_model(model_id)


def _delete_run(client: "MlflowClient", root: Path, run_id: str) -> Iterator[str]:
    run = client.get_run(run_id)
    yield from _delete_files(run.info.artifact_uri)
    if run.info.lifecycle_stage == "active":
        client.delete_run(run_id)
    if store := _local_store(root):
        store._hard_delete_run(run_id)


def _local_store(root: Path):  # type: ignore[no-untyped-def]  # of MLflow, which has no types
    """Return the store behind a local database: a row that is deleted for good is no part of the client's interface.

    It is what `mlflow gc` calls, which would also remove what other people have deleted but not for good.
    """
    from mlflow.tracking._tracking_service.utils import _get_store

    uri = tracking_uri(root)
    return _get_store(uri) if database_file(uri) is not None else None


def _delete_files(location: str) -> Iterator[str]:
    """Delete the files of a run or a model; yield what is in the way."""
    from mlflow.exceptions import MlflowException
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
    from mlflow.utils.file_utils import local_file_uri_to_path

    if urlsplit(location).scheme in ("", "file"):
        folder = Path(local_file_uri_to_path(location))
        shutil.rmtree(folder, ignore_errors=True)
        parent = folder.parent  # <run>/artifacts, models/<model>/artifacts
        if parent.is_dir() and not any(parent.iterdir()):
            parent.rmdir()
        if folder.exists():
            yield f"{folder}: cannot be removed"
        return
    try:
        get_artifact_repository(location).delete_artifacts()
    except (MlflowException, OSError, NotImplementedError) as error:
        yield f"{redact(location)}: {explain(error)}"


def _vacuum(file: Path) -> None:
    """Give the room of deleted rows back: until then their bytes stand in the file."""
    with closing(sqlite3.connect(file, timeout=60, isolation_level=None)) as connection:
        connection.execute("VACUUM")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
