"""Run a grid of parameters as experiments of DVC, one after the other, each in a folder of its own; compare them.

Experiments see what git or DVC knows, changes without a commit included: docs/decisions/0068.
"""

import hashlib
import json
import re
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from dreambooth import sweeps
from dreambooth.bases import LOCAL_MODELS
from dreambooth.errors import ParamsError, PipelineError
from dreambooth.folders import scratch_folder, write_file
from dreambooth.params import Params
from dreambooth.photos import SUBJECTS
from dreambooth.sweeps import SEED, Recipe, Result, Tried, Values
from dreambooth.yaml12 import load_yaml
from flows.clones import share_folders
from flows.commandline import ROBOT, git
from flows.dvcrun import DvcRunner
from flows.dvcstore import read_at
from flows.experiments import commits_of
from flows.presets import Change, write_values
from flows.project import INPUTS, PARAMS

NAME = r"[a-z0-9][a-z0-9_.-]{0,60}"
FOLDER = r"\S*\.dvc/tmp/exps/standalone/[^/\s]+/"  # of one experiment, gone when it has ended
LARGE = (Path(SUBJECTS), Path(LOCAL_MODELS))  # whose folders DVC keeps
LAST = "evaluate"  # report and export follow once one of them is taken over


@dataclass(frozen=True)
class Sweep:
    """What a sweep has found."""

    results: tuple[Result, ...]
    files: tuple[Path, ...]
    """The table, and the picture if there is one."""

    @property
    def failures(self) -> list[str]:
        """A line an experiment that failed."""
        lines = {one.experiment: f"{sweeps.in_words(one.values)}: {one.error}" for one in self.results if one.error}
        return list(lines.values())

    def in_words(self, drop: float) -> Iterator[str]:
        """Yield what each recipe made over its seeds, and how to take over the best one of each subject."""
        for subject_id in dict.fromkeys(one.subject_id for one in self.results):
            recipes = sweeps.recipes_of(one for one in self.results if one.subject_id == subject_id)
            if SEED in self.results[0].values:
                yield from (f"{subject_id}: {sweeps.with_seeds(one)}" for one in recipes)
            ranking = sweeps.ranked(recipes, drop)
            if ranking and ranking[0].values:
                yield f"{subject_id}: {_best_in_words(subject_id, ranking, len(recipes), drop)}"


def _best_in_words(subject_id: str, ranking: Sequence[Recipe], tried: int, drop: float) -> str:
    """Say which recipe is the first, how sure that is, and the commands that take it over."""
    best = ranking[0]
    certainty = sweeps.certainty(ranking)
    chosen = f"; its scores chose it out of {tried}, so set other evaluate.seeds to judge it" if tried > 1 else ""
    seed = f", with the first seed, {best.first.values[SEED]}" if SEED in best.first.values else ""
    return (
        f"the most identity within {drop:g} of the best prompt: {best}{f' ({certainty})' if certainty else ''}"
        f"{chosen}; to take it over{seed}: dreambooth sweep --apply {best.first.experiment}, then "
        f"dreambooth run {subject_id}"
    )


@dataclass
class _Watch:
    """Writes the lines of an experiment to a log, and takes the time of its trainings."""

    log: TextIO
    say: Callable[[str], object]
    seconds: dict[str, float] = field(default_factory=dict)
    """By subject."""
    _running: str = ""
    _since: float = 0.0

    def hear(self, line: str) -> None:
        self.log.write(f"{line}\n")
        self.log.flush()
        begins = re.match(r"Running stage '(\S+)':", line)
        if self._running and (begins or line.startswith("Updating lock file")):
            self.seconds[self._running] = time.monotonic() - self._since
            self._running = ""
        if begins:
            self.say(f"  {begins[1]}")
            entry, _, key = begins[1].partition("@")
            self._running, self._since = (key if entry == "train" else ""), time.monotonic()


