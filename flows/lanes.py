"""How many stages may compute at a time on this machine, and with how many threads: docs/decisions/0099.

A stage on a GPU has it alone. Without a GPU a stage imports and loads on one core, and twice the threads do not halve
a step: subjects side by side, each with its share of the cores, are done sooner than one after the other.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from dreambooth.errors import PipelineError
from dreambooth.hardware import has_gpu
from dreambooth.memory import free_memory
from dreambooth.params import Params
from flows.graph import GPU_ENTRIES, Graph

VARIABLE = "DREAMBOOTH_AT_ONCE"
MOST = 16  # lanes of one run
BYTES_OF_LIBRARIES = 1_500_000_000
PER_BYTE_OF_BASE = 10  # float32 weights, gradients and moments of a model in float16, and room for activations


@dataclass(frozen=True)
class Lanes:
    """What a stage that computes gets of the machine."""

    count: int = 1
    """Stages at a time."""
    threads: Mapping[str, int] = field(default_factory=dict)
    """Of a stage, by its entry; one that is not named here has all cores."""


def lanes_of(root: Path, params: Params, graph: Graph) -> Lanes:
    """Return the lanes for the stale stages of a graph: no more than have work, cores and memory.

    Raises:
        PipelineError: DREAMBOOTH_AT_ONCE is no number from 1.
    """
    wanted = _wanted()
    if wanted is None and has_gpu():
        return Lanes()
    cores = _cores()
    count = max(1, min(_chains(graph), MOST, wanted or min(cores, _by_memory(root, params))))
    return Lanes(count, dict(_shares(graph, cores, count))) if count > 1 else Lanes()


def _shares(graph: Graph, cores: int, lanes: int) -> Iterator[tuple[str, int]]:
    """Share the cores between the stages of an entry: class images are drawn by few stages, with more cores each."""
    for entry in sorted(GPU_ENTRIES):
        beside = min(lanes, sum(stage.entry == entry for stage in graph.stale))
        if beside > 1:
            yield entry, max(1, cores // beside)


def one_gpu(count: int) -> str:
    """Say what so many stages at a time take, where there are GPUs: one process uses only its first GPU."""
    return (
        f"{count} stages at a time on {count} GPUs are {count} workers, each with a CUDA_VISIBLE_DEVICES of its own "
        '(docs/operations.md, "One slot a GPU"); the stages of one process all compute on its first GPU'
    )


def _wanted() -> int | None:
    given = os.environ.get(VARIABLE)
    if given is None:
        return None
    if not given.isdecimal() or int(given) < 1:
        raise PipelineError(f"{VARIABLE}: is {given!r}, should be a number from 1: how many stages compute at a time")
    return int(given)


def _cores() -> int:
    """Count the cores this process may use; two threads of one core share its arithmetic."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(usable, psutil.cpu_count(logical=False) or usable)


def _chains(graph: Graph) -> int:
    """Count what can be computed side by side: subjects, or classes where only class images are drawn."""
    stale = [stage for stage in graph.stale if stage.entry in GPU_ENTRIES]
    return max(len({stage.key for stage in stale if stage.is_prior is prior}) for prior in (True, False))


def _by_memory(root: Path, params: Params) -> int:
    """Count how many models of this size fit; a base from the hub is large, and is trained alone."""
    folder = root / params.base.pretrained_model_name_or_path
    if not folder.is_dir():
        return 1
    need = BYTES_OF_LIBRARIES + PER_BYTE_OF_BASE * _size((*folder.rglob("*.safetensors"), *folder.rglob("*.bin")))
    return free_memory() // need


def _size(files: Sequence[Path]) -> int:
    return sum(path.stat().st_size for path in files)
