"""Move the aliases of a subject's versions by an append-only log, from which every alias can be told again.

MLflow keeps no history of an alias and lets anybody overwrite it. So the log is the truth and the alias follows it: an
entry of <subject>.log is a model version, whose number MLflow gives out once only, whoever asks at the same time.
An entry says what the alias was when its writer looked; it counts only if that still held when it was written.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from dreambooth.errors import RegistryError
from dreambooth.params import check_id
from dreambooth.versions import CHALLENGER, CHAMPION, aliases_of, all_versions, client_of, explained, find_version

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

Action = Literal["register", "promote", "rollback", "refuse", "found"]
PREFIX = "dreambooth."
MAX_TEXT = 4000  # characters of a tag; MLflow takes 5000
ROUNDS = 20  # of setting an alias that others move at the same time


@dataclass(frozen=True)
class Entry:
    """A line of the log."""

    number: int
    action: Action
    """register, promote and rollback move an alias; refuse moves nothing; found takes over a move by hand."""
    alias: str
    before: int | None
    """What the alias pointed to when the writer looked."""
    after: int
    """What it points to from now on; of a refusal, what was refused."""
    verdict: str
    reason: str
    time: float
    """Seconds since 1970, by the clock of the registry."""
    gate: str = ""
    """What the gate said where it was overruled."""


def log_name(name: str) -> str:
    """Return the registered model that holds the log: no subject can be called so."""
    return f"{name}.log"


def read_log(client: "MlflowClient", name: str) -> list[Entry]:
    """Return the log of a subject, the oldest entry first; what is no entry counts for nothing, see `foreign`."""
    found = [_entry(version) for version in reversed(all_versions(client, log_name(name)))]
    return [entry for entry in found if entry is not None]


def foreign(client: "MlflowClient", name: str) -> list[int]:
    """Return the versions in the log of a subject that are no entries: somebody made them, or changed their tags."""
    return sorted(int(version.version) for version in all_versions(client, log_name(name)) if _entry(version) is None)


def counted(entries: Sequence[Entry], alias: str) -> list[Entry]:
    """Return the entries that moved an alias: of two that were written for the same state only the first counts."""
    current: int | None = None
    moves = []
    for entry in entries:
        if entry.alias == alias and entry.action != "refuse" and entry.before == current:
            moves.append(entry)
            current = entry.after
    return moves


def last(entries: Sequence[Entry], alias: str) -> int | None:
    """Return the version that the log says an alias points to; None before its first move."""
    moves = counted(entries, alias)
    return moves[-1].after if moves else None


def history(entries: Sequence[Entry], alias: str) -> list[int]:
    """Return the versions an alias has pointed to, without those that were rolled back; the last one is current."""
    stack: list[int] = []
    for entry in counted(entries, alias):
        if entry.action == "rollback" and entry.after in stack:
            while stack[-1] != entry.after:
                stack.pop()
        else:
            stack.append(entry.after)
    return stack


def append(
    client: "MlflowClient", name: str, action: Action, alias: str, before: int | None, after: int, verdict: str = "",
    reason: str = "", gate: str = "",
) -> int:  # fmt: skip
    """Write an entry; return its number."""
    from mlflow.exceptions import MlflowException

    log = log_name(name)
    try:
        client.create_registered_model(log, description=f"What moved the aliases of {name}; written by dreambooth.")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    told = {
        "action": action, "alias": alias, "from": before or "", "to": after, "verdict": verdict, "reason": reason,
        "gate": gate,
    }  # fmt: skip
    tags = {f"{PREFIX}{key}": str(value)[:MAX_TEXT] for key, value in told.items()}
    return int(client.create_model_version(log, f"models:/{name}/{after}", tags=tags).version)


def move(
    client: "MlflowClient", name: str, action: Action, alias: str, before: int | None, after: int, verdict: str = "",
    reason: str = "", gate: str = "",
) -> None:  # fmt: skip
    """Point an alias to a version if it still points to `before`: first the log, then the alias.

    Raises:
        RegistryError: another process has moved it meanwhile.
    """
    number = append(client, name, action, alias, before, after, verdict, reason, gate)
    moves = counted(read_log(client, name), alias)
    if number not in {entry.number for entry in moves}:
        raise RegistryError(
            f"{alias} of {name} is version {moves[-1].after if moves else 'none'} by now, not {before or 'none'}: "
            f"another process has moved it; look, and decide again: dreambooth versions {name}"
        )
    _follow_log(client, name, alias)


def settle(client: "MlflowClient", name: str, alias: str) -> int | None:
    """Finish a move that was interrupted, or take over one that was made by hand; return what the log ends with.

    An alias that points to what the log's last move came from was left behind by a process that died: it follows the
    log. One that points to anything else was moved by hand: the log takes that over.
    """
    moves = counted(read_log(client, name), alias)
    points_to = aliases_of(client, name).get(alias)
    if points_to == (moves[-1].after if moves else None):
        return points_to
    if points_to is not None and (not moves or points_to != moves[-1].before):
        before = moves[-1].after if moves else None
        append(client, name, "found", alias, before, points_to, reason="moved without dreambooth")
    return _follow_log(client, name, alias)


def recover(root: Path, subject_id: str) -> list[Entry]:
    """Finish what was interrupted: make the aliases of a subject what the log says; return the log."""
    with explained(root, f"read the log of {subject_id}", "try again when it answers"):
        client = client_of(root)
        for alias in (CHALLENGER, CHAMPION):
            settle(client, check_id(subject_id), alias)
        return read_log(client, subject_id)


def _follow_log(client: "MlflowClient", name: str, alias: str) -> int | None:
    """Set an alias until it is what the log says, also when others write the log meanwhile."""
    for _ in range(ROUNDS):
        wanted = last(read_log(client, name), alias)
        points_to = aliases_of(client, name).get(alias)
        if points_to == wanted or wanted is None or find_version(client, name, wanted, None) is None:
            return wanted  # also of a version that somebody has deleted: the next move begins there
        client.set_registered_model_alias(name, alias, str(wanted))
    raise RegistryError(f"{alias} of {name} is moved all the time; try again when others are done")


def _entry(version: Any) -> Entry | None:
    """Read an entry; None where a version is none, for anybody may make one in the registry."""
    tags = {key.removeprefix(PREFIX): value for key, value in version.tags.items()}
    action = tags.get("action", "")
    if action not in get_args(Action):
        return None
    try:
        return Entry(
            number=int(version.version),
            action=action,
            alias=tags["alias"],
            before=int(tags["from"]) if tags.get("from") else None,
            after=int(tags["to"]),
            verdict=tags.get("verdict", ""),
            reason=tags.get("reason", ""),
            time=version.creation_timestamp / 1000,
            gate=tags.get("gate", ""),
        )
    except (KeyError, ValueError):
        return None
