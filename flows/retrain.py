"""Bring stale subjects up to date as a Prefect flow: one flow run for each on the work pool, then the gate.

Where nothing changed it ends in seconds, without torch. Without a schedule: prefect deployment run retrain/nightly
"""

import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

from prefect import flow, get_run_logger
from prefect.artifacts import create_table_artifact
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterId,
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterStartTime,
    FlowRunFilterState,
    FlowRunFilterStateType,
    TaskRunFilter,
    TaskRunFilterState,
    TaskRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.context import FlowRunContext
from prefect.deployments import run_deployment
from prefect.states import Completed, Failed

from dreambooth.errors import ConsentError, DreamboothError, GateError
from dreambooth.folders import code_hash, sha256_of, sha256_of_file
from dreambooth.params import Params, load_params
from flows import clones
from flows.graph import Graph, Stage
from flows.program import brief, failed, left, patiently
from flows.project import PARAMS, choose_subjects, find_root, ids_of
from flows.promote import promote_one
from flows.summary import export_hash, refresh_index
from flows.turns import has_limit, without_limit

LOCAL, CLONE = "personalize/local", "personalize/clone"
SKIPPED, LATE = "Skipped", "CaughtUp"
POLL = 3.0  # seconds between two questions to the server
VERDICTS = (f"{GateError.code}: ", f"{ConsentError.code}: ")  # how a refusal begins
RESTARTS = 3  # of a run whose worker died, see flows/automations.py
ABANDONED = 120.0  # seconds after which nobody has started a crashed run again
EVENT_PREFIX = "subject."  # of the resource id of the event subject.images.updated
Mode = Literal["gate", "approval", "none"]


@dataclass
class Work:
    """A flow run that was asked for, and what became of it."""

    keys: tuple[str, ...]
    """The subject, or the classes."""
    reasons: tuple[str, ...]
    run: FlowRun
    faults: list[str] = field(default_factory=list)
    verdict: str = ""
    is_judged: bool = True
    """False where the gate was asked and could not tell, for want of files or of a registry."""

    @property
    def is_done(self) -> bool:
        """Whether it ended well."""
        return bool(self.run.state and self.run.state.is_completed()) and not self.faults


@flow(name="retrain", persist_result=False)
def retrain(
    subject: str | list[str] | None = None,
    deployment: str = LOCAL,
    promotion: Mode = "gate",
    oldest_days: float | None = None,
    root: str | None = None,
) -> Any:
    """Run what is stale, one flow run a subject; one that fails does not stop the others.

    Args:
        subject: an id, several, or subject.<id> as in an event; None for all in params.yaml.
        deployment: what runs a subject: personalize/local, or personalize/clone for workers that share no disk.
        promotion: gate: what is better becomes the champion; approval: a person is asked; none.
        oldest_days: the subject of a champion that is older runs each time, even if nothing changed: the files of its
            version are checked, lost ones come back, and a challenger is judged again; nothing is trained.
        root: folder of the project; None looks in DREAMBOOTH_HOME, here, and above.
    """
    if earlier := began_since_due():
        return Completed(name=LATE, message=f"skipped: late, {earlier} began after this one was due")
    try:
        project = find_root(root)
        params = load_params(project / PARAMS)
        subjects = choose_subjects(params, _ids(subject))
        graph = Graph.load(project, allow_missing=deployment == CLONE).select(subjects)
        stale = find_stale(project, graph, subjects, oldest_days, files=deployment != CLONE)
        revision = {"revision": clones.pushed_head(project)} if deployment == CLONE and stale else {}
    except DreamboothError as error:
        return failed(error)
    if not stale:
        return Completed(name=SKIPPED, message="skipped: unchanged")
    for one, reasons in stale.items():
        get_run_logger().info("%s: %s", one, ", ".join(reasons))
    if len(stale) > 1 and not has_limit():
        get_run_logger().warning("%s", without_limit())
    if deployment == CLONE:
        _draw_classes(project, params, graph, stale, revision)
    works = _run_subjects(project, params, stale, deployment, revision)
    if promotion != "none":
        _promote(project, params, works, promotion)
    refresh_index(project, params.subjects, get_run_logger().warning)
    return _report(works)


