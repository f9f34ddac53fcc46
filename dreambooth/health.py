"""Look at the registry of a project for what is broken or left behind; nothing is changed."""

import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dreambooth import aliases
from dreambooth.errors import RegistryError
from dreambooth.mlflowstore import connect, database_file, explain, paged, tracking_uri
from dreambooth.redaction import redact
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


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    state: State
    what: str
    found: str
    remedy: str = ""

    @property
    def is_broken(self) -> bool:
        """Whether something does not work now."""
        return self.state == "broken"


def examine(root: Path, subjects: list[str]) -> Iterator[Finding]:
    """Look at the database, the versions with an alias, the log of each subject, and what was left behind."""
    where = redact(tracking_uri(root))
    if not is_there(root):
        yield Finding("good", "database", f"{where} is not there yet: nothing was registered")
        return
    if fault := _database_fault(root):
        yield Finding(
            "broken", "database", f"{where}: {fault}", "restore it from a backup, then register the exports again"
        )
        return
    try:
        with explained(root, "look at the registry", "start the server, or mend MLFLOW_TRACKING_URI"):
            client, experiment = connect(root)
            yield Finding("good", "database", f"{where} answers")
            known = sorted({*subjects, *_registered(client)})
            for name in known:
                yield from _subject(root, client, name)
            yield from _left_behind(client, experiment, known)
    except RegistryError as error:
        yield Finding("broken", "database", str(error), "then: dreambooth doctor")


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


def _subject(root: Path, client: "MlflowClient", name: str) -> Iterator[Finding]:
    remedy = f"its files come back when the same export is registered again: dreambooth register {name}"
    named = aliases_of(client, name)
    for alias, number in sorted(named.items()):
        what = f"{name} version {number} @{alias}"
        found = find_version(client, name, number, None)
        faults = check_files(root, client, found) if found else ["the version was deleted"]
        if faults and alias == CHAMPION:
            yield Finding(
                "broken", what, "; ".join(faults), f'{remedy}; or go back: dreambooth rollback {name} --force "WHY"'
            )
        else:
            yield Finding("broken" if faults else "good", what, "; ".join(faults) or "whole", remedy if faults else "")
    log = aliases.read_log(client, name)
    for alias in (CHALLENGER, CHAMPION):
        what, wanted, points_to = f"{name} @{alias}", aliases.last(log, alias), named.get(alias)
        if wanted == points_to:
            continue
        if points_to is None and find_version(client, name, wanted, None) is None:  # its alias went with it
            state: State = "broken" if alias == CHAMPION else "warning"  # without a challenger nothing waits
            yield Finding(state, what, f"version {wanted} was deleted", _after_deletion(root, log, name, alias))
        else:
            difference = f"{alias} is version {points_to or 'none'}, the log says {wanted or 'none'}"
            yield Finding("broken", what, f"{difference}: interrupted", f"dreambooth versions {name} finishes it")
    if foreign := aliases.foreign(client, name):
        told = f"no entries, and passed over: version {', '.join(map(str, foreign))}"
        remedy = f"somebody made them by hand: look at {aliases.log_name(name)} in MLflow, delete them there"
        yield Finding("warning", f"log of {name}", told, remedy)


def _after_deletion(root: Path, log: list[aliases.Entry], name: str, alias: str) -> str:
    """Return what moves an alias away from a version that was deleted."""
    if alias == CHALLENGER:
        return f"the next one is what is registered next: {step_to_register(root, name)}"
    remedy = f'promote another one: dreambooth promote {name} --version N --force "WHY"'
    *earlier, _ = aliases.history(log, alias)
    return f'{remedy}; or go back: dreambooth rollback {name} --force "WHY"' if earlier else remedy


def _left_behind(client: "MlflowClient", experiment: str, names: list[str]) -> Iterator[Finding]:
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
        yield Finding("warning", "uploads", f"{len(begun)} never became a version: {', '.join(begun[:5])}", remedy)
    runs = [
        run.info.run_id
        for run in paged(client.search_runs, [experiment], "attributes.status = 'RUNNING'")
        if now - run.info.start_time > DAY
    ]
    if runs:
        remedy = "if no training goes on there, end or delete them in MLflow"
        yield Finding("warning", "runs", f"{len(runs)} have been RUNNING for over a day: {', '.join(runs[:5])}", remedy)