def sweep(
    root: Path,
    params: Params,
    subjects: Sequence[str],
    settings: Sequence[str],
    name: str | None,
    say: Callable[[str], object],
) -> Sweep:
    """Run every combination that did not run before; a failed one is a row with its error, and the others go on.

    Args:
        root: the project.
        params: its parameters.
        subjects: that each experiment trains.
        settings: train.learning_rate=5e-5,1e-4 and so on.
        name: of the table; None is made of subjects and parameters.
        say: hears what is done.

    Raises:
        ParamsError: a parameter, a value or the name is refused; nothing was run.
        PipelineError: there is no git, or something that the experiments need is known to nobody but this folder.
    """
    content = params.model_dump(mode="json")
    grid = sweeps.read_grid(settings, content)
    table = sweeps.table_path(root, _table_name(name, subjects, grid[0], content))
    _require_known(root, params, subjects)
    tree, known = _tree(root), _experiments(root)
    names = [sweeps.name_of(subjects, values, tree) for values in grid]
    share_folders(root)
    table.parent.mkdir(exist_ok=True)
    seconds, runner = sweeps.read_seconds(table), DvcRunner(root)
    results: list[Result] = []
    with (scratch_folder(root) / f"{table.stem}.log").open("a", encoding="utf-8") as log:
        for number, (one, values) in enumerate(zip(names, grid, strict=True), 1):
            say(f"{number}/{len(grid)} {one}: {sweeps.in_words(values)}{', ran before' if one in known else ''}")
            watch = _Watch(log, say)
            error = "" if one in known else _run(runner, one, values, subjects, watch.hear)
            seconds |= {(one, subject_id): spent for subject_id, spent in watch.seconds.items()}
            results += _results(root, one, values, subjects, seconds, error)
            write_file(table, sweeps.csv_text(results).encode())
    return Sweep(tuple(results), (table, *_write_picture(table, results)))


def take_over(root: Path, experiment: str) -> tuple[list[Change], tuple[str, ...]]:
    """Write the values that a sweep gave one experiment into params.yaml; return what changed, and its subjects.

    `dvc exp apply` would write all of params.yaml anew, dvc.lock as it was, and fail where subjects never ran.

    Raises:
        PipelineError: no table knows the experiment, it failed, or git has it no more.
        ParamsError: its values do not go with the rest of params.yaml; the file stays as it was.
    """
    tried, commit = _tried(root, experiment), _experiments(root).get(experiment)
    if tried.error:
        raise PipelineError(f"{experiment} failed ({tried.error}); take one over that is done, or sweep again")
    if commit is None:
        raise PipelineError(f"git has no experiment {experiment} any more; the sweep that made it runs it again")
    content = load_yaml(read_at(root, commit, PARAMS))
    values = {path: _value_at(content, path) for path in tried.parameters}
    return write_values(root, values, experiment), tried.subjects


def _tried(root: Path, experiment: str) -> Tried:
    """Find an experiment in the tables of the sweeps, the newest first."""
    tables = sorted(sweeps.tables(root), key=lambda path: path.stat().st_mtime, reverse=True)
    for table in tables:
        if (found := sweeps.read_tried(table, experiment)) is not None:
            return found
    where = ", ".join(f"reports/{table.name}" for table in tables) or "reports/, where no sweep left a table"
    raise PipelineError(f"--apply: there is no experiment {experiment!r} in {where}; name one of the first column")


def _value_at(content: Values, path: str) -> Any:
    for name in path.split("."):
        content = content[name]
    return content


def _table_name(name: str | None, subjects: Sequence[str], values: Values, content: Values) -> str:
    """Return the name, or make one that no sweep of other parameters has: the next call would replace its table."""
    if name is None:
        every = [f"{section}.{key}" for section, part in content.items() for key in part]
        whole = "-".join([*subjects, *sweeps.labels(values, every)])
        return whole if len(whole) <= 60 else f"{whole[:51]}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"
    if not re.fullmatch(NAME, name):
        raise ParamsError([f"--name: {name!r} should be a-z, 0-9, '_', '.' and '-', at most 61 of them"])
    return name