def find_stale(
    root: Path, graph: Graph, subjects: Sequence[str], oldest_days: float | None = None, files: bool = True
) -> dict[str, tuple[str, ...]]:
    """Return the subjects that have to run, each with the reasons.

    Args:
        root: the project.
        graph: its stages.
        subjects: to look at.
        oldest_days: age of a champion from which its subject has to run.
        files: whether the exports must lie here; workers with clones keep theirs in the DVC remote.
    """
    upstream = {stage.name: stage for stage in graph.stages}
    found: dict[str, tuple[str, ...]] = {}
    for one in subjects:
        reasons = list(dict.fromkeys(_reasons(graph.of_subject(one), upstream)))
        found[one] = tuple(reasons or _unregistered(root, one, files) or _aged(root, one, oldest_days))
    return {one: reasons for one, reasons in found.items() if reasons}


def inputs_hash(root: Path, params: Params, subject_id: str, reasons: Sequence[str]) -> str:
    """Return a key of what a run of a subject would work on: the same work, the same key; no time is in it."""
    subject = params.subject(subject_id)
    values = params.model_dump(mode="json", exclude={"subjects", "classes"})
    about = [subject.model_dump(mode="json"), params.class_of(subject_id).model_dump(mode="json")]
    folder = root / "data" / "subjects" / subject_id
    photos = [folder.with_suffix(".dvc"), *sorted(folder.rglob("*"))]
    hashes = {path.relative_to(root).as_posix(): sha256_of_file(path) for path in photos if path.is_file()}
    return sha256_of([subject_id, values, about, hashes, code_hash(), list(reasons)])


def began_since_due() -> str | None:
    """Return the name of a run with the same parameters that began after this one was due; None if there is none.

    After a time without workers every missed run of a schedule is started, the oldest first. The first one does the
    work of all.
    """
    context = FlowRunContext.get()
    me = context.flow_run if context else None
    if me is None or me.deployment_id is None or me.expected_start_time is None:
        return None
    ended = FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.COMPLETED, StateType.FAILED]))
    with get_client(sync_client=True) as client:
        runs = client.read_flow_runs(
            flow_run_filter=FlowRunFilter(
                state=ended, start_time=FlowRunFilterStartTime(after_=me.expected_start_time)
            ),
            deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[me.deployment_id])),
        )
    others = (run for run in runs if run.id != me.id and run.parameters == me.parameters)
    return next((run.name for run in others if run.state_name != LATE), None)


def _ids(subject: str | list[str] | None) -> list[str]:
    return [one.removeprefix(EVENT_PREFIX) for one in ids_of(subject)]


def _reasons(stages: Sequence[Stage], known: Mapping[str, Stage]) -> Iterator[str]:
    """Yield what changed in the stages of a subject and in what they are made from."""
    for stage in stages:
        yield from stage.reasons
        for name in stage.upstream:
            yield from known[name].reasons


def _unregistered(root: Path, subject_id: str, files: bool) -> list[str]:
    from dreambooth import versions

    newest = versions.find(root, subject_id) if versions.is_there(root) else None
    if newest is None:
        return ["not registered"]
    if files:
        is_registered = versions.is_registered(root, subject_id, versions.HASH_TAG, export_hash(root, subject_id))
    else:  # what a clone made and could not register stands in dvc.lock alone
        recorded = versions.recorded_md5(root, f"export/{subject_id}")
        is_registered = newest.md5 is None or versions.is_registered(root, subject_id, versions.MD5_TAG, recorded)
    return [] if is_registered else ["the export is not registered"]


