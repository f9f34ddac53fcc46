"""Say what a run would take before it starts: time, space and cost of the stale stages, by rates that were measured.

A stage takes start + units x rate seconds, and a run some more before its first stage and after its last. What a flow
runs leaves its seconds in <scratch>/rates.jsonl; a plan takes the median of the newest for the same work on this
machine, else the defaults below.
"""

import json
import shutil
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table

from dreambooth.errors import EvaluationError
from dreambooth.folders import scratch_folder
from dreambooth.params import Evaluate, Params, Prior
from dreambooth.prompts import choose, load_templates
from dreambooth.schedule import max_train_steps
from flows.graph import GPU_ENTRIES, Graph, Stage
from flows.lanes import Lanes
from flows.preflight import remarks
from flows.summary import count_photos

RATES = "rates.jsonl"
NEWEST = 9  # measurements whose median counts
START = 12.0  # seconds: two cores, the imports of torch and diffusers, and DVC
# Seconds a unit at 64 pixels, measured on two CPU cores with the bundled model; at other sizes times the pixels. They
# are wrong by an order of magnitude for another model on another machine, which the plan says.
DEFAULT_SECONDS = {"prior": 0.6, "validate": 0.02, "train": 0.05, "evaluate": 0.6, "report": 1.0, "export": 3.0}
DEFAULT_BYTES = {"prior": 20e3, "validate": 15e3, "train": 30e6, "evaluate": 15e3, "report": 2e6, "export": 50e6}
AROUND = "start and registration"  # of a run: DVC's look at every stage, Prefect's server, MLflow, the last words
AROUND_SECONDS = 30.0  # two cores and a server of Prefect of its own; 54 for a first run beside other programs
PROMPTS = 25  # of Ruiz et al. 2022, where the user's own cannot be read
PER_UNIT = frozenset({"prior", "validate", "evaluate"})  # whose outputs grow with their units
DEFAULT_SIDE = 64
NO_ROOM = "there is not enough room: make some, or move the project"


@dataclass(frozen=True)
class Measurement:
    """How long one stage took, and for what work."""

    entry: str
    work: str
    """What the seconds of a unit depend on: base model, size, precision, method, guidance."""
    units: int
    seconds: float


@dataclass(frozen=True)
class Line:
    """All stale stages of one entry."""

    entry: str
    stages: int
    units: int
    seconds: float
    size: float
    measured: bool
    """Whether the time is from this machine, not from a default."""
    on_gpu: bool


@dataclass(frozen=True)
class Plan:
    """What a run would do."""

    lines: tuple[Line, ...]
    stages: int
    at_once: int
    """Stages that compute at a time."""
    free: int
    """Bytes where the project lies."""
    longest: float
    """Seconds of the longest row of stages that wait for one another."""
    around: Line
    """What a run takes beside its stages."""
    remarks: Sequence[str] = ()
    """What its parameters ask for in vain, and what will be worse than its user may think."""

    @property
    def seconds(self) -> float:
        """From start to end: stages that compute take turns, the others run beside them, each after those above it."""
        on_gpu = sum(line.seconds for line in self.lines if line.on_gpu) / self.at_once
        beside = sum(line.seconds for line in self.lines if not line.on_gpu)
        return max(on_gpu, beside, self.longest) + self.around.seconds

    @property
    def size(self) -> float:
        """Bytes that are written: each output lies in the project and in DVC's cache, where those are no links."""
        return 2 * sum(line.size for line in self.lines)

    def in_words(self, price: float | None, machines: int | None = None) -> list[str]:
        """Return the sums, and what they rest on.

        Args:
            price: of an hour of a machine; None counts no cost.
            machines: that are there from start to end; None for this one, however many stages compute on it at a time.
        """
        if not self.lines:
            return [f"Nothing would run: all {self.stages} stages are up to date."]
        room = f"{self.size / 1e9:.2f} GB of {self.free / 1e9:.1f} free"
        said = [f"{duration(self.seconds)} with {self.at_once} at a time, {room}"]
        if price is not None:
            cost, each = self.seconds / 3600 * (machines or 1) * price, " each" if machines else ""
            said.append(f"cost: {cost:.2f} at {price:g} an hour{each}")
        if guessed := [line.entry for line in (*self.lines, self.around) if not line.measured]:
            said.append(f"not measured here yet, so by defaults that may be wrong tenfold: {', '.join(guessed)}")
        said += self.remarks
        if self.size > self.free:
            said.append(NO_ROOM)
        return said


