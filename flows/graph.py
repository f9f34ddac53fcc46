"""Read from DVC which stages a project has, what each one waits for, and which are out of date.

dvc.yaml is the only topology and DVC's hashes are the only "up to date?": nothing of either is kept elsewhere.
"""

import gc
import heapq
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import chdir, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreambooth.errors import PipelineError, SubjectError
from dreambooth.folders import misnamed
from dreambooth.params import load_params
from flows.dvcstore import being_written, explained, open_project
from flows.project import PARAMS

PRIOR = "prior"
GPU_ENTRIES = frozenset({PRIOR, "train", "evaluate"})
DATA_SUFFIX = ".dvc"
MISSING = frozenset({"deleted", "not in cache"})  # what DVC says of a file that is not here
CODE_FOLDERS = frozenset({"dreambooth", "stages"})  # of this program, whose modules stages depend on
_NOTHING = object()  # a parameter


@dataclass(frozen=True)
class Stage:
    """A node of the graph: an entry of dvc.yaml, or a .dvc file of data."""

    name: str
    """As DVC addresses it: train@biscuit, data/subjects/biscuit.dvc."""
    upstream: tuple[str, ...] = ()
    """The stages whose outputs it reads."""
    reasons: tuple[str, ...] = ()
    """What changed since it last ran; empty if nothing did."""
    stale: bool = False
    """Whether it, or a stage above it, changed."""
    size: int = 0
    """Bytes of its outputs when it last ran; 0 if it never did."""

    @property
    def entry(self) -> str:
        """The entry of dvc.yaml: train of train@biscuit."""
        return self.name.partition("@")[0]

    @property
    def key(self) -> str:
        """The subject or the class: biscuit of train@biscuit; empty without one."""
        return self.name.partition("@")[2]

    @property
    def is_prior(self) -> bool:
        """Whether it makes the class images that subjects share."""
        return self.entry == PRIOR

    @property
    def is_data(self) -> bool:
        """Whether it is a .dvc file, which has no command."""
        return self.name.endswith(DATA_SUFFIX)

    @property
    def is_changed_by_code(self) -> bool:
        """Whether other code of this program is all that changed since it last ran: an upgrade does that."""
        whats = [reason.rpartition(" ") for reason in self.reasons]
        return bool(whats) and all(how == "modified" and _is_code(path) for path, _, how in whats)


@dataclass(frozen=True)
class Graph:
    """The stages in an order in which they can run: data first, then priors, then subject after subject."""

    stages: tuple[Stage, ...]

    @classmethod
    def load(cls, root: Path, allow_missing: bool = False) -> "Graph":
        """Read dvc.yaml and compare every stage with the disk; takes DVC's lock for that moment.

        Args:
            root: the folder with dvc.yaml.
            allow_missing: files that are not here count as what dvc.lock says they are: others have them.

        Raises:
            ParamsError: params.yaml is at fault.
            PipelineError: dvc.yaml or the checkout is.
        """
        with _one_line_errors(root):
            from dvc.repo import lock_repo

            with _no_collection(), open_project(root, wait_for_lock=True) as repo, lock_repo(repo):
                graph = repo.index.graph
                upstream = {_address(node): [_address(above) for above in graph.successors(node)] for node in graph}
                status = _of_dvc if _is_writing(root) else _Comparison()
                reasons = {_address(node): _reasons(node, root, allow_missing, status) for node in graph}
                sizes = {_address(node): sum(out.meta.size or 0 for out in node.outs) for node in graph}
        return cls.of(upstream, reasons, sizes)

    @classmethod
    def of(
        cls,
        upstream: Mapping[str, Iterable[str]],
        reasons: Mapping[str, Iterable[str]],
        sizes: Mapping[str, int] | None = None,
    ) -> "Graph":
        """Order the stages, and call stale what changed and everything below it."""
        stages: dict[str, Stage] = {}
        for name in _in_order(upstream):
            above = tuple(sorted(upstream[name]))
            why = tuple(reasons.get(name, ()))
            stale = bool(why) or any(stages[one].stale for one in above)
            stages[name] = Stage(name, above, why, stale, (sizes or {}).get(name, 0))
        return cls(tuple(stages.values()))

    def __getitem__(self, name: str) -> Stage:
        return next(stage for stage in self.stages if stage.name == name)

    @property
    def stale(self) -> tuple[Stage, ...]:
        """What would run, in order."""
        return tuple(stage for stage in self.stages if stage.stale)

    def of_subject(self, subject_id: str) -> tuple[Stage, ...]:
        """Return the stages of one subject, without those it shares."""
        return tuple(stage for stage in self.stages if stage.key == subject_id and not stage.is_prior)

    def select(self, subjects: Iterable[str]) -> "Graph":
        """Keep the stages of these subjects and all that they are made from.

        Raises:
            SubjectError: dvc.yaml makes no stage for one of them.
        """
        upstream = {stage.name: stage.upstream for stage in self.stages}
        wanted: set[str] = set()
        for subject_id in subjects:
            own = [stage.name for stage in self.of_subject(subject_id)]
            if not own:
                known = sorted({stage.key for stage in self.stages if stage.key and not stage.is_prior})
                raise SubjectError(f"dvc.yaml has no stage for {subject_id!r}; known: {', '.join(known) or 'none'}")
            wanted |= _with_ancestors(own, upstream)
        return Graph(tuple(stage for stage in self.stages if stage.name in wanted))