def _aged(root: Path, subject_id: str, oldest_days: float | None) -> list[str]:
    from dreambooth import versions

    if oldest_days is None:
        return []
    champion = next((row for row in versions.rows(root, subject_id) if versions.CHAMPION in row.aliases), None)
    days = (time.time() - champion.created) / 86400 if champion else 0.0
    return [f"the champion is {days:.0f} days old"] if days > oldest_days else []


def _draw_classes(root: Path, params: Params, graph: Graph, stale: Collection[str], revision: dict[str, str]) -> None:
    """Draw the class images that are out of date once, before subjects that share them start in several clones."""
    wanted = dict.fromkeys(params.subject(one).class_id for one in stale)
    classes = [one for one in wanted if any(stage.is_prior and stage.key == one for stage in graph.stale)]
    works = [
        _start(CLONE, {"classes": [one], **revision}, (one,), ("class images",), sha256_of([one, "prior", revision]))
        for one in classes
    ]
    _await(works)
    for work in works:
        if not work.is_done:
            get_run_logger().warning("%s: no class images: %s", work.keys[0], "; ".join(work.faults))
    _take_back(root, works)


def _run_subjects(
    root: Path, params: Params, stale: Mapping[str, tuple[str, ...]], deployment: str, more: Mapping[str, str]
) -> list[Work]:
    works = [
        _start(
            deployment,
            {"subject": one, **more},
            (one,),
            reasons,
            sha256_of([inputs_hash(root, params, one, reasons), deployment, dict(more)]),
        )
        for one, reasons in stale.items()
    ]
    _await(works)
    if deployment == CLONE:
        kept = _take_back(root, works)
        if _is_still_at(root, more["revision"]):
            _look_again(root, works, kept)
    return works


def _take_back(root: Path, works: Iterable[Work]) -> dict[str, str]:
    """Take what clones made into dvc.lock; return why that of a subject or a class stays as it was.

    What git does not give is made again by the next run, from the remote.
    """
    kept: dict[str, str] = {}
    for work in works:
        try:
            found, why = clones.take_back(root, clones.repository_of(root), str(work.run.id), work.keys), "no branch"
        except DreamboothError as error:
            found, why = False, str(error)
        if not found and work.is_done:
            kept[work.keys[0]] = f"dvc.lock stays as it was: {why}"
            get_run_logger().warning("%s: %s", work.keys[0], kept[work.keys[0]])
    return kept


def _is_still_at(root: Path, revision: str) -> bool:
    """Tell whether the checkout is what clones worked on; what has changed meanwhile is for the next run."""
    try:
        return clones.pushed_head(root) == revision
    except DreamboothError as error:
        get_run_logger().warning("nobody looked whether all is up to date now: %s", error)
        return False


def _look_again(root: Path, works: Iterable[Work], kept: Mapping[str, str]) -> None:
    """Note what is out of date here still, although its run ended well: it would run every night and be called done."""
    try:
        graph = Graph.load(root, allow_missing=True)
    except DreamboothError as error:
        get_run_logger().warning("nobody looked whether all is up to date now: %s", error)
        return
    upstream = {stage.name: stage for stage in graph.stages}
    for work in works:
        reasons = dict.fromkeys(_reasons(graph.of_subject(work.keys[0]), upstream))
        if reasons and work.is_done:
            told, why = ", ".join(reasons), kept.get(work.keys[0], f"see git diff in {root}")
            work.faults.append(f"its run ended well, and it is out of date here still: {told}; {why}")


def _start(
    deployment: str, parameters: dict[str, Any], keys: tuple[str, ...], reasons: tuple[str, ...], key: str
) -> Work:
    """Ask for a flow run; one that was asked for with the same key and has not ended is taken instead of a second."""
    attempts = count()
    while True:
        run = _ask(
            deployment,
            parameters=parameters,
            idempotency_key=f"{key}-{next(attempts)}",
            flow_run_name=" ".join(keys),
        )
        if not (run.state and run.state.is_final()):
            get_run_logger().info("%s: flow run %s (%s)", " ".join(keys), run.id, deployment)
            return Work(keys, reasons, run)


