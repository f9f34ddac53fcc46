"""Lay out a sweep: the grid of its values, a name for each experiment, its results as rows, its recipes compared."""

import csv
import io
import itertools
import json
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreambooth.errors import ParamsError
from dreambooth.folders import sha256_of
from dreambooth.intervals import in_interval
from dreambooth.params import parse_params, with_values
from dreambooth.yaml12 import YamlError, load_yaml

Values = dict[str, Any]
PREFIX = "sweep-"  # of the names of experiments, and of the files of a sweep
TABLE = f"reports/{PREFIX}{{}}.csv"
BEFORE_QUOTE = r"(\\*)('|\Z)"  # where a backslash of Hydra escapes: before a quote, and at the end
MEASURES = (
    "identity_gain", "identity_low", "identity_high", "prompt_gain", "prompt_low", "prompt_high", "pres_rise", "copies",
)  # fmt: skip
SEED = "train.seed"
ENOUGH_SEEDS = 3  # of each of two recipes; with fewer a lucky seed looks like a better recipe


@dataclass(frozen=True)
class Result:
    """What one experiment made of one subject."""

    experiment: str
    subject_id: str
    values: Mapping[str, Any]
    """Of the parameters that the sweep changes."""
    measures: Mapping[str, float]
    """By MEASURES, against the base model; what was not measured is missing."""
    train_seconds: float | None = None
    """None where the training was restored from the cache, which notes no time."""
    error: str = ""


@dataclass(frozen=True)
class Recipe:
    """Values that are trained with, and what was measured of each training: these differ in train.seed alone."""

    values: Mapping[str, Any]
    """Without train.seed."""
    runs: Mapping[Any, Result]
    """By train.seed; None where the sweep does not change it."""

    @property
    def first(self) -> Result:
        """The training that stands for the recipe: seeds are not chosen between, so it is that of the first seed."""
        return next(iter(self.runs.values()))

    @property
    def identity(self) -> float:
        """Mean gain over the seeds."""
        return statistics.fmean(one.measures["identity_gain"] for one in self.runs.values())

    @property
    def prompt(self) -> float | None:
        """Mean difference of the prompt fidelity over the seeds; None where one of them has none."""
        found = [one.measures["prompt_gain"] for one in self.runs.values() if "prompt_gain" in one.measures]
        return statistics.fmean(found) if len(found) == len(self.runs) else None

    def __str__(self) -> str:
        return in_words(self.values) or "params.yaml as it is"


@dataclass(frozen=True)
class Tried:
    """What the table of a sweep remembers of one experiment."""

    subjects: tuple[str, ...]
    parameters: tuple[str, ...]
    """Names of those that the sweep changes; their values stand in the experiment as they were, null and lists too."""
    error: str


def read_grid(settings: Sequence[str], content: Mapping[str, Any]) -> list[Values]:
    """Return every combination of values, the last parameter changing fastest.

    Args:
        settings: train.learning_rate=5e-5,1e-4 and so on, the values in YAML 1.2.
        content: params.yaml as plain values.

    Raises:
        ParamsError: with every parameter that there is not and every value that is refused.
    """
    faults: list[str] = []
    grid: dict[str, list[Any]] = {}
    for setting in settings:
        path, _, text = setting.partition("=")
        try:
            values = load_yaml(f"[{text}]")
        except YamlError as error:
            faults.append(f"-S {setting}: cannot be read: {error}")
            continue
        faults += _faults_of(path, values, path in grid)
        if values:  # else there is no combination, and no other fault would be found
            grid[path] = values
    if not settings:
        faults.append("-S: nothing is to be changed; write -S train.learning_rate=5e-5,1e-4")
    faults += _unknown(grid, content)
    combinations = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    faults += _refused(combinations, content)
    if faults:
        raise ParamsError(list(dict.fromkeys(faults)))
    return combinations


def name_of(subjects: Sequence[str], values: Mapping[str, Any], tree: str) -> str:
    """Name an experiment after all that it is made from: the same name is the same experiment.

    Args:
        subjects: that it trains.
        values: its parameters.
        tree: hash of the files of the project as git knows them.
    """
    return f"{PREFIX}{sha256_of({'subjects': list(subjects), 'values': dict(values), 'tree': tree})[:10]}"


def override_of(path: str, value: Any) -> str:
    """Write one parameter as `dvc exp run --set-param` reads it (the grammar of Hydra)."""
    return f"{path}={_hydra(value)}"