def accept_code(root: Path, graph: Graph) -> list[str]:
    """After an upgrade: take what older code of this program made as made by the code that is here, without running it.

    The hashes of code alone are written into dvc.lock: a parameter or a photo that changes meanwhile still makes its
    stage run.

    Args:
        root: of the project.
        graph: the stages to look at; those that nothing but code makes out of date are taken.

    Returns:
        The stages, as DVC addresses them.

    Raises:
        PipelineError: dvc.yaml or the checkout is at fault.
    """
    if not (names := [stage.name for stage in graph.stages if stage.is_changed_by_code]):
        return []
    with chdir(root), _one_line_errors(root):  # DVC takes what it writes from the current folder
        from dvc.repo import lock_repo

        with open_project(root, wait_for_lock=True) as repo, lock_repo(repo):
            nodes = [node for node in repo.index.stages if _address(node) in names]
            for node in nodes:
                for dep in node.deps:
                    if _is_code(_from_root(str(dep.fs_path), root)):
                        dep.save()
                repo.stage_cache.save(node)  # what was made can be restored, as if it had run
            nodes[0].dvcfile.dump_stages(nodes, update_pipeline=False)
    return names


def _in_order(upstream: Mapping[str, Iterable[str]]) -> Iterator[str]:
    """Yield every stage after all that it waits for; of those that could come next the least by rank."""
    waiting = {name: len(set(above)) for name, above in upstream.items()}
    below: dict[str, list[str]] = {name: [] for name in upstream}
    for name, above in upstream.items():
        for one in set(above):
            below[one].append(name)
    ready = [(_rank(name), name) for name, count in waiting.items() if not count]
    heapq.heapify(ready)
    while ready:
        _, first = heapq.heappop(ready)
        yield first
        for name in below[first]:
            waiting[name] -= 1
            if not waiting[name]:
                heapq.heappush(ready, (_rank(name), name))


def _rank(name: str) -> tuple[int, str, str]:
    """Data, then priors, then subject after subject: the first subject is done before the last one starts."""
    stage = Stage(name)
    return (0 if stage.is_data else 1 if stage.is_prior else 2, stage.key, stage.entry)


def _with_ancestors(names: Iterable[str], upstream: Mapping[str, Iterable[str]]) -> set[str]:
    found: set[str] = set()
    open_ = list(names)
    while open_:
        name = open_.pop()
        if name not in found:
            found.add(name)
            open_ += upstream[name]
    return found


def _is_code(path: str) -> bool:
    """Whether a file, as it stands from the root, is code of this program."""
    return path.partition("/")[0] in CODE_FOLDERS


def _address(node: Any) -> str:
    """Return what `dvc repro` calls a stage in the root; DVC's own `addressing` depends on the current folder."""
    where = Path(node.path_in_repo).as_posix()
    if where.endswith(DATA_SUFFIX):
        return where
    return str(node.name) if where == "dvc.yaml" else f"{where}:{node.name}"


def _reasons(node: Any, root: Path, allow_missing: bool, compare: Callable[[Any], list[Any]]) -> list[str]:
    """Say in words what DVC finds changed; a stage that another process is running counts as changed."""
    from dvc.lock import LockError

    try:
        entries = compare(node)
    except LockError:
        return ["running in another process"]
    if entries and node.deps and not any(dep.hash_info for dep in node.deps):
        return ["never ran"]
    ignored = MISSING if allow_missing else frozenset()
    return [word for entry in entries for word in _words(entry, root, ignored)]


def _of_dvc(node: Any) -> list[Any]:
    """Compare a stage with the disk as DVC does, under a lock of each of its files: LockError where one is written."""
    return [entry for entries in node.status(check_updates=False).values() for entry in entries]


