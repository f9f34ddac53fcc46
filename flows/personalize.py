"""Bring subjects up to date as a Prefect flow: one task for each stale stage of DVC, then the registration.

Without a server: python -m flows.personalize biscuit
"""

import logging
import os
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.futures import PrefectFuture, wait
from prefect.states import Failed
from prefect.task_runners import ThreadPoolTaskRunner

from dreambooth.errors import DreamboothError, PipelineError
from dreambooth.hardware import has_gpu
from dreambooth.params import Params, load_params
from dreambooth.tracking import resend
from flows import plan, summary
from flows.dvcrun import DvcRunner, StageRun
from flows.graph import GPU_ENTRIES, Graph
from flows.lanes import MOST, Lanes, lanes_of, one_gpu
from flows.leaving import heard_in_a_flow, leaving_when_told
from flows.preflight import require_inputs
from flows.program import ended, exit_code, failed, has_server, left, project_of, states_of, subjects_named
from flows.project import PARAMS, choose_subjects, find_root
from flows.room import require_room
from flows.turns import VARIABLE, Turn, gpu, has_limit, without_limit

if TYPE_CHECKING:
    from dreambooth.versions import RegisteredVersion

TASKS_AT_ONCE = 4 * MOST  # they wait or run: Prefect's wait for those above them in their thread, four of a subject
OTHERS_AT_ONCE = 8  # stages beside GPU_ENTRIES: they copy and look at files
Futures = dict[str, PrefectFuture[Any]]
_registering = threading.Lock()  # a version is loaded with sys.path and an environment that the process has once


@dataclass(frozen=True)
class Outcome:
    """What a flow run did."""

    runs: tuple[StageRun, ...] = ()
    versions: "tuple[RegisteredVersion, ...]" = ()
    failures: tuple[str, ...] = ()
    """A line for each stage or registration that failed, and why; those that waited for it are not listed."""


@task(task_run_name="{stage}", cache_policy=NO_CACHE, persist_result=False)
def bring_up_to_date(stage: str, runner: DvcRunner, turn: Turn) -> "StageRun | State[Any]":
    """Run one stage through DVC and log its lines; a failed stage is a failed task without a traceback."""
    try:
        with gpu(turn, get_run_logger().warning, runner.stopped):
            return runner.run(stage, get_run_logger().info)
    except DreamboothError as error:
        return Failed(message=str(error))


@task(task_run_name="register {subject_id}", cache_policy=NO_CACHE, persist_result=False)
def register(
    subject_id: str, root: Path, max_logged_bytes: int | None, remedy: str | None = None
) -> "RegisteredVersion | State[Any]":
    """Register the export of one subject; the same export is the same version."""
    from dreambooth import registry

    try:
        with _registering:
            version = registry.register(root, subject_id, max_logged_bytes, get_run_logger().warning, remedy)
    except DreamboothError as error:
        return failed(error, f"register {subject_id}")
    how = "registered" if version.created else "was registered before"
    get_run_logger().info("models:/%s version %s %s", version.name, version.version, how)
    return version


@flow(name="personalize", task_runner=ThreadPoolTaskRunner(max_workers=TASKS_AT_ONCE), persist_result=False)  # type: ignore[arg-type]
def personalize(subject: str | list[str] | None = None, root: str | None = None) -> Any:
    """Run what is out of date for one, several or all subjects; one that fails does not stop the others.

    Args:
        subject: an id, or several; None for all in params.yaml.
        root: folder of the project; None looks in DREAMBOOTH_HOME, here, and above.
    """
    with heard_in_a_flow():
        try:
            project = find_root(root)
            params = load_params(project / PARAMS)
            subjects = choose_subjects(params, subject)
            every = Graph.load(project)
            graph = every.select(subjects)
            for remark in require_inputs(project, params, graph):
                get_run_logger().warning("%s", remark)
            require_room(project, every, graph)
        except DreamboothError as error:
            return failed(error)
        stages, versions = carry_out(params, subjects, graph, DvcRunner(project))
        summary.refresh_index(project, params.subjects, get_run_logger().warning)
        publish(project, params, stages, versions)
        return ended([future.state for future in (*stages.values(), *versions.values())])


def carry_out(
    params: Params, subjects: Sequence[str], graph: Graph, runner: DvcRunner, remedy: str | None = None
) -> tuple[Futures, Futures]:
    """Run the stale stages of a graph and register the subjects; return what became of both, by stage and subject.

    Args:
        params: of the project.
        subjects: to be registered.
        graph: its stages.
        runner: runs them.
        remedy: of a registration that failed, see `registry.register`.
    """
    limited = bool(graph.stale) and has_limit()  # by the server: a stage that has its turn gets the whole machine
    if graph.stale and not limited and os.environ.get(VARIABLE):  # who names a limit means to have one
        get_run_logger().warning("%s", without_limit())
    lanes = Lanes() if limited else lanes_of(runner.root, params, graph)
    turn: Turn = "server" if limited else threading.BoundedSemaphore(lanes.count)
    _announce(runner.root, params, graph, lanes)
    runner.threads = lanes.threads
    logging.getLogger("prefect.task_runs").addFilter(_is_news)
    logging.getLogger("prefect.flow_runs").addFilter(_is_not_the_sum)
    others = threading.BoundedSemaphore(OTHERS_AT_ONCE)
    try:
        stages, how = _submit_stages(graph, runner, turn, others), (params.registry.max_logged_bytes, remedy)
        versions = {one: _submit_registration(one, runner.root, graph, stages, how) for one in subjects}
        wait([*stages.values(), *versions.values()])
        if any(future.state.is_completed() for future in versions.values()):  # MLflow has answered
            for line in resend(runner.root):  # there may be no training in this run that would send it
                get_run_logger().warning("%s", line)
    except BaseException:
        runner.stop()
        raise
    ran = [future.result() for future in stages.values() if future.state.is_completed()]
    plan.note(runner.root, params, [(one.stage, one.seconds) for one in ran if one.outcome == "ran"], lanes)
    return stages, versions


