"""Refuse a run whose outputs find no room, where earlier runs tell how large they are: docs/decisions/0106."""

import statistics
from collections import defaultdict
from pathlib import Path

from dreambooth.bases import LOCAL_MODELS
from dreambooth.folders import DiskFullError, free_bytes
from dreambooth.params import Params
from dreambooth.pointer import dvc_cache
from flows.graph import Graph, Stage

SAME_SIZE = frozenset(
    f"train.{name}"
    for name in (
        "learning_rate", "text_encoder_learning_rate", "lr_scheduler", "lr_warmup_steps", "max_train_steps", "seed",
        "train_batch_size", "gradient_accumulation_steps", "prior_loss_weight", "snr_gamma",
    )
)  # fmt: skip
"""Parameters that are often changed and change the size of no output; after a change of others a size is a guess."""
SIZING_FILES = (LOCAL_MODELS, "data/prompts")


def require_room(root: Path, every: Graph, graph: Graph) -> None:
    """Refuse a run that writes more bytes than are free where DVC keeps them, if earlier runs wrote so many.

    Each new output lies in the cache of DVC once, and there is at least so much to be written: in the project it
    replaces an older one, or is a link. Outputs whose size is a guess are not counted.

    Args:
        root: the project.
        every: all its stages.
        graph: those of the run.

    Raises:
        DiskFullError: with both numbers.
    """
    cache = dvc_cache(root)
    place = next(folder for folder in (cache, *cache.parents) if folder.is_dir())
    sizes = known_sizes(every, graph)
    needed, free = sum(sizes.values()), free_bytes(place)
    if needed > free:
        raise DiskFullError(
            f"{place}: the outputs of {len(sizes)} stages need {needed:,.0f} bytes, as earlier runs did, {free:,} are "
            "free; make room, or take a cache on another disk: dvc cache dir --local FOLDER; dvc repro looks at no room"
        )


def known_sizes(every: Graph, graph: Graph) -> dict[str, float]:
    """Return how many bytes stale stages will write, by name: as before, or as a stage of their kind with these values.

    Args:
        every: all stages of the project.
        graph: those of the run; one whose size is a guess is left out.
    """
    alike: dict[str, list[int]] = defaultdict(list)
    for stage in every.stages:
        if not stage.stale and stage.size:
            alike[stage.entry].append(stage.size)
    doubtful: set[str] = set()
    found: dict[str, float] = {}
    for stage in graph.stages:  # those above it came before
        if any(map(_may_change_sizes, stage.reasons)) or doubtful.intersection(stage.upstream):
            doubtful.add(stage.name)
        if stage.stale and not stage.is_data:
            found[stage.name] = _size(stage, stage.name in doubtful, alike[stage.entry])
    return {name: size for name, size in found.items() if size}


def _size(stage: Stage, is_doubtful: bool, alike: list[int]) -> float:
    if stage.size and not is_doubtful:
        return stage.size
    return statistics.median(alike) if alike else 0


def _may_change_sizes(reason: str) -> bool:
    """Tell whether an output may have another size for this reason; where a file is gone DVC may still have it."""
    what, _, how = reason.rpartition(" ")
    is_parameter = what.partition(".")[0] in Params.model_fields
    return how != "modified" or what in SIZING_FILES or (is_parameter and what not in SAME_SIZE)
