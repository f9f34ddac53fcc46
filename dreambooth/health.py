"""Look at the registry of a project for what is broken or left behind; nothing is changed."""

import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dreambooth import aliases
from dreambooth.errors import RegistryError
from dreambooth.redaction import redact
from dreambooth.tracking import connect, database_file, explain, paged, tracking_uri
from dreambooth.versions import (
    CHALLENGER,
    CHAMPION,
    MODEL_TAG,
    aliases_of,
    all_versions,
    check_files,
    explained,
    find_version,
    is_there,
    step_to_register,
)

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

DAY = 86_400_000  # milliseconds
State = Literal["good", "warning", "broken"]
Fact = tuple[State, str, str, str]


def examine(root: Path, subjects: list[str]) -> Iterator[Fact]:
    """Yield state, what was looked at, what was found, and the remedy."""
    where = redact(tracking_uri(root))
    if not is_there(root):
        yield "good", "database", f"{where} is not there yet: nothing was registered", ""
        return
    if fault := _database_fault(root):
        yield "broken", "database", f"{where}: {fault}", "restore it from a backup, then register the exports again"
        return
    try:
        with explained(root, "look at the registry", "start the server, or mend MLFLOW_TRACKING_URI"):
            client, experiment = connect(root)
            yield "good", "database", f"{where} answers", ""
            known = sorted({*subjects, *_registered(client)})
            for name in known:
                yield from _subject(root, client, name)
            yield from _left_behind(client, experiment, known)
    except RegistryError as error:
        yield "broken", "database", str(error), "then: dreambooth doctor"


def _database_fault(root: Path) -> str | None:
    file = database_file(tracking_uri(root))
    if file is None:
        return None
    try:
        with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as connection:
            (answer,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    except sqlite3.Error as error:
        return explain(error)
    return None if answer == "ok" else str(answer)


def _registered(client: "MlflowClient") -> list[str]:
    """Return the names of all registered models that are subjects of ours: those that have a log."""
    logs = paged(client.search_registered_models, "name LIKE '%.log'", max_results=1000)
    return [model.name.removesuffix(".log") for model in logs]


def _subject(root: Path, client: "MlflowClient", name: str) -> Iterator[Fact]:
    remedy = f"its files come back when the same export is registered again: dreambooth register {name}"
    for alias, number in sorted(aliases_of(client, name).items()):
        what = f"{name} version {number} @{alias}"
        found = find_version(client, name, number, None)
        faults = check_files(root, client, found) if found else ["the version was deleted"]
        if faults and alias == CHAMPION:
            yield "broken", what, "; ".join(faults), f'{remedy}; or go back: dreambooth rollback {name} --force "WHY"'
        else:
            yield "broken" if faults else "good", what, "; ".join(faults) or "whole", remedy if faults else ""
    for alias in (CHALLENGER, CHAMPION):
        what = f"{name} @{alias}"
        if (gone := aliases.deleted(client, name, alias)) is not None:
            state: State = "broken" if alias == CHAMPION else "warning"  # without a challenger nothing waits
            yield state, what, f"version {gone} was deleted", _after_deletion(root, client, name, alias)
        elif difference := aliases.disagreement(client, name, alias):
            yield "broken", what, f"{difference}: interrupted", f"dreambooth versions {name} finishes it"
    if foreign := aliases.foreign(client, name):
        log = aliases.log_name(name)
        told = f"no entries, and passed over: version {', '.join(map(str, foreign))}"
        yield (
            "warning",
            f"log of {name}",
            told,
            f"somebody made them by hand: look at {log} in MLflow, delete them there",
        )


def _after_deletion(root: Path, client: "MlflowClient", name: str, alias: str) -> str:
    """Return what moves an alias away from a version that was deleted."""
    if alias == CHALLENGER:
        return f"the next one is what is registered next: {step_to_register(root, name)}"
    remedy = f'promote another one: dreambooth promote {name} --version N --force "WHY"'
    *earlier, _ = aliases.history(aliases.read_log(client, name), alias)
    return f'{remedy}; or go back: dreambooth rollback {name} --force "WHY"' if earlier else remedy


def _left_behind(client: "MlflowClient", experiment: str, names: list[str]) -> Iterator[Fact]:
    """Find uploads that never became a version, and runs that say they run but have been silent for a day."""
    now = time.time() * 1000
    used = {version.tags.get(MODEL_TAG) for name in names for version in all_versions(client, name)}
    begun = [
        model.model_id
        for model in paged(client.search_logged_models, [experiment])
        if model.model_id not in used and now - model.creation_timestamp > DAY
    ]
    if begun:
        remedy = "register the export again, which takes the upload up; or delete the model in MLflow"
        yield "warning", "uploads", f"{len(begun)} never became a version: {', '.join(begun[:5])}", remedy
    runs = [
        run.info.run_id
        for run in paged(client.search_runs, [experiment], "attributes.status = 'RUNNING'")
        if now - run.info.start_time > DAY
    ]
    if runs:
        remedy = "if no training goes on there, end or delete them in MLflow"
        yield "warning", "runs", f"{len(runs)} have been RUNNING for over a day: {', '.join(runs[:5])}", remedy