def note(root: Path, params: Params, runs: Iterable[tuple[str, float]], lanes: Lanes) -> None:
    """Keep how long stages took, for the next plan.

    Args:
        root: the project.
        params: they ran with.
        runs: stage and seconds of each that really ran.
        lanes: they ran in.
    """
    found = [
        Measurement(entry, work_of(entry, params, lanes), units_of(entry, key, params, root), seconds)
        for stage, seconds in runs
        for entry, _, key in [stage.partition("@")]
        if entry in DEFAULT_SECONDS
    ]
    _append(root, found)


def note_around(root: Path, graph: Graph, runs: Iterable[tuple[str, float]], seconds: float) -> None:
    """Keep how long a run of one subject took beside its stages: of several, some wait for a turn in between.

    Args:
        root: the project.
        graph: its stages before the run.
        runs: stage and seconds of each.
        seconds: of the whole run.
    """
    around = max(seconds - longest_row(graph, dict(runs)), 0.0)
    _append(root, [Measurement(AROUND, "", 1, around)])


def longest_row(graph: Graph, seconds: Mapping[str, float]) -> float:
    """Return how long stages take, by name, if each begins as soon as those above it have ended."""
    ends: dict[str, float] = {}
    for stage in graph.stages:  # in an order in which they can run
        begin = max((ends.get(name, 0.0) for name in stage.upstream), default=0.0)
        ends[stage.name] = begin + seconds.get(stage.name, 0.0)
    return max(ends.values(), default=0.0)


def read_measurements(root: Path) -> list[Measurement]:
    """Return what earlier runs took here, the oldest first; lines that a killed process left half are passed over."""
    path, found = scratch_folder(root) / RATES, []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            found.append(Measurement(**json.loads(line)))
        except (json.JSONDecodeError, TypeError):
            continue
    return found


def make_plan(root: Path, params: Params, graph: Graph, lanes: Lanes) -> Plan:
    """Return what the stale stages of a graph would take.

    Args:
        root: the project.
        params: its parameters.
        graph: its stages.
        lanes: how many stages may compute at a time.
    """
    known: dict[tuple[str, str], list[Measurement]] = defaultdict(list)
    for one in read_measurements(root):
        known[one.entry, one.work].append(one)
    by_entry: dict[str, list[Stage]] = defaultdict(list)
    for stage in graph.stale:
        if stage.entry in DEFAULT_SECONDS:
            by_entry[stage.entry].append(stage)
    sizes, lines = _sizes(graph), []
    seconds: dict[str, float] = {}
    for entry, stages in by_entry.items():
        measured = known[entry, work_of(entry, params, lanes)]
        units = [units_of(entry, stage.key, params, root) for stage in stages]
        default = DEFAULT_SECONDS[entry] * (_pixels(params) if entry in GPU_ENTRIES else 1)
        spent = [seconds_of(count, measured, default) for count in units]
        seconds |= {stage.name: one for stage, one in zip(stages, spent, strict=True)}
        size = [
            stage.size or sizes.get(entry) or _default_size(entry, count, _pixels(params))
            for stage, count in zip(stages, units, strict=True)
        ]
        on_gpu = entry in GPU_ENTRIES
        lines.append(Line(entry, len(stages), sum(units), sum(spent), sum(size), bool(measured), on_gpu))
    return Plan(
        tuple(lines),
        len(graph.stages),
        lanes.count,
        shutil.disk_usage(root).free,
        longest_row(graph, seconds),
        _around(known[AROUND, ""]),
        [*(params.idle if "train" in by_entry else ()), *remarks(root, params, graph), *_by_code(graph)],
    )


def seconds_of(units: int, measurements: Sequence[Measurement], default: float) -> float:
    """Return how long so many units take: start + units x rate, the rate the median of the newest measurements."""
    rates = [max(one.seconds - START, 0.1 * one.seconds) / max(one.units, 1) for one in measurements[-NEWEST:]]
    start = min([START, *(one.seconds for one in measurements[-NEWEST:])])
    return start + units * (statistics.median(rates) if rates else default)


