"""Promote challengers to champions as a Prefect flow: one task a subject, the verdicts of the gate as an artifact.

Without a server: python -m flows.promote biscuit
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Failed

from dreambooth.errors import ConsentError, DreamboothError, GateError, PipelineError
from dreambooth.params import Params, load_params
from flows.project import PARAMS, choose_subjects, find_root

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
def promote_one(subject_id: str, root: Path, params: Params, force: str | None) -> "Promotion | State[Any]":
    """Promote the challenger of one subject; what was begun by an earlier try is finished, not repeated."""
    from dreambooth import promotion
    from stages.evaluate import beside_champion

    try:
        done = promotion.promote(root, params, subject_id, force=force, rescore=beside_champion)
    except (GateError, ConsentError) as error:
        return Failed(message=f"{error.code}: {error}")
    except DreamboothError as error:
        if isinstance(error.__cause__, OSError):
            raise _NotYet(f"{error.code}: {error}") from None
        return Failed(message=f"{error.code}: {error}")
    get_run_logger().info("models:/%s@champion is version %s: %s", done.name, done.champion, done.reason)
    return done


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
        subjects = choose_subjects(params, [subject] if isinstance(subject, str) else subject or [])
    except DreamboothError as error:
        return Failed(message=f"{error.code}: {error}")
    states = {one: promote_one(one, project, params, force, return_state=True) for one in subjects}
    table = [{"subject": one, "verdict": _verdict(state)} for one, state in states.items()]
    create_table_artifact(table, key="promote", description="Verdicts of this run")
    return list(states.values())


def run(subjects: Sequence[str], root: Path) -> list[str]:
    """Run the flow in this process; return a line for each refusal or fault.

    Raises:
        PipelineError: the flow could not begin.
    """
    state = cast("State[Any]", promote(list(subjects), str(root), return_state=True))
    result = state.result(raise_on_failure=False)
    if not isinstance(result, list):
        raise PipelineError(state.message or f"the flow ended as {state.name}")
    return [str(one.message or one.name) for one in result if not one.is_completed()]


def _verdict(state: "State[Any]") -> str:
    if not state.is_completed():
        return str(state.message or state.name)
    done = state.result()
    return f"version {done.champion}: {done.reason}"


def main() -> int:
    """Promote the subjects named on the command line, or all."""
    try:
        failures = run(sys.argv[1:], find_root())
    except DreamboothError as error:
        failures = [f"{error.code}: {line}" for line in str(error).splitlines()]
    for failure in failures:
        sys.stderr.write(f"{failure}\n")
    return PipelineError.exit_code if failures else 0


if __name__ == "__main__":
    sys.exit(main())