def run(subjects: Sequence[str], root: Path) -> Outcome:
    """Run the flow in this process and return what it did.

    Raises:
        PipelineError: the flow could not begin.
        Interrupted: a signal told it to stop; without a server of its own the process ends instead.
    """
    with leaving_when_told(subjects, has_server()):
        states = states_of(lambda: cast("State[Any]", personalize(list(subjects), str(root), return_state=True)))
    done: list[Any] = [one.result(raise_on_failure=False) for one in states if one.is_completed()]
    return Outcome(
        tuple(one for one in done if isinstance(one, StageRun)),
        tuple(one for one in done if not isinstance(one, StageRun)),
        tuple(str(one.message or one.name) for one in states if one.is_final() and not one.is_completed()),
    )


def _is_news(record: logging.LogRecord) -> bool:
    """Tell whether a line is none of those by which Prefect says a failure twice, or of a task that waited for one."""
    said = record.getMessage()
    is_twice = said.startswith("Task run failed with state: ") and " - Retry " not in said
    return not (is_twice or said.startswith("Finished in state NotReady("))


def _is_not_the_sum(record: logging.LogRecord) -> bool:
    """Tell whether a line is not the one by which a flow ends with what its tasks have said already."""
    return not record.getMessage().startswith("Finished in state Failed(")


def _announce(root: Path, params: Params, graph: Graph, lanes: Lanes) -> None:
    """Log what will run and why, how long it may take, and the class images that are there already."""
    logger = get_run_logger()
    for stage in graph.stages:
        if stage.is_prior and not stage.stale:
            logger.info(summary.prior_line(root, stage.key))
    for stage in graph.stale:
        logger.info("%s: %s", stage.name, ", ".join(stage.reasons) or "a stage above it is out of date")
    if not graph.stale:
        logger.info("all %d stages are up to date", len(graph.stages))
    for line in plan.make_plan(root, params, graph, lanes).in_words(None) if graph.stale else ():
        (logger.warning if line == plan.NO_ROOM else logger.info)("plan: %s", line)
    if lanes.count > 1 and has_gpu():
        logger.warning("%s", one_gpu(lanes.count))


def _submit_stages(graph: Graph, runner: DvcRunner, gpu_turn: Turn, other_turn: Turn) -> Futures:
    futures: Futures = {}
    for stage in graph.stale:
        turn: Turn = gpu_turn if stage.entry in GPU_ENTRIES else other_turn
        above = [futures[name] for name in stage.upstream if name in futures]
        futures[stage.name] = bring_up_to_date.submit(stage.name, runner, turn, wait_for=above, return_state=False)
    return futures


def _submit_registration(
    subject_id: str, root: Path, graph: Graph, stages: Futures, how: tuple[int, str | None]
) -> PrefectFuture[Any]:
    before = [stages[stage.name] for stage in graph.select([subject_id]).stale]
    return register.submit(subject_id, root, *how, wait_for=before, return_state=False)


def publish(root: Path, params: Params, stages: Futures, versions: Futures) -> None:
    """Leave a table of all subjects, pictures and scores of each as artifacts of the flow run."""
    table = []
    for subject_id, version in versions.items():
        undone = [name.partition("@")[0] for name, future in stages.items() if _is_undone(name, subject_id, future)]
        one = summary.read_summary(root, params, subject_id, undone)
        more = [
            ("report", str(one.report.relative_to(root)) if one.report else "none yet"),
            ("registered", _registered(version)),
            ("failed", ", ".join(name for name, future in stages.items() if _failed(name, subject_id, future))),
        ]
        left(create_markdown_artifact, summary.markdown(one, more), f"subject-{subject_id}")
        if prompts := summary.read_prompts(root, subject_id):
            left(create_table_artifact, prompts, f"prompts-{subject_id}", f"Scores of {subject_id} by prompt")
        table.append(dict(summary.rows(one) + more))
    left(create_table_artifact, table, "personalize", "Subjects of this run")


def _is_undone(name: str, subject_id: str, future: PrefectFuture[Any]) -> bool:
    return name.endswith(f"@{subject_id}") and not future.state.is_completed()


def _failed(name: str, subject_id: str, future: PrefectFuture[Any]) -> bool:
    return name.endswith(f"@{subject_id}") and future.state.is_failed()


def _registered(future: PrefectFuture[Any]) -> str:
    if not future.state.is_completed():
        return "no"
    version = future.result()
    return f"{version.name} version {version.version}"


def main() -> int:
    """Run the subjects named on the command line, or all."""
    named = subjects_named("flows.personalize", __doc__)
    return exit_code(lambda: [f"{PipelineError.code}: {one}" for one in run(named, project_of(named)).failures])


if __name__ == "__main__":
    sys.exit(main())
