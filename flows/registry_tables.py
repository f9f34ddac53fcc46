"""Draw the tables of the registry: versions, the log, what the doctor found, what would be forgotten."""

import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from flows.tables import age

if TYPE_CHECKING:
    from dreambooth.aliases import Entry
    from dreambooth.health import Finding
    from dreambooth.versions import Row

SCORES = ("identity.personalised", "identity.gain", "prompt.personalised")


def versions_table(rows: Sequence["Row"]) -> Table:
    """Say of every version what it is, how good, how old, how large, and whether its files are whole."""
    table = Table("version", "aliases", "verdict", "scores", "age", "size", "files", box=None, pad_edge=False)
    for row in rows:
        scores = ", ".join(f"{name} {row.scores[name]:.3f}" for name in SCORES if name in row.scores)
        size = f"{row.size / 1e6:.1f} MB" if row.size is not None else "-"
        table.add_row(
            str(row.version),
            Text(", ".join(row.aliases), "bold"),
            Text(row.verdict or "-"),
            scores or "-",
            age(time.time() - row.created),
            size,
            _files(row.faults),
        )
    return table


def log_table(entries: Iterable["Entry"]) -> Table:
    """Say what moved the aliases and why, the newest last."""
    table = Table("", "when", "what", "alias", "from", "to", "verdict", "reason", box=None, pad_edge=False)
    for one in entries:
        when = datetime.fromtimestamp(one.time, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
        before = str(one.before or "-")
        reason = f"{one.reason}; the gate said: {one.gate}" if one.gate else one.reason
        table.add_row(
            str(one.number), when, one.action, one.alias, before, str(one.after), one.verdict or "-", Text(reason)
        )
    return table


def findings_table(findings: Iterable["Finding"]) -> Table:
    """Say what was looked at, what was found, and under it what mends it: beside it no line would fit a terminal."""
    table = Table("", "what", "found -> remedy", box=None, pad_edge=False)
    colours = {"good": "green", "warning": "yellow", "broken": "red"}
    for one in findings:
        remedy = f"\n-> {one.remedy}" if one.remedy else ""
        table.add_row(Text(one.state, colours[one.state]), Text(one.what), Text(one.found + remedy))
    return table


def inventory_table(places: Mapping[str, int]) -> Table:
    """Say how much of a subject lies where."""
    table = Table("place", "things", box=None, pad_edge=False)
    for place, count in places.items():
        table.add_row(Text(place), str(count))
    return table


def _files(faults: tuple[str, ...] | None) -> Text:
    if faults is None:
        return Text("not looked at", "dim")
    return Text("; ".join(faults), "red") if faults else Text("whole", "green")
