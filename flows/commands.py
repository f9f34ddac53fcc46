"""The commands beside the run: promote, versions, doctor, plan, sweep, forget and their like; nothing heavy here."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dreambooth.errors import PipelineError
from flows.console import from_here, out, print_whole, say, warn
from flows.project import PARAMS, find_root

if TYPE_CHECKING:
    from dreambooth.params import Params
    from dreambooth.promotion import Promotion

SubjectId = Annotated[str, typer.Argument(metavar="ID", help="Subject, such as biscuit.")]
Force = Annotated[str | None, typer.Option("--force", metavar="REASON", help="Overrule; the reason is recorded.")]


def add_to(app: typer.Typer) -> None:
    """Add the commands to the dreambooth command."""
    for command in (promote, rollback, versions, doctor, forget, plan, accept, sweep, automations):
        app.command()(command)


def promote(
    context: typer.Context,
    subject_id: SubjectId,
    version: Annotated[int | None, typer.Option(min=1, help="Else the challenger.")] = None,
    force: Force = None,
) -> None:
    """Make a version the champion, if the gate finds it better; the verdict is written down either way."""
    from dreambooth import promotion
    from dreambooth.params import load_params
    from flows.clones import trained
    from stages.evaluate import beside_champion

    root = find_root(context.obj)
    params = load_params(root / PARAMS)
    params.subject(subject_id)
    done = promotion.promote(root, params, subject_id, version, force, beside_champion, trained, warn)
    _conclude(root, params, done)


def rollback(context: typer.Context, subject_id: SubjectId, force: Force = None) -> None:
    """Make the champion before this one the champion again, if its files are whole."""
    from dreambooth import promotion
    from dreambooth.params import load_params

    root = find_root(context.obj)
    params = load_params(root / PARAMS)
    params.subject(subject_id)
    _conclude(root, params, promotion.rollback(root, params, subject_id, force, warn))


def versions(
    context: typer.Context,
    subject_id: SubjectId,
    everything: Annotated[bool, typer.Option("--all", help="All of them, not the newest 20.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Compare every sha256; downloads from a server.")] = False,
    log: Annotated[bool, typer.Option("--log", help="Show what moved the aliases, and why.")] = False,
) -> None:
    """Show the versions of a subject: aliases, verdicts, scores, age, size, and whether their files are whole."""
    from dreambooth import aliases
    from dreambooth import versions as registered
    from dreambooth.params import check_id, load_params
    from flows.registry_tables import log_table, versions_table

    root = find_root(context.obj)
    entries = aliases.recover(root, check_id(subject_id)) if registered.is_there(root) else []
    found = registered.rows(root, subject_id, None if everything else 20, verify)
    if not found:
        load_params(root / PARAMS).subject(subject_id)
        raise PipelineError(f"{subject_id} has no version; {registered.next_step(root, subject_id)}")
    print_whole(versions_table(found))
    if log:
        print_whole(log_table(entries))


def doctor(context: typer.Context) -> None:
    """Look for what is broken or at risk, and say what mends it; exit with 1 if anything is broken."""
    from flows.doctor import examine
    from flows.registry_tables import findings_table

    findings = examine(find_root(context.obj))
    print_whole(findings_table(findings))
    if any(one.is_broken for one in findings):
        raise typer.Exit(1)


def plan(
    context: typer.Context,
    subject_ids: Annotated[list[str] | None, typer.Argument(metavar="ID", help="Subjects; all if none.")] = None,
    price: Annotated[float | None, typer.Option(min=0, help="Of an hour of a machine, in your currency.")] = None,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="As with so many workers, one a GPU; else as run does it here.")
    ] = None,
) -> None:
    """Say what a run would do before it starts: stages, time, space and cost, by what earlier runs took here."""
    from dreambooth.hardware import has_gpu
    from dreambooth.params import load_params
    from flows.graph import Graph
    from flows.lanes import Lanes, lanes_of, one_gpu
    from flows.plan import make_plan
    from flows.preflight import require_inputs
    from flows.project import NO_SUBJECT, choose_subjects
    from flows.tables import plan_table

    root = find_root(context.obj)
    params = load_params(root / PARAMS)
    if not (subjects := choose_subjects(params, subject_ids)):
        say(NO_SUBJECT)
        return
    graph = Graph.load(root).select(subjects)
    made = make_plan(root, params, graph, Lanes(gpus) if gpus else lanes_of(root, params, graph))
    out.print(plan_table(made))
    for line in made.in_words(price, gpus):
        say(line)
    if made.lines and made.at_once > 1 and (gpus or has_gpu()):
        say(one_gpu(made.at_once))
    for remark in require_inputs(root, params, graph):
        warn(remark)


def accept(
    context: typer.Context,
    subject_ids: Annotated[list[str] | None, typer.Argument(metavar="ID", help="Subjects; all if none.")] = None,
) -> None:
    """After an upgrade: take what older code of this program made as up to date, where nothing else changed."""
    from dreambooth.params import load_params
    from flows.graph import Graph, accept_code
    from flows.project import choose_subjects

    root = find_root(context.obj)
    subjects = choose_subjects(load_params(root / PARAMS), subject_ids)
    graph = Graph.load(root).select(subjects)
    accepted = accept_code(root, graph)
    for name in accepted:
        say(f"{name}: {', '.join(graph[name].reasons)}")
    left = Graph.load(root).select(subjects).stale if accepted else graph.stale
    say(f"{len(accepted)} accepted, {len(left)} left: {', '.join(stage.name for stage in left) or 'all up to date'}")


def sweep(
    context: typer.Context,
    subject_ids: Annotated[
        list[str] | None, typer.Argument(metavar="ID", help="Subjects that each experiment trains.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("-S", "--set", metavar="NAME=VALUE,VALUE", help="A parameter and its values; may be repeated."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Of the table: reports/sweep-NAME.csv.")] = None,
    experiment: Annotated[
        str | None, typer.Option("--apply", metavar="EXPERIMENT", help="Write its values into params.yaml; no more.")
    ] = None,
) -> None:
    """Train with every combination of values, one after the other, and compare; what ran before is not run again."""
    from dreambooth.params import load_params
    from flows import sweep as sweeping
    from flows.leaving import leaving_a_sweep_when_told
    from flows.tables import sweep_table

    root = find_root(context.obj)
    if experiment is not None:
        if subject_ids or settings or name:
            raise PipelineError(f"--apply {experiment}: stands alone, without ID, -S and --name")
        _take_over(root, experiment)
        return
    if not subject_ids:
        raise PipelineError("no subject; dreambooth sweep ID -S NAME=VALUE,VALUE, or --apply EXPERIMENT of a sweep")
    params = load_params(root / PARAMS)
    for subject_id in subject_ids:
        params.subject(subject_id)
    with leaving_a_sweep_when_told():
        done = sweeping.sweep(root, params, list(dict.fromkeys(subject_ids)), settings or [], name, say)
    print_whole(sweep_table(done.results))
    for path in done.files:
        say(from_here(path))
    for line in done.in_words(params.gate.first_prompt_drop):
        say(line)
    if done.failures:
        raise PipelineError("\n".join(done.failures))


def _take_over(root: Path, experiment: str) -> None:
    from flows.sweep import take_over

    changes, subjects = take_over(root, experiment)
    for change in changes:
        say(f"{PARAMS}: {change}")
    if not changes:
        say(f"{PARAMS} says what {experiment} says already")
    say(f"Next: dreambooth run {' '.join(subjects)}, which takes what DVC has of {experiment} and makes the rest")


def automations(
    webhook: Annotated[
        str | None,
        typer.Option(envvar="DREAMBOOTH_WEBHOOK", help="Where failures and waiting approvals are posted; kept secret."),
    ] = None,
) -> None:
    """Apply the automations to the Prefect server: end dead runs, start them again, tell people."""
    from flows.automations import apply

    for name in apply(webhook):
        say(name)


def forget(
    context: typer.Context,
    subject_id: SubjectId,
    yes: Annotated[bool, typer.Option("--yes", help="Do it; without it only the inventory is shown.")] = False,
) -> None:
    """Erase a subject everywhere this project can reach: photos, models, caches, remotes, registry, runs."""
    from flows.forget import erase, inventory
    from flows.registry_tables import inventory_table

    root = find_root(context.obj)
    found = inventory(root, subject_id)
    out.print(inventory_table(found.places))
    if not yes:
        say(f"Nothing was erased. To erase all of it, for good: dreambooth forget {subject_id} --yes")
        return
    receipt = erase(root, found, warn)
    for line in found.out_of_reach:
        say(f"not reached: {line}")
    if found.idle_class is not None:
        say(f"the class {found.idle_class} stays in {PARAMS} without a subject; take its lines out if none will come")
    say(f"Erased. Receipt, without personal data: {from_here(receipt)}")


def _conclude(root: Path, params: "Params", done: "Promotion") -> None:
    """Say which version is the champion, here and in the index of the reports."""
    from flows.summary import refresh_index

    before = f"version {done.before}" if done.before else "none"
    say(f"models:/{done.name}@champion is version {done.champion} (before: {before}); {done.why}")
    refresh_index(root, params.subjects, warn)