class _Comparison:
    """Compare stages with the disk as `dvc.stage.Stage.status` does, but each file that they share once.

    Every subject depends on the same modules: of the seconds for 1,000 subjects two thirds went into looking at those
    again, and into DVC's file of locks, which nobody can write to while we hold the lock of the whole.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], dict[str, Any]] = {}
        self._params: dict[str, Any] = {}

    def __call__(self, node: Any) -> list[Any]:
        deps: dict[str, Any] = {}
        for dep in () if node.frozen else node.deps:
            deps |= self._of_dependency(dep)
        outs = {name: word for out in node.outs for name, word in out.status().items()}
        entries: list[Any] = [
            {what: found} for what, found in (("changed deps", deps), ("changed outs", outs)) if found
        ]
        entries += ["always changed"] if node.is_callback or node.always_changed else []
        return entries + (["changed checksum"] if node.changed_stage() else [])

    def _of_dependency(self, dep: Any) -> dict[str, Any]:
        from dvc.dependency.base import Dependency
        from dvc.dependency.param import ParamsDependency

        if type(dep) is ParamsDependency and dep.params and dep.hash_info.value is not None and dep.exists:
            return self._of_parameters(dep)
        if type(dep) is not Dependency:
            return dict(dep.status())
        key = (str(dep.fs_path), str(dep.hash_info))
        if key not in self._known:
            self._known[key] = dep.status()
        return self._known[key]

    def _of_parameters(self, dep: Any) -> dict[str, Any]:
        """Compare with a file of parameters that is read once: it grows with the subjects, and every stage asks it."""
        from dvc.utils.serialize import load_path

        place, locked = str(dep.fs_path), dep.hash_info.value
        if place not in self._params:
            self._params[place] = load_path(place, dep.repo.fs)
        values = {path: _look_up(self._params[place], path) for path in dep.params}
        if _NOTHING in values.values():
            return dict(dep.status())  # gone, or in a list: DVC knows
        both = [path for path in values if path in locked]
        changed = {one: "modified" for path in both for one in _differing(path, locked[path], values[path])}
        changed |= {path: "new" for path in values if path not in locked}
        return {str(dep): changed} if changed else {}


def _look_up(content: Any, path: str) -> Any:
    """Return what stands at train.learning_rate in nested maps; _NOTHING if nothing does."""
    for name in path.split("."):
        if not isinstance(content, dict) or name not in content:
            return _NOTHING
        content = content[name]
    return content


def _differing(path: str, before: Any, now: Any) -> Iterator[str]:
    """Yield the path of each value that differs, inside of maps with the same keys."""
    if isinstance(before, dict) and isinstance(now, dict) and before.keys() == now.keys():
        for key in before:
            yield from _differing(f"{path}.{key}", before[key], now[key])
    elif before != now:
        yield path


def _is_writing(root: Path) -> bool:
    """Tell whether some process writes to files of a stage now, or died doing so; we hold the lock of the whole."""
    try:
        return bool(being_written(root))
    except json.JSONDecodeError:
        return True  # DVC says what to do about it


@contextmanager
def _no_collection() -> Iterator[None]:
    """Pause the garbage collector: DVC's objects of thousands of stages live to the end, and searching them costs."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _words(entry: Any, root: Path, ignored: frozenset[str]) -> Iterator[str]:
    """Yield "train.learning_rate modified" from {"changed deps": {"params.yaml": {"train.learning_rate": ...}}}."""
    if not isinstance(entry, dict):
        yield str(entry)
        return
    for changes in entry.values():
        for path, change in changes.items():
            if isinstance(change, dict):
                yield from (f"{key} {how}" for key, how in change.items())
            elif change not in ignored:
                yield f"{_from_root(path, root)} {change}"


def _from_root(path: str, root: Path) -> str:
    absolute = Path(os.path.abspath(path))  # noqa: PTH100 - resolve() would follow the links of a data folder
    return absolute.relative_to(root).as_posix() if absolute.is_relative_to(root) else path


@contextmanager
def _one_line_errors(root: Path) -> Iterator[None]:
    """Turn what DVC raises into our errors; a fault of params.yaml is told by our own reader, with every field."""
    try:
        with explained(root, f"mend it in {root}"):
            yield
    except PipelineError:
        if (root / PARAMS).exists():
            load_params(root / PARAMS)
        raise
    except UnicodeEncodeError:
        if problems := misnamed(root / "data"):
            raise PipelineError(" | ".join(problems)) from None
        raise
