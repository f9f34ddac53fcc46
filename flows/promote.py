"""Promote challengers to champions as a Prefect flow: one task a subject, the verdicts of the gate as an artifact.

Without a server: python -m flows.promote biscuit
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.flow_runs import suspend_flow_run
from prefect.input import RunInput
from prefect.states import Completed
from pydantic import Field

from dreambooth.errors import ConsentError, DreamboothError, GateError, PipelineError
from dreambooth.params import Params, load_params
from dreambooth.redaction import redact
from flows import clones, summary
from flows.program import ended, exit_code, failed, left, project_of, states_of, subjects_named
from flows.project import PARAMS, choose_subjects, find_root
from flows.turns import gpu_of_server

if TYPE_CHECKING:
    from dreambooth.promotion import Promotion

RETRIES, PAUSE = 2, 10.0  # of a registry that does not answer; a refusal is final


class _NotYet(Exception):  # noqa: N818 - a reason to try again, nobody's mistake
    """A fault that may pass."""


def _may_pass(task: Any, run: Any, state: "State[Any]") -> bool:
    return isinstance(state.result(raise_on_failure=False), _NotYet)


@task(
    task_run_name="promote {subject_id}",
    cache_policy=NO_CACHE,
    persist_result=False,
    retries=RETRIES,
    retry_delay_seconds=PAUSE,
    retry_condition_fn=_may_pass,
)
def promote_one(
    subject_id: str, root: Path, params: Params, force: str | None, version: int | None = None
) -> "Promotion | State[Any]":
    """Promote the challenger of one subject; what was begun by an earlier try is finished, not repeated.

    What clones made elsewhere is fetched to be checked and judged: by the hash of DVC that each version records.
    """
    from dreambooth import promotion
    from stages.evaluate import beside_champion

    warn = get_run_logger().warning

    def in_turn(*arguments: Any) -> None:
        """Draw with both models when no training has the GPU."""
        with gpu_of_server(warn):
            beside_champion(*arguments)

    try:
        _fetch_exports(root, subject_id, version)
        done = promotion.promote(root, params, subject_id, version, force, in_turn, clones.trained, warn)
    except (GateError, ConsentError) as error:
        return failed(error)
    except DreamboothError as error:
        if isinstance(error.__cause__, OSError):
            raise _NotYet(redact(f"{error.code}: {error}")) from None
        return failed(error)
    get_run_logger().info("models:/%s@champion is version %s: %s", done.name, done.champion, done.why)
    return done


def _fetch_exports(root: Path, subject_id: str, version: int | None) -> None:
    """Have challenger and champion in the cache of DVC where the registry only points there: docs/decisions/0054."""
    from dreambooth import versions

    with versions.explained(root, f"find {subject_id}", "try again when it answers"):
        client = versions.client_of(root)
        challenger = versions.find_version(client, subject_id, version, None if version else versions.CHALLENGER)
        champion = versions.find_version(client, subject_id, None, versions.CHAMPION)
        recorded = [one for one in (challenger, champion) if one and one.tags.get(versions.MD5_TAG)]
        lost = [one for one in recorded if versions.check_files(root, client, one, deep=False)]
    for one in lost:
        try:
            clones.fetch(root, one.tags[versions.MD5_TAG])
        except PipelineError as error:  # the promotion says what is missing; this says why it did not come
            get_run_logger().warning("version %s of %s: %s: %s", one.version, subject_id, error.code, error)


@flow(name="promote", persist_result=False)
def promote(subject: str | list[str] | None = None, root: str | None = None, force: str | None = None) -> Any:
    """Promote one, several or all subjects; one that is refused does not stop the others.

    Args:
        subject: ids; None takes all of params.yaml.
        root: folder of the project; None looks in DREAMBOOTH_HOME, here, and above.
        force: why the gate is overruled; it is recorded.
    """
    try:
        project = find_root(root)
        params = load_params(project / PARAMS)
        subjects = choose_subjects(params, subject)
    except DreamboothError as error:
        return failed(error)
    states = {one: promote_one(one, project, params, force, return_state=True) for one in subjects}
    summary.refresh_index(project, params.subjects, get_run_logger().warning)
    table = [{"subject": one, "verdict": _verdict(state)} for one, state in states.items()]
    left(create_table_artifact, table, "promote", "Verdicts of this run")
    return ended(list(states.values()))


class Approval(RunInput):
    """What a person is asked for in the Prefect UI."""

    approve: bool = Field(False, description="Shall this version become the champion, if the gate finds it better?")
    overrule: str | None = Field(None, description="Why it shall, even if the gate keeps it out; this is recorded.")


@flow(name="promote", persist_result=False)
def approve(subject: str, root: str | None = None, patience_days: float = 14.0) -> Any:
    """Ask a person whether the challenger shall become the champion; nothing runs while the question waits.

    The answer counts for the version that was shown: if another one has become the challenger, that is asked anew.

    Args:
        subject: an id.
        root: folder of the project; None looks in DREAMBOOTH_HOME, here, and above.
        patience_days: after which the run fails and everything stays as it is.
    """
    from dreambooth import versions

    try:
        project = find_root(root)
        params = load_params(project / PARAMS)
        params.subject(subject)
        challenger = versions.find(project, subject, alias=versions.CHALLENGER)
        champion = versions.find(project, subject, alias=versions.CHAMPION)
        if challenger is None or (champion and champion.version == challenger.version):
            return Completed(message=f"{subject} has no challenger that is not the champion")
    except DreamboothError as error:
        return failed(error)
    number = challenger.version
    _show(project, params, subject, number, champion.version if champion else None)
    question = Approval.with_initial_data(
        description=f"Shall version {number} of {subject} become the champion? Pictures and scores: "
        f"the artifact approve-{subject} of this run.",
        approve=False,
    )
    answer = suspend_flow_run(wait_for_input=question, timeout=int(patience_days * 86400), key=f"approve-{number}")
    if not answer.approve:
        return Completed(name="Declined", message=f"version {number} of {subject} was declined")
    done = promote_one(subject, project, params, answer.overrule, number, return_state=True)
    summary.refresh_index(project, params.subjects, get_run_logger().warning)
    return done


def _show(root: Path, params: Params, subject_id: str, version: int, champion: int | None) -> None:
    """Leave what is asked about in the run: the champion beside it, then its report, where that lies here."""
    more = [("version", str(version)), ("champion", str(champion or "none yet"))]
    page = summary.markdown(summary.read_summary(root, params, subject_id), more)
    if champion is not None:
        page = f"{_beside_champion(root, params, subject_id, version, champion)}\n\n## Beside the base\n\n{page}"
    left(create_markdown_artifact, page, f"approve-{subject_id}", f"Version {version} of {subject_id}")


def _beside_champion(root: Path, params: Params, subject_id: str, version: int, champion: int) -> str:
    """Return both side by side in markdown, or why that cannot be: the question is asked all the same."""
    from dreambooth import promotion

    try:
        return summary.markdown_beside(promotion.beside_champion(root, params, subject_id, version, champion))
    except DreamboothError as error:
        return f"The champion is not shown: {error.code}: {error}"


def run(subjects: Sequence[str], root: Path) -> list[str]:
    """Run the flow in this process; return a line for each refusal or fault.

    Raises:
        PipelineError: the flow could not begin.
    """
    states = states_of(lambda: cast("State[Any]", promote(list(subjects), str(root), return_state=True)))
    return [str(one.message or one.name) for one in states if not one.is_completed()]


def _verdict(state: "State[Any]") -> str:
    if not state.is_completed():
        return str(state.message or state.name)
    done = state.result()
    return f"version {done.champion}: {done.why}"


def main() -> int:
    """Promote the subjects named on the command line, or all."""
    named = subjects_named("flows.promote", __doc__)
    return exit_code(lambda: run(named, project_of(named)))


if __name__ == "__main__":
    sys.exit(main())