def units_of(entry: str, key: str, params: Params, root: Path) -> int:
    """Return how many pieces of work a stage has: pictures, photos, rows of training; 1 where it is one piece."""
    if entry == "prior":
        return params.prior.num_class_images if params.prior.kind == "images" else 1
    if entry == "validate":
        return count_photos(root, key)
    if entry == "train":
        train = params.train
        rows = train.train_batch_size * (2 if params.has_prior else 1) * train.gradient_accumulation_steps
        return max_train_steps(train, count_photos(root, key)) * rows
    if entry == "evaluate":
        try:
            count = len(choose(load_templates(root / params.prompts_file(key)), params.evaluate.max_prompts))
        except EvaluationError:  # which the plan says, and the stage will
            count = params.evaluate.max_prompts or PROMPTS
        return 2 * (count * len(params.evaluate.seeds) + params.evaluate.num_class_images)
    return 1


def work_of(entry: str, params: Params, lanes: Lanes) -> str:
    """Return what the seconds of a unit depend on."""
    base = params.base
    about = [base.pretrained_model_name_or_path, str(base.resolution)]
    if entry in lanes.threads:
        about.append(f"{lanes.threads[entry]} threads")
    if entry == "train":
        train = params.train
        about += [train.method, train.mixed_precision, str(train.train_text_encoder), str(train.gradient_checkpointing)]
    elif entry == "prior":
        about += [params.prior.kind, *_sampling(base.inference_dtype, params.prior)]
    elif entry == "evaluate":
        about += [*_sampling(base.inference_dtype, params.evaluate), params.evaluate.encoders]
    return " ".join(about)


def _sampling(dtype: str, section: Prior | Evaluate) -> list[str]:
    """Say what the time of a picture depends on: with guidance the model sees each row twice, at 1 once."""
    return [dtype, str(section.num_inference_steps), "unguided" if section.guidance_scale == 1 else "guided"]


def plan_table(plan: Plan) -> Table:
    """Draw a line for each entry that would run."""
    table = Table("stage", "runs", "units", "time", "space", "by", box=None, pad_edge=False)
    for line in plan.lines:
        how = "measured here" if line.measured else "default"
        size = f"{line.size / 1e6:.1f} MB"
        table.add_row(line.entry, str(line.stages), str(line.units), duration(line.seconds), size, how)
    if plan.lines:
        how = "measured here" if plan.around.measured else "default"
        table.add_row(AROUND, "", "", duration(plan.around.seconds), "", how)
    return table


def duration(seconds: float) -> str:
    """Say a length of time: 45 s, 12 min, 3.5 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _by_code(graph: Graph) -> Iterator[str]:
    """Name the way around the work that nothing but an upgrade asks for."""
    if count := sum(stage.is_changed_by_code for stage in graph.stale):
        yield f"{count} stages are out of date by this program's code alone; to keep what they made: dreambooth accept"


def _around(measurements: Sequence[Measurement]) -> Line:
    seconds = [one.seconds for one in measurements[-NEWEST:]]
    return Line(AROUND, 1, 1, statistics.median(seconds or [AROUND_SECONDS]), 0.0, bool(seconds), on_gpu=False)


def _pixels(params: Params) -> float:
    return float((params.base.resolution / DEFAULT_SIDE) ** 2)


def _append(root: Path, found: Iterable[Measurement]) -> None:
    with (scratch_folder(root) / RATES).open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(one)) + "\n" for one in found)


def _sizes(graph: Graph) -> dict[str, float]:
    """Return how large the outputs of each entry are where they were made."""
    known: dict[str, list[int]] = defaultdict(list)
    for stage in graph.stages:
        if stage.size:
            known[stage.entry].append(stage.size)
    return {entry: statistics.median(sizes) for entry, sizes in known.items()}


def _default_size(entry: str, units: int, pixels: float) -> float:
    return DEFAULT_BYTES[entry] * (units * pixels if entry in PER_UNIT else 1)
