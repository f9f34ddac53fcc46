"""The dreambooth command: add, check, run, generate, status, register; the others stand in flows/commands.py.

Nothing heavy is imported here: each command imports what it needs, and --help needs nothing.
"""

import io
import logging
import os
import shlex
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from dreambooth import __version__
from dreambooth.errors import (
    MACHINE_FAULT,
    DreamboothError,
    PipelineError,
    RegistryError,
    machine_fault,
    wants_traceback,
)
from dreambooth.params import GUIDANCE, SAMPLER_STEPS, SIDE
from dreambooth.redaction import redact
from flows import commands
from flows.console import err, from_here, out, print_whole, say, warn
from flows.generate import PICTURES
from flows.project import NO_SUBJECT, PARAMS, choose_subjects, find_root, read_params_text

if TYPE_CHECKING:
    from dreambooth.params import Params
    from dreambooth.versions import RegisteredVersion
    from flows.check import Checked
    from flows.graph import Graph
    from flows.personalize import Outcome

app = typer.Typer(
    help="Personalise a text-to-image model from a few photos of a subject.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
SubjectId = Annotated[str, typer.Argument(metavar="ID", help="Subject in params.yaml, such as biscuit.")]
SubjectIds = Annotated[list[str] | None, typer.Argument(metavar="ID", help="Subjects; all if none is named.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        say(f"dreambooth {__version__}")
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    root: Annotated[str | None, typer.Option(help="Folder of the project; else DREAMBOOTH_HOME, here, above.")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error, of the stages too.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version, and exit.")
    ] = False,
) -> None:
    """Personalise a text-to-image model from a few photos of a subject."""
    context.obj = root
    if debug:  # for the stages as well, which are processes of their own
        os.environ["DREAMBOOTH_DEBUG"] = "1"


@app.command()
def add(
    context: typer.Context,
    subject_id: Annotated[str, typer.Argument(metavar="ID", help="Its new id: a-z, 0-9 and '-'.")],
    photos: Annotated[list[Path], typer.Argument(metavar="PHOTO", help="3 to 10 photos, or folders of them.")],
    class_noun: Annotated[str, typer.Option(help="What it is an instance of: dog, backpack, ...")],
    identifier: Annotated[str | None, typer.Option(help="Rare word that will mean it; sks if unsaid.")] = None,
    kind: Annotated[
        Literal["live", "object", "person"] | None,
        typer.Option(help="live: an animal; person: needs a consent, --consent; object if unsaid."),
    ] = None,
    consent: Annotated[Path | None, typer.Option(help="subject.yaml of a person: who, given, purpose, until.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the photos of a subject of this id.")] = False,
) -> None:
    """Add a subject: check and copy its photos, and write it into params.yaml."""
    from flows.add import Wish, add_subject, files_for_git, track_photos
    from flows.tables import photos_table

    root = find_root(context.obj)
    added = add_subject(root, Wish(subject_id, class_noun, identifier, kind, consent), photos, force)
    out.print(photos_table(added.reports, added.ignored))
    if added.assumed_kind:
        say("kind: object (evaluation prompts for things); --kind live for animals, person for people: needs a consent")
    for remark in added.remarks:
        warn(remark)
    if reason := track_photos(root, added.folder):
        warn(reason)
    elif files := files_for_git(root, added.folder):
        say(f"For git: {shlex.join(['git', 'add', *map(from_here, files)])}")
    say(f"{subject_id} is in {PARAMS}, class {added.class_id}. Next: dreambooth run {subject_id}")


@app.command()
def check(
    context: typer.Context,
    what: Annotated[str, typer.Argument(metavar="ID|FOLDER", help="Subject, or any folder of photos.")],
) -> None:
    """Look at photos: which can be used and why not, with a code each; thumbnails are drawn beside."""
    from flows import check as checking
    from flows.tables import photos_table

    checked = checking.check(find_root(context.obj), what)
    places = {name: from_here(path) for name, path in checked.thumbnails.items()}
    out.print(photos_table(checked.reports, checked.ignored, places))
    if checked.remark is not None:
        warn(str(checked.remark))
    if checked.refusal is not None:
        raise checked.refusal
    usable = sum(report.usable for report in checked.reports)
    say(f"{usable} of {len(checked.reports)} photos can be used. Next: {_next_of(checked)}")


@app.command()
def run(
    context: typer.Context,
    subject_ids: SubjectIds = None,
    preset: Annotated[
        list[str] | None, typer.Option(help="Write params/NAME.yaml into params.yaml first; several are allowed.")
    ] = None,
) -> None:
    """Bring subjects up to date: train, evaluate, export and register what changed."""
    began = time.monotonic()
    root = find_root(context.obj)
    params = _params(root)
    subjects = choose_subjects(params, subject_ids)  # before anything is written: a preset has no say in it
    with _way_back_told(root, preset or []):
        if preset:
            _apply_presets(root, preset)
            params = _params(root)
        _bring_up_to_date(root, params, subjects, began)


@app.command()
def generate(
    context: typer.Context,
    subject_id: SubjectId,
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT", help="Sentences; {} stands for the subject.")
    ] = None,
    prompts_file: Annotated[Path | None, typer.Option(help="More prompts, a line each.")] = None,
    count: Annotated[int, typer.Option("-n", min=PICTURES[0], max=PICTURES[1], help="Pictures of each prompt.")] = 4,
    seed: Annotated[int, typer.Option(min=0, max=2**62, help="Of the first picture; the next has the next.")] = 0,
    steps: Annotated[
        int | None, typer.Option(min=SAMPLER_STEPS[0], max=SAMPLER_STEPS[1], help="Steps of the sampler.")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(min=GUIDANCE[0], max=GUIDANCE[1], help="Weight of the prompt.")
    ] = None,
    negative: Annotated[str | None, typer.Option(help="What the pictures must not show.")] = None,
    size: Annotated[int | None, typer.Option(min=SIDE[0], max=SIDE[1], help="Side in pixels; else as trained.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, max=64, help="Pictures at once; 1 gives the served bits.")] = 1,
    version: Annotated[int | None, typer.Option(min=1, help="Else the champion, the challenger, the newest.")] = None,
    folder: Annotated[Path | None, typer.Option("--out", help="Else build/ID/generated.")] = None,
) -> None:
    """Draw pictures of a subject with its champion: files, a contact sheet; each PNG says how it was made."""
    from flows.generate import call_options, draw_registered, read_prompts

    root = find_root(context.obj)
    wanted = [*(prompts or []), *(read_prompts(prompts_file) if prompts_file else [])]
    _params(root).subject(subject_id)
    options = call_options(seed, steps, guidance, negative, size, batch_size)
    drawn = draw_registered(root, subject_id, wanted, count, options, _tell, warn, version, folder)
    for path in [*drawn.pictures, drawn.sheet]:
        say(from_here(path))


@app.command()
def status(context: typer.Context, subject_ids: SubjectIds = None) -> None:
    """Show what is out of date, how good each subject is, and what is registered."""
    from flows.graph import Graph

    root = find_root(context.obj)
    params = _params(root)
    if not (subjects := choose_subjects(params, subject_ids)):
        say(NO_SUBJECT)
        return
    _print_status(root, params, Graph.load(root).select(subjects), subjects)


@app.command()
def register(context: typer.Context, subject_id: SubjectId) -> None:
    """Register the export of a subject in MLflow; the same export is the same version."""
    from dreambooth import registry
    from dreambooth.tracking import resend
    from flows.summary import refresh_index

    root = find_root(context.obj)
    params = _params(root)
    params.subject(subject_id)
    say(_version(registry.register(root, subject_id, params.registry.max_logged_bytes, warn)))
    for line in resend(root):
        warn(line)
    refresh_index(root, params.subjects, warn)


commands.add_to(app)


def _tell(text: str) -> None:
    """Say a line on stderr, beside the results on stdout."""
    err.print(text, markup=False, highlight=False, soft_wrap=True)


def _bring_up_to_date(root: Path, params: "Params", subjects: list[str], began: float) -> None:
    from flows.graph import Graph

    if not subjects:
        say(NO_SUBJECT)
        return
    graph = Graph.load(root).select(subjects)
    if not graph.stale and all(_is_registered(root, subject_id) for subject_id in subjects):
        _print_status(root, params, graph, subjects)
        say("Everything is up to date.")
        return
    from flows.leaving import ending_at_once
    from flows.preflight import require_inputs

    require_inputs(root, params, graph)  # as the flow does, which begins with a server
    with ending_at_once():
        from flows import personalize, plan
    from flows.program import has_server

    outcome = personalize.run(subjects, root)
    logging.getLogger("prefect").setLevel(logging.WARNING)  # that its server stops is no news below our tables
    versions = _versions_after(root, subjects, outcome)
    for subject_id in subjects:
        _print_outcome(root, params, subject_id, outcome, graph, versions[subject_id])
    if outcome.failures:
        raise PipelineError("\n".join(outcome.failures))
    if len(subjects) == 1 and not has_server():  # whose limits a stage may wait for
        plan.note_around(root, graph, [(one.stage, one.seconds) for one in outcome.runs], time.monotonic() - began)
    say(f'Next: dreambooth generate {subjects[0]} "a photo of {{}} in space"')


def _apply_presets(root: Path, presets: list[str]) -> None:
    from flows.presets import apply, remarks

    changes = apply(root, presets)
    for change in changes:
        say(f"{PARAMS}: {change}")
    if not changes:
        say(f"{PARAMS} says what {', '.join(presets)} says already")
    for remark in remarks(root, presets):
        warn(remark)


@contextmanager
def _way_back_told(root: Path, presets: list[str]) -> Iterator[None]:
    """Say that params.yaml keeps the values of presets, and how it loses them, if what was to follow them fails."""
    before = read_params_text(root)
    try:
        yield
    except Exception:
        if before != read_params_text(root):
            _tell(f"{PARAMS} keeps the values of {', '.join(presets)}; {_way_back(root, before)}")
        raise


def _way_back(root: Path, before: str) -> str:
    """Say how params.yaml gets back the text that it had: by git, if that is what git would put there."""
    from flows.commandline import git

    try:
        known = git(root, "show", f":./{PARAMS}")
    except PipelineError:  # no repository, or one that does not have it
        known = None
    if known == before.strip():
        return f"to go back: git checkout {from_here(root / PARAMS)}"
    return "to go back: put in again what stands left of the arrows above"


def _next_of(checked: "Checked") -> str:
    if checked.subject_id is not None:
        return f"dreambooth run {checked.subject_id}"
    return f"dreambooth add ID {from_here(checked.folder)} --class-noun NOUN"


def _params(root: Path) -> "Params":
    from dreambooth.params import load_params

    return load_params(root / PARAMS)


def _is_registered(root: Path, subject_id: str) -> bool:
    from dreambooth import versions
    from flows.summary import export_hash

    return versions.is_registered(root, subject_id, versions.HASH_TAG, export_hash(root, subject_id))


def _print_status(root: Path, params: "Params", graph: "Graph", subjects: list[str]) -> None:
    from flows.summary import read_summary
    from flows.tables import age, status_table

    lines, away = [], None
    for subject_id in subjects:
        registered = "?"
        if away is None:  # asked once more for each subject it would take its time each time
            try:
                registered = _registered(root, subject_id)
            except RegistryError as error:
                away = error
        manifest = root / "export" / subject_id / "manifest.json"
        since = age(time.time() - manifest.stat().st_mtime) if manifest.exists() else "-"
        stale = [stage.entry for stage in graph.select([subject_id]).stale]
        lines.append((read_summary(root, params, subject_id), stale, registered, since))
    print_whole(status_table(lines))
    if away is not None:
        raise away


def _registered(root: Path, subject_id: str) -> str:
    """Name the version of the export, where that has none the newest one, and the champion."""
    from dreambooth import versions
    from flows.summary import export_hash

    content = export_hash(root, subject_id)
    found = versions.find_export(root, subject_id, versions.HASH_TAG, content)
    newest = found or versions.find(root, subject_id)
    champion = versions.find(root, subject_id, alias=versions.CHAMPION)
    name = f"v{newest.version}" if newest else "-"
    note = " of another export" if newest and content and not found else ""
    return name + note + (f", champion v{champion.version}" if champion else "")


def _print_outcome(
    root: Path, params: "Params", subject_id: str, outcome: "Outcome", graph: "Graph", version: str
) -> None:
    from flows.summary import prior_line, read_summary
    from flows.tables import subject_table, undone_in_words, undone_stages

    mine = [run for run in outcome.runs if run.stage.endswith(f"@{subject_id}")]
    names = ", ".join(run.stage.partition("@")[0] for run in mine)
    stale = [stage.name for stage in graph.select([subject_id]).stale]
    undone = undone_stages(stale, [run.stage for run in outcome.runs], outcome.failures)
    one = read_summary(root, params, subject_id, [name.removesuffix(f"@{subject_id}") for name in undone])
    drawn = next((run.note for run in outcome.runs if run.stage == f"prior@{one.class_id}" and run.note), None)
    prior = undone.get(f"prior@{one.class_id}") or drawn
    idle = "nothing came to its end" if undone else "nothing had to run"
    more = [
        ("class images", prior or prior_line(root, one.class_id)),
        ("time", f"{sum(run.seconds for run in mine):.0f} s: {names}" if mine else idle),
        *([("stages", undone_in_words(undone))] if undone else []),
        ("report", from_here(one.report) if one.report else "none yet"),
        ("version", version),
    ]
    out.print(subject_table(one, more), "")


def _versions_after(root: Path, subjects: list[str], outcome: "Outcome") -> dict[str, str]:
    """Name the version of each subject that a run registered, else what was there before; ? where MLflow is away."""
    told = {found.name: _version(found) for found in outcome.versions}
    for subject_id in subjects:
        if subject_id not in told:
            try:
                before = _registered(root, subject_id)
            except RegistryError:  # which the line of the registration says; asked again it would take its time again
                return dict.fromkeys(subjects, "?") | told
            told[subject_id] = "not registered" if before == "-" else before
    return told


def _version(found: "RegisteredVersion") -> str:
    return f"models:/{found.name}@challenger (v{found.version}{'' if found.created else ', as before'})"


def main() -> None:
    """Run the command; an error of its user is a line on stderr and an exit code, with --debug after a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a file name may hold bytes that are no text
            stream.reconfigure(errors="backslashreplace")
    try:
        app(prog_name="dreambooth")
    except Exception as error:
        told, code = machine_fault(error), MACHINE_FAULT
        if isinstance(error, DreamboothError):
            told, code = f"{error.code}: {error}", error.exit_code
        if not told:
            raise
        if wants_traceback():
            sys.stderr.write(redact("".join(traceback.format_exception(error))))
        from flows.tables import print_problems

        print_problems(err, *redact(told).split(": ", 1))
        sys.exit(code)


if __name__ == "__main__":
    main()