def _ask(deployment: str, **named: Any) -> FlowRun:
    """Create a flow run of a deployment and do not wait for it; asked twice with one key it is one run."""
    named.setdefault("idempotency_key", str(uuid4()))
    run = patiently(lambda: run_deployment(deployment, timeout=0, as_subflow=False, **named))
    assert isinstance(run, FlowRun)
    return run


def _await(works: Sequence[Work]) -> None:
    """Wait until every run has ended; one whose worker died may be started again by the server meanwhile."""
    with get_client(sync_client=True) as client:
        while waiting := [work for work in works if not _has_ended(work.run)]:
            time.sleep(POLL)
            ids = [work.run.id for work in waiting]
            for part in (ids[at : at + 200] for at in range(0, len(ids), 200)):
                these = FlowRunFilter(id=FlowRunFilterId(any_=part))
                found = patiently(partial(client.read_flow_runs, flow_run_filter=these, limit=200))
                fresh = {run.id: run for run in found}
                for work in waiting:
                    work.run = fresh.get(work.run.id, work.run)
        for work in works:
            work.faults = [] if work.is_done else patiently(partial(_faults, client, work.run))


def _has_ended(run: FlowRun) -> bool:
    state = run.state
    if state is None or not state.is_final():
        return False
    if not state.is_crashed() or run.run_count >= RESTARTS:
        return True
    return time.time() - state.timestamp.timestamp() > ABANDONED


def _faults(client: SyncPrefectClient, run: FlowRun) -> list[str]:
    """Return a line for each task that failed, else what the run says of itself."""
    failed = TaskRunFilterState(type=TaskRunFilterStateType(any_=[StateType.FAILED]))
    tasks = client.read_task_runs(
        flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run.id])), task_run_filter=TaskRunFilter(state=failed)
    )
    said = [str(one.state.message) for one in tasks if one.state and one.state.message]
    return said or [str((run.state.message if run.state else None) or run.state_name)]


def _promote(root: Path, params: Params, works: Sequence[Work], promotion: Mode) -> None:
    """Offer what was made to the gate, or to a person; a refusal is a verdict and no failure."""
    for work in works:
        if not work.is_done:
            continue
        one = work.keys[0]
        if promotion == "approval":
            run = _ask("promote/approve", parameters={"subject": one})
            work.verdict = f"waits for a person: flow run {run.id}"
            continue
        state = promote_one(one, root, params, None, return_state=True)
        done: Any = state.result() if state.is_completed() else None
        work.verdict = f"version {done.champion}: {done.reason}" if done else str(state.message)
        work.is_judged = bool(done) or work.verdict.startswith(VERDICTS)
        if not work.is_judged:
            get_run_logger().error("%s: not judged: %s", one, work.verdict)


def _report(works: Sequence[Work]) -> Any:
    """Leave the table of all subjects, the failed ones first; fail if there are any."""
    bad = [work for work in works if not work.is_done]
    rows = [
        {
            "subject": work.keys[0],
            "outcome": "; ".join(work.faults) or "done",
            "why it ran": ", ".join(work.reasons),
            "promotion": work.verdict,
            "flow run": str(work.run.id),
        }
        for work in sorted(works, key=lambda work: work.is_done)
    ]
    left(create_table_artifact, rows, "retrain", f"{len(bad)} of {len(works)} subjects failed")
    lines = [f"{work.keys[0]}: {'; '.join(work.faults)}" for work in bad]
    for line in lines:
        get_run_logger().error("%s", line)
    if bad:
        return Failed(message=f"{len(bad)}/{len(works)} subjects failed: {brief(lines)}")
    unjudged = ", ".join(work.keys[0] for work in works if not work.is_judged)
    note = f"; not judged, see the table: {unjudged}" if unjudged else ""
    return Completed(message=f"{len(works)} subjects are up to date{note}")