def labels(paths: Iterable[str], among: Iterable[str] = ()) -> list[str]:
    """Name parameters by the last part of their paths, and by the whole path where that part means several.

    Args:
        paths: of parameters, such as train.learning_rate.
        among: more of them, from which the names must be told apart.
    """
    named = list(paths)
    counted = Counter(path.rpartition(".")[2] for path in {*named, *among})
    return [path if counted[last] > 1 else last for path in named for last in [path.rpartition(".")[2]]]


def in_words(values: Mapping[str, Any]) -> str:
    """Say values by the names of `labels`: learning_rate 5e-05, max_train_steps 200."""
    return ", ".join(f"{label} {value}" for label, value in zip(labels(values), values.values(), strict=True))


def measures_of(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return what a sweep compares of metrics/<id>.json, without what was not measured."""
    found: dict[str, float] = {}
    for name in ("identity", "prompt"):
        for key in ("gain", "low", "high"):
            if name in metrics:
                found[f"{name}_{key}"] = metrics[name][key]
    if "prior" in metrics:
        found["pres_rise"] = metrics["prior"]["rise"]
    return found | {"copies": metrics["copying"]["rate"]}


def recipes_of(results: Iterable[Result]) -> list[Recipe]:
    """Put the trainings of one subject that differ in train.seed alone together; what was not measured is left out."""
    grouped: dict[str, list[Result]] = {}
    for one in results:
        if "identity_gain" in one.measures:
            grouped.setdefault(repr(_without_seed(one.values)), []).append(one)
    return [
        Recipe(_without_seed(alike[0].values), {one.values.get(SEED): one for one in alike})
        for alike in grouped.values()
    ]


def ranked(recipes: Iterable[Recipe], drop: float) -> list[Recipe]:
    """Return the recipes within `drop` of the best prompt fidelity, the most identity first, by means over seeds.

    One with fewer measured seeds than another takes no part: what failed would have counted. Where the prompt fidelity
    was not measured everywhere, the identity alone decides. Equals stay in their order.
    """
    every = list(recipes)
    most = max((len(one.runs) for one in every), default=0)
    whole = [one for one in every if len(one.runs) == most]
    prompts = [one.prompt for one in whole if one.prompt is not None]
    if prompts and len(prompts) == len(whole):
        least = max(prompts) - drop
        whole = [one for one, prompt in zip(whole, prompts, strict=True) if prompt >= least]
    return sorted(whole, key=lambda one: -one.identity)


def is_above(one: Recipe, other: Recipe) -> bool:
    """Tell whether one recipe gives more identity than another by more than chance.

    With one seed each their intervals over prompts must not overlap, which tells these two models apart. With several
    the seed is the unit, paired as noise and rows are: a 95 % t interval of the differences, over ENOUGH_SEEDS or more.
    """
    if len(one.runs) == 1:
        return one.first.measures["identity_low"] > other.first.measures["identity_high"]
    shared = [seed for seed in one.runs if seed in other.runs]
    if len(shared) < ENOUGH_SEEDS:
        return False
    gains = [[recipe.runs[seed].measures["identity_gain"] for seed in shared] for recipe in (one, other)]
    return _over_seeds([ours - theirs for ours, theirs in zip(*gains, strict=True)])[1] > 0


def certainty(ranking: Sequence[Recipe]) -> str:
    """Say whether the first recipe is told apart from those below it, and what would tell; empty where it is alone."""
    first, *others = ranking
    if not others:
        return ""
    count = len(first.runs)
    seeds = f"{count} seed{'s' if count > 1 else ''}"
    alike = [str(one) for one in others if not is_above(first, one)]
    found = f"not told apart from {' | '.join(alike)}" if alike else "told apart from the rest"
    if count >= ENOUGH_SEEDS:
        return f"{found} by {seeds}"
    kind = "" if alike else " as a model, not as a recipe"
    return f"{found}{kind}: {seeds}, and {ENOUGH_SEEDS} are needed, -S {SEED}=0,1,2"


def with_seeds(recipe: Recipe) -> str:
    """Say what a recipe made over its seeds: the mean identity, its t interval if there are two or more, the prompt."""
    gains = [one.measures["identity_gain"] for one in recipe.runs.values()]
    identity = in_interval(*_over_seeds(gains)) if len(gains) > 1 else f"{gains[0]:+.3f}"
    more = "" if recipe.prompt is None else f", prompt {recipe.prompt:+.3f}"
    return f"{recipe}: identity gain {identity}{more}; seeds {', '.join(str(seed) for seed in recipe.runs)}"


def csv_text(results: Sequence[Result]) -> str:
    """Write a line a result."""
    paths = list(results[0].values)
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["experiment", "subject", *paths, *MEASURES, "train_seconds", "error"])
    for one in results:
        seconds = "" if one.train_seconds is None else f"{one.train_seconds:.1f}"
        measures = [one.measures.get(name, "") for name in MEASURES]
        table.writerow([one.experiment, one.subject_id, *one.values.values(), *measures, seconds, one.error])
    return text.getvalue()


def table_path(root: Path, name: str) -> Path:
    """Return where the table of a sweep lies; its picture and its log have the same stem."""
    return root / TABLE.format(name)


def tables(root: Path) -> list[Path]:
    """Return the tables of all sweeps of a project."""
    return sorted(root.glob(TABLE.format("*")))


def rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a table, by the names of the columns; anybody can write into such a file."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def read_seconds(path: Path) -> dict[tuple[str, str], float]:
    """Return how long trainings took, by experiment and subject, from the table of an earlier call; empty without."""
    found = rows(path) if path.is_file() else []
    return {
        (row["experiment"], row["subject"]): float(row["train_seconds"]) for row in found if row.get("train_seconds")
    }


def read_tried(path: Path, experiment: str) -> Tried | None:
    """Return what the table of a sweep says of one experiment; None where it has no row of it."""
    found = [row for row in rows(path) if row.get("experiment") == experiment]
    if not found:
        return None
    columns = list(found[0])
    parameters = columns[columns.index("subject") + 1 : columns.index(MEASURES[0])]
    return Tried(tuple(row["subject"] for row in found), tuple(parameters), found[0].get("error") or "")


def is_about(path: Path, subject_id: str) -> bool:
    """Tell whether the table of a sweep has a row of this subject."""
    return any(row.get("subject") == subject_id for row in rows(path))


def picture_of(results: Sequence[Result]) -> bytes | None:
    """Plot identity gain against prompt difference, a labelled point a result: a PNG; None where neither is known."""
    import pandas as pd

    from dreambooth.curves import tradeoff_curve

    shown = [one for one in results if {"identity_gain", "prompt_gain"} <= one.measures.keys()]
    if not shown:
        return None
    several = len({one.subject_id for one in shown}) > 1
    points = pd.DataFrame({"label": [_label(one, several) for one in shown]})
    for name in ("identity", "prompt"):
        points[name] = [one.measures[f"{name}_gain"] for one in shown]
        points[f"{name}_error"] = [(one.measures[f"{name}_high"] - one.measures[f"{name}_low"]) / 2 for one in shown]
    names = ", ".join(labels(shown[0].values))
    subjects = ", ".join(dict.fromkeys(one.subject_id for one in shown))
    axes = ("prompt fidelity, difference from the base", "identity, gain over the base")
    return tradeoff_curve(points, *axes, title=f"{subjects}: {names}", in_order=False)


def _faults_of(path: str, values: list[Any], known: bool) -> Iterator[str]:
    if known:
        yield f"{path}: stands there twice; write all its values after one -S"
    if not values:
        yield f"{path}: has no value; write -S {path or 'train.learning_rate'}=VALUE,VALUE"
    texts = [repr(value) for value in values]
    yield from (f"{path}: {text} stands there twice" for text in dict.fromkeys(texts) if texts.count(text) > 1)
    yield from (f"{path}: should be a value, not a map (got {value})" for value in values if isinstance(value, dict))


def _unknown(grid: dict[str, list[Any]], content: Mapping[str, Any]) -> Iterator[str]:
    """Take the parameters that there are not out of a grid, and yield why."""
    for path in list(grid):
        try:
            with_values(content, {path: None})
        except ParamsError as error:
            del grid[path]
            yield from error.problems


def _refused(combinations: Iterable[Values], content: Mapping[str, Any]) -> Iterator[str]:
    """Yield every fault of every combination, as often as it is found."""
    for values in combinations:
        try:
            parse_params(with_values(content, values))
        except ParamsError as error:
            yield from (problem.removeprefix("params.yaml: ") for problem in error.problems)


def _hydra(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(_hydra, value))}]"
    if isinstance(value, str):
        return f"'{re.sub(BEFORE_QUOTE, _escaped, value)}'"
    return json.dumps(value)  # null, true, numbers


def _escaped(found: re.Match[str]) -> str:
    return 2 * found[1] + ("\\'" if found[2] else "")


def _without_seed(values: Mapping[str, Any]) -> Values:
    return {path: value for path, value in values.items() if path != SEED}


def _over_seeds(values: Sequence[float]) -> tuple[float, float, float]:
    """Return mean and bounds of the 95 % t interval of two values or more, one a seed."""
    import torch

    from dreambooth.fidelity import paired_interval

    return paired_interval(torch.tensor(values, dtype=torch.float64))[:3]


def _label(one: Result, several: bool) -> str:
    values = ", ".join(str(value) for value in one.values.values())
    return f"{one.subject_id}: {values}" if several else values