def _run(runner: DvcRunner, name: str, values: Values, subjects: Sequence[str], hear: Callable[[str], object]) -> str:
    """Run one experiment; return its error, empty for none."""
    overrides = [sweeps.override_of(path, value) for path, value in values.items()]
    try:
        runner.experiment(name, overrides, [f"{LAST}@{subject_id}" for subject_id in subjects], hear)
    except PipelineError as error:
        return re.sub(FOLDER, "", str(error).removeprefix(f"{name}: "))
    return ""


def _results(
    root: Path,
    name: str,
    values: Values,
    subjects: Sequence[str],
    seconds: Mapping[tuple[str, str], float],
    error: str,
) -> Iterator[Result]:
    for subject_id in subjects:
        measures, fault = {}, error
        if not error:
            try:
                revision = _experiments(root)[name]
                measures = sweeps.measures_of(json.loads(read_at(root, revision, f"metrics/{subject_id}.json")))
            except PipelineError as lost:
                fault = str(lost)
        yield Result(name, subject_id, values, measures, seconds.get((name, subject_id)), fault)


def _write_picture(table: Path, results: Sequence[Result]) -> list[Path]:
    picture, path = sweeps.picture_of(results), table.with_suffix(".png")
    if picture is None:
        path.unlink(missing_ok=True)  # of an earlier call, with other values
        return []
    write_file(path, picture)
    return [path]


def _require_known(root: Path, params: Params, subjects: Sequence[str]) -> None:
    """Refuse what an experiment would not find: it begins with what git and DVC know of this folder.

    DVC could copy such files, and would commit them: photos would stand in the history of git.
    """
    if not _has_commit(root):
        raise PipelineError(
            f"{root} has no commit of git, which experiments of DVC begin with; git init, git add, git commit"
        )
    loose = git(
        root, "ls-files", "--others", "--exclude-standard", "--directory", "--", *INPUTS, ".dvc/config"
    ).splitlines()
    needed = [f"data/subjects/{subject_id}" for subject_id in subjects]
    if (root / (base := params.base.pretrained_model_name_or_path)).is_dir():
        needed.append(base)
    named = set(loose)  # what DVC has been given, and git not yet: its file alone
    loose += [path for path in needed if not _is_known(root, path) and not {f"{path}/", f"{path}.dvc"} & named]
    if loose:
        raise PipelineError(
            f"neither git nor DVC knows {', '.join(loose[:5])}{', ...' if len(loose) > 5 else ''}, so that no "
            f"experiment would see it; {_commands(root, loose)} (no commit is needed)"
        )


def _commands(root: Path, loose: Sequence[str]) -> str:
    """Return what gives photos and models to DVC, and its files and the rest to git."""
    large = [Path(path) for path in loose if Path(path).parent in LARGE and (root / path).is_dir()]
    rest = [path for path in loose if Path(path) not in large]
    rest += [f"{path}.dvc" for path in large] + [f"{path.parent}/.gitignore" for path in large]
    commands = [("dvc", "add", *map(str, large))] if large else []
    return ", then ".join(map(shlex.join, [*commands, ("git", "add", *dict.fromkeys(rest))]))


def _has_commit(root: Path) -> bool:
    try:
        git(root, "rev-parse", "--verify", "--quiet", "HEAD")
    except PipelineError:
        return False
    return True


def _is_known(root: Path, path: str) -> bool:
    """Tell whether git has files of a folder, or the file by which DVC has it."""
    return bool(git(root, "ls-files", "--", path, f"{path}.dvc"))


def _tree(root: Path) -> str:
    """Return the hash of all files as git would commit them now, those that it does not know left out."""
    return git(root, "rev-parse", f"{git(root, *ROBOT, 'stash', 'create') or 'HEAD'}^{{tree}}")


def _experiments(root: Path) -> dict[str, str]:
    """Return the commit of each experiment by its name."""
    return {ref.rpartition("/")[2]: commit for ref, commit in commits_of(root).items()}
