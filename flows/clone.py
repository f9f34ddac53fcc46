"""Bring subjects up to date in a clone of its own as a Prefect flow: for workers that share no disk.

What others have computed comes from the DVC remote; what is computed here goes there, and dvc.lock to runs/<id>.
"""

import re
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.runtime import flow_run
from prefect.task_runners import ThreadPoolTaskRunner

from dreambooth.errors import DreamboothError, SubjectError
from dreambooth.params import Params, load_params
from flows import clones, copies
from flows.dvcrun import DvcRunner
from flows.graph import Graph
from flows.personalize import TASKS_AT_ONCE, Futures, carry_out, publish
from flows.program import ended, failed
from flows.project import PARAMS, choose_subjects, find_root

if TYPE_CHECKING:
    from prefect.client.schemas.objects import State

WANTED = frozenset({"evaluate", "report", "export"})  # what registration, gate and report read
REMEDY = "start personalize/clone again with the same parameters: DVC's cache has what was computed"
RETRIES, PAUSES = 4, [5.0, 20.0, 60.0, 120.0]
DENIED = re.compile(r"\b(401|403)\b|denied|unauthori[sz]ed|forbidden|credentials", re.IGNORECASE)


def _may_pass(task: Any, run: Any, state: "State[Any]") -> bool:
    """A remote that is down may come back; one that refuses us will not."""
    return not DENIED.search(str(state.message))


@task(
    task_run_name="hand back",
    cache_policy=NO_CACHE,
    persist_result=False,
    retries=RETRIES,
    retry_delay_seconds=PAUSES,
    retry_condition_fn=_may_pass,
)
def hand_back(clone: Path, stages: Collection[str], run_id: str) -> "str | State[Any] | None":
    """Send outputs to the DVC remote, then dvc.lock to its branch: whoever sees the branch finds the outputs."""
    try:
        clones.publish(clone, stages)
        return clones.commit_back(clone, run_id)
    except DreamboothError as error:
        return failed(error)


@flow(name="personalize", task_runner=ThreadPoolTaskRunner(max_workers=TASKS_AT_ONCE), persist_result=False)  # type: ignore[arg-type]
def personalize(
    subject: str | list[str] | None = None,
    classes: list[str] | None = None,
    overrides: dict[str, Any] | None = None,
    revision: str | None = None,
    root: str | None = None,
) -> Any:
    """Run what is out of date in a clone; what the DVC remote has is fetched instead of computed.

    Args:
        subject: an id, or several; None for all in params.yaml.
        classes: draw the class images of these classes and nothing else.
        overrides: parameters by their path, such as {"train.learning_rate": 2e-6}.
        revision: a commit or a branch; None for the default branch.
        root: the checkout of this worker; None looks in DREAMBOOTH_HOME, here, and above.
    """
    try:
        home = find_root(root)
        copies.remove_left(home)
        with clones.cloned(home, clones.repository_of(home), revision) as clone:
            clones.override(clone, overrides or {})
            params = load_params(clone / PARAMS)
            if classes:
                return _draw(clone, params, classes)
            subjects = choose_subjects(params, subject)
            return _bring(clone, params, subjects, Graph.load(clone).select(subjects))
    except DreamboothError as error:
        return failed(error)


def _draw(clone: Path, params: Params, classes: list[str]) -> Any:
    """Draw class images alone, so that the subjects of a class find them in the remote."""
    wanted = {f"prior@{one}" for one in classes}
    stages = tuple(stage for stage in Graph.load(clone).stages if stage.name in wanted)
    if len(stages) < len(wanted):
        raise SubjectError(
            f"dvc.yaml draws no images of one of {', '.join(classes)}; known: {', '.join(params.classes)}"
        )
    return _bring(clone, params, [], Graph(stages))


def _bring(clone: Path, params: Params, subjects: list[str], graph: Graph) -> Any:
    wanted = WANTED if subjects else {"prior"}
    stages, versions = carry_out(params, subjects, graph, DvcRunner(clone, wanted=wanted), REMEDY)
    branch = hand_back(clone, _new(stages), str(flow_run.id), return_state=True)
    if branch.is_completed() and (name := branch.result()):
        get_run_logger().info("dvc.lock is on the branch %s", name)
    publish(clone, params, stages, versions)
    return ended([*(future.state for future in (*stages.values(), *versions.values())), branch])


def _new(stages: Futures) -> list[str]:
    """Return the stages whose outputs the remote may lack: those that ran, and those an earlier run could not send."""
    done = {name: future.result() for name, future in stages.items() if future.state.is_completed()}
    return [name for name, run in done.items() if run.outcome != "unchanged" and not name.endswith(".dvc")]
