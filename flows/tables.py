"""Draw the tables that people read in a terminal."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from dreambooth.errors import shown
from dreambooth.intervals import in_interval
from flows.summary import Summary, rows

if TYPE_CHECKING:
    from dreambooth.photos import PhotoReport
    from dreambooth.sweeps import Result
    from flows.plan import Plan


def photos_table(
    reports: Sequence["PhotoReport"], ignored: Sequence[str], thumbnails: Mapping[str, str] | None = None
) -> Table:
    """Say for every photo whether it can be used, and why not; where a thumbnail of it lies, if there are any."""
    columns = ["file", "pixels", "verdict"] + (["thumbnail"] if thumbnails else [])
    table = Table(*columns, box=None, pad_edge=False)
    for report in reports:
        pixels = f"{report.width} x {report.height}" if report.width else ""
        more = [Text((thumbnails or {}).get(report.file, ""))] if thumbnails else []
        table.add_row(Text(shown(report.file)), pixels, _verdict(report), *more)
    for name in ignored:
        table.add_row(Text(shown(name)), "", Text("passed over: no photo", "dim"))
    return table


def subject_table(summary: Summary, more: Iterable[tuple[str, str]] = ()) -> Table:
    """Say all that is known of one subject, a line a fact."""
    table = Table(box=None, show_header=False, pad_edge=False)
    for number, (label, value) in enumerate([*rows(summary), *more]):
        table.add_row(label, Text(value, "bold" if number == 0 else ""))
    return table


def undone_stages(stale: Iterable[str], done: Collection[str], failures: Collection[str]) -> dict[str, str]:
    """Return the stages of a run that have not come to their end, each with `failed` or `not run`.

    Args:
        stale: what had to run, in its order.
        done: what came to its end.
        failures: a line each, which begins with the stage that failed.
    """
    left = [name for name in stale if name not in done]
    return {name: "failed" if any(one.startswith(f"{name}: ") for one in failures) else "not run" for name in left}


def undone_in_words(undone: Mapping[str, str]) -> str:
    """Say which stages failed and which did not run: "train failed; evaluate, export not run"."""
    entries = {what: [name.partition("@")[0] for name in undone if undone[name] == what] for what in undone.values()}
    return "; ".join(f"{', '.join(names)} {what}" for what, names in sorted(entries.items()))


def status_table(subjects: Iterable[tuple[Summary, Sequence[str], str, str]]) -> Table:
    """Say of every subject what is out of date, how good it is, and what is registered: a line a subject."""
    table = Table(
        "subject", "class", "photos", "out of date", "identity", "registered", "age", box=None, pad_edge=False
    )
    for one, stale, registered, age in subjects:
        identity = f"{one.identity.base:.3f} -> {one.identity.personalised:.3f}" if one.identity else "-"
        what = Text(", ".join(stale), "yellow") if stale else Text("nothing", "green")
        table.add_row(Text(one.subject_id), Text(one.class_noun), str(one.photos), what, identity, registered, age)
    return table


def sweep_table(results: Sequence["Result"]) -> Table:
    """Set experiments beside each other, a line an experiment and subject: what it changed, what it made, or a code."""
    from dreambooth.sweeps import labels

    values = labels(results[0].values)
    names = ["experiment", "subject", *values, "identity gain", "prompt", "PRES rise", "copies", "training", "outcome"]
    table = Table(*(Column(name, no_wrap=True) for name in names), box=None, pad_edge=False)
    for one in results:
        found, seconds = one.measures, one.train_seconds
        table.add_row(
            one.experiment,
            one.subject_id,
            *(Text(str(value)) for value in one.values.values()),
            _with_interval(found, "identity"),
            _with_interval(found, "prompt"),
            f"{found['pres_rise']:+.3f}" if "pres_rise" in found else "-",
            f"{found['copies']:.0%}" if "copies" in found else "-",
            "-" if seconds is None else f"{seconds:.0f} s",
            Text(one.error.partition(": ")[0], "red") if one.error else Text("done", "green"),
        )
    return table


def _with_interval(found: Mapping[str, float], name: str) -> Text:
    if f"{name}_gain" not in found:
        return Text("-")
    return Text(in_interval(found[f"{name}_gain"], found[f"{name}_low"], found[f"{name}_high"]))


def plan_table(plan: "Plan") -> Table:
    """Draw a line for each entry that would run."""
    table = Table("stage", "runs", "units", "time", "space", "by", box=None, pad_edge=False)
    for line in plan.lines:
        how = "measured here" if line.measured else "default"
        size = f"{line.size / 1e6:.1f} MB"
        table.add_row(line.entry, str(line.stages), str(line.units), duration(line.seconds), size, how)
    if plan.lines:
        how = "measured here" if plan.around.measured else "default"
        table.add_row(plan.around.entry, "", "", duration(plan.around.seconds), "", how)
    return table


def duration(seconds: float) -> str:
    """Say a length of time: 45 s, 12 min, 3.5 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def age(seconds: float) -> str:
    """Say how long ago in one unit: 3 min, 5 h, 2 d."""
    for unit, length in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def print_problems(console: Console, code: str, text: str) -> None:
    """Print an error, a line a problem, each with its code."""
    for line in text.splitlines():
        console.print(Text(f"{code}: {line}", "red"), soft_wrap=True)


def _verdict(report: "PhotoReport") -> Text:
    if report.error:
        return Text(str(report.error), "red")
    if report.duplicate_of is not None:
        return Text(f"the same as {shown(report.duplicate_of)}: dropped (W_IMG_DUPLICATE)", "yellow")
    remarks = "; ".join(str(remark) for remark in report.warnings)
    return Text(remarks, "yellow") if remarks else Text("good", "green")
