"""Checkpoints that are whole or not there: the newest valid one is found again, a torn one is put aside and named.

A checkpoint holds all that a step depends on besides its number: trainable weights, moments of the optimizer, gradient
scaler, accumulation, and the records so far. Randomness, order and learning rate follow from (seed, step).
"""

import errno
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from dreambooth.errors import TrainingError
from dreambooth.folders import (
    DiskFullError,
    TornFolderError,
    free_bytes,
    new_folder,
    read_manifest,
    require_space,
    write_file,
)
from dreambooth.memory import free_memory

WEIGHTS, MOMENTS, PLAIN, RECORDS = "weights.safetensors", "moments.safetensors", "plain.json", "records.json"
BEST = "best.json"
SHARD = 1 << 28  # bytes of a file at most, unless one tensor is larger: what is written without a copy of all
KEEP = 2  # the newest may be found torn by a dying disk; the one before it is the way back
MAY_CHANGE = ("device", "threads", "versions")  # between a stop and a resume: a warning, for the bits may differ then
_TORN = "torn-"
_SPARE = 1 << 28  # bytes of memory that a copy leaves for the rest
_MARGIN = 1 << 16  # bytes for the small files and the folder itself
_LOWEST_PRIORITY = 19


@dataclass(frozen=True)
class State:
    """A training after `step` optimizer steps; its tensors may be the training's own."""

    step: int
    weights: Mapping[str, Tensor]
    """Trainable weights by name, float32."""
    moments: Mapping[str, Tensor] = field(default_factory=dict)
    """Tensors of the optimizer, "<weight>/<name>"."""
    plain: Mapping[str, Any] = field(default_factory=dict)
    """Values of optimizer and scaler that are no tensors, and the parts of an accumulation."""
    records: Mapping[str, Any] = field(default_factory=dict)
    """Lists of the numbers so far."""

    @property
    def size(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.nbytes for tensor in [*self.weights.values(), *self.moments.values()])

    def copied(self, place: "State | None") -> "State":
        """Return it in the memory of the CPU, apart from what the next steps change.

        Args:
            place: an earlier copy, whose memory is taken again: to get and to clear new memory costs the training more
                than the copying; None for the first one.
        """
        earlier = place or State(self.step, {})
        return replace(
            self, weights=_apart(self.weights, earlier.weights), moments=_apart(self.moments, earlier.moments)
        )


class Checkpoints:
    """The checkpoints of one training.

    Args:
        folder: of this training alone.
        inputs: what the training depends on; a checkpoint of other inputs is refused with the difference.
        say: receives a line for each thing that people should know.
        resume_from: the checkpoint to continue with, wherever it lies; None: the newest valid one in `folder`.
    """

    def __init__(
        self,
        folder: Path,
        inputs: Mapping[str, Any],
        say: Callable[[str], object],
        resume_from: Path | None,
    ) -> None:
        self.folder, self.resume_from = folder, resume_from
        self._inputs = json.loads(json.dumps(inputs))
        self.changes: list[str] = []
        """What changed between a stop and a resume though the training went on."""
        self.say = say
        self._writer = ThreadPoolExecutor(1, "checkpoints", initializer=_step_back)
        self._written: Future[Path] | None = None
        self._copy: State | None = None
        """The newest copy; the next one takes its memory."""

    @property
    def size(self) -> int:
        """Bytes that they take on the disk."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())

    def begin_save(self, state: State, score: float | None = None) -> None:
        """Write a checkpoint beside the training, from a copy; `wait`, and the next call, raise what went wrong.

        Where the memory has no room for a copy, it is written before this returns.

        Args:
            state: the training's own (`trainer.capture`).
            score: makes it the best one; it is then kept until a better one comes.

        Raises:
            DiskFullError: no room, now or for the one before.
        """
        self.wait()
        self.require_space(state.size + _MARGIN, "a checkpoint")
        held = self._copy.size if self._copy else 0
        if state.size + _SPARE > (free := free_memory() + held):
            self._copy = None
            self.say(
                f"the training stands still for a checkpoint: a copy of {state.size / 1e9:.1f} GB to write beside it "
                f"does not fit into {free / 1e9:.1f} GB of free memory"
            )
            self._write(state, score)
        else:
            self._copy = state.copied(self._copy)
            self._written = self._writer.submit(self._write, self._copy, score)

    def finish(self) -> None:
        """Wait as `wait` does, and let the memory of the copy go: no other one comes."""
        self._copy = None
        self.wait()

    def wait(self) -> None:
        """Wait for the checkpoint that is being written; raise what went wrong with it."""
        if self._written is not None:
            written, self._written = self._written, None
            written.result()

    def newest(self) -> State | None:
        """Return the newest state whose files all verify; put torn ones aside, and name them.

        Raises:
            TornFolderError: the one that was asked for, `resume_from`, is torn.
            TrainingError: it is of another training.
        """
        if self.resume_from is not None:
            return self._continue_with(self.load(self.resume_from))
        for leftover in self.folder.glob(".*"):  # whoever wrote it was killed: one process trains a subject
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        for path in self._newest_first():
            try:
                state = self._continue_with(self.load(path))
                self._point_to(path, read_manifest(path, verify=False))  # had a stop come between the two
                return state
            except TornFolderError as error:
                self._put_aside(path, error)
        self._name_others()
        return None

    def load(self, path: Path) -> State:
        """Return the state in one folder.

        Raises:
            TornFolderError: a file is missing, or is not what the manifest says.
            TrainingError: it is of another training; with each difference.
        """
        manifest = read_manifest(path)
        self.changes = manifest["changes"] + self._compare(path, manifest["inputs"])
        return self._read(path, manifest)

    def load_step(self, step: int) -> State:
        """Return the state that another process of this training chose, by its step; see `load`."""
        return self.load(self.resume_from or self._path(step))

    def _read(self, path: Path, manifest: Mapping[str, Any]) -> State:
        return State(
            step=manifest["step"],
            weights=_load_sharded(path / WEIGHTS),
            moments=_load_sharded(path / MOMENTS),
            plain=json.loads((path / PLAIN).read_text(encoding="utf-8")),
            records=json.loads((path / RECORDS).read_text(encoding="utf-8")),
        )

    def best(self) -> State | None:
        """Return the best state; None when none was marked, or when it is torn: then it is put aside and named."""
        pointer = self._pointer()
        if not pointer:
            return None
        path = self.folder / pointer["checkpoint"]
        try:
            return self.load(path)
        except TornFolderError as error:
            self._put_aside(path, error)
            return None

    def remove(self) -> None:
        """Remove all of them: the training is done."""
        self.finish()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _put_aside(self, path: Path, error: TornFolderError) -> None:
        """Rename a torn checkpoint, so that nobody takes it for one, and name it."""
        if path.is_dir():
            aside = path.with_name(f"{_TORN}{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
        self.say(f"warning: a torn checkpoint was put aside: {error}")

    def _name_others(self) -> None:
        """Name the states of other trainings of the subject: a value that was changed by mistake costs all of them."""
        stem, _, key = self.folder.name.rpartition("-")
        for folder in sorted(self.folder.parent.glob(f"{stem}-{'?' * len(key)}")) if stem else ():
            with suppress(TornFolderError, ValueError):  # ValueError: it holds none
                newest = max(folder.glob("step-*"))
                saved = read_manifest(newest, verify=False)["inputs"]
                differing = ", ".join(name for name, _, _ in _differences(saved, self._inputs))
                self.say(
                    f"warning: begins anew: {newest} is of another training, which differs in {differing}; take these "
                    "values back to go on with that one"
                )

    def _continue_with(self, state: State) -> State:
        self.say(f"continues after step {state.step}")
        return state

    def _write(self, state: State, score: float | None) -> Path:
        """Write beside its place, rename, read back, point to it if it is the best, then remove the oldest."""
        path = self._path(state.step)
        try:
            with new_folder(path, self._about(state, score)) as temporary:
                _save_sharded(state.weights, temporary / WEIGHTS)
                _save_sharded(state.moments, temporary / MOMENTS)
                (temporary / PLAIN).write_text(json.dumps(state.plain), encoding="utf-8")
                (temporary / RECORDS).write_text(json.dumps(state.records), encoding="utf-8")
            self._point_to(path, read_manifest(path))
        except Exception as error:
            if _is_disk_full(error):
                raise self._disk_full(state) from error
            raise
        self._remove_others(path)
        return path

    def _remove_others(self, written: Path) -> None:
        """Keep the newest ones and the best; later ones are of a way that the training left by `resume_from`."""
        left = [path for path in self._newest_first() if path.name > written.name]
        if left:
            self.say(f"removed {', '.join(path.name for path in left)}: the training went back to before them")
        best = (self._pointer() or {}).get("checkpoint")
        if best in [path.name for path in left]:
            (self.folder / BEST).unlink()
        for path in left + [old for old in self._newest_first()[len(left) + KEEP :] if old.name != best]:
            shutil.rmtree(path, ignore_errors=True)

    def _about(self, state: State, score: float | None) -> dict[str, Any]:
        return {"step": state.step, "inputs": self._inputs, "changes": self.changes, "score": score}

    def _point_to(self, path: Path, manifest: Mapping[str, Any]) -> None:
        """Let `best` point to a checkpoint that was the best when it was written."""
        if manifest["score"] is not None:
            pointer = {"checkpoint": path.name, "step": manifest["step"], "score": manifest["score"]}
            write_file(self.folder / BEST, json.dumps(pointer).encode())

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:07d}"

    def _compare(self, path: Path, saved: Mapping[str, Any]) -> list[str]:
        """Refuse a checkpoint of other inputs; warn of other libraries, threads and device, and return these."""
        differences = {name: f"{name} was {was!r}, is {now!r}" for name, was, now in _differences(saved, self._inputs)}
        faults = [line for name, line in differences.items() if name.split(".")[0] not in MAY_CHANGE]
        if faults:
            raise TrainingError(
                f"{path} is of another training: {'; '.join(faults)}; take these values back, or start without it"
            )
        for line in differences.values():
            self.say(f"warning: {line}: what follows may differ in the last bits from a straight training")
        return list(differences.values())

    def require_space(self, needed: int, what: str) -> None:
        """Refuse what needs more bytes than are free where they lie."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        require_space(self.folder, needed, what)

    def _disk_full(self, state: State) -> DiskFullError:
        whole = next((path for path in self._newest_first() if _is_whole(path)), None)
        kept = f"{whole.name} is whole" if whole else "there is none before it"
        return DiskFullError(
            f"{self.folder}: no space left while a checkpoint was written: it needs {state.size + _MARGIN:,} bytes, "
            f"{free_bytes(self.folder):,} are free; {kept}; make room, or move .scratch to another disk and "
            "set DREAMBOOTH_SCRATCH to it, then run it again"
        )

    def _pointer(self) -> dict[str, Any] | None:
        try:
            pointer: dict[str, Any] = json.loads((self.folder / BEST).read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        return pointer

    def _newest_first(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"), reverse=True)


def named_weights(modules: Mapping[str, torch.nn.Module]) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield the trainable weights of several modules, each under "<module>.<weight>"."""
    for module_name, module in modules.items():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                yield f"{module_name}.{name}", parameter


@torch.no_grad()
def restore_weights(modules: Mapping[str, torch.nn.Module], weights: Mapping[str, Tensor]) -> None:
    """Copy saved weights into the modules, in place.

    Raises:
        TrainingError: the names or shapes are not those of the modules.
    """
    current = dict(named_weights(modules))
    strangers = sorted(set(current) ^ set(weights))
    if strangers:
        raise TrainingError(f"the checkpoint has other weights than the model: {', '.join(strangers[:3])} ...")
    for name, parameter in current.items():
        if parameter.shape != weights[name].shape:
            raise TrainingError(
                f"the checkpoint has {name} of {tuple(weights[name].shape)}, the model {tuple(parameter.shape)}"
            )
        parameter.copy_(weights[name])


def _save_sharded(tensors: Mapping[str, Tensor], first: Path) -> None:
    """Write tensors, wherever they are, to `first` and as many numbered files beside it as they fill."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > SHARD:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    for number, shard in enumerate(shards):
        path = first if number == 0 else first.with_stem(f"{first.stem}-{number}")
        safetensors.torch.save_file({name: _in_order_of_files(tensor) for name, tensor in shard.items()}, path)


def _load_sharded(first: Path) -> dict[str, Tensor]:
    """Read what `_save_sharded` wrote."""
    files = [first, *first.parent.glob(f"{first.stem}-*{first.suffix}")]
    return {name: tensor for path in files for name, tensor in safetensors.torch.load_file(path).items()}


def _in_order_of_files(tensor: Tensor) -> Tensor:
    """Return a tensor on the CPU, row after row, whatever its memory format is."""
    return tensor.detach().cpu().contiguous()


def _apart(tensors: Mapping[str, Tensor], places: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies on the CPU, row after row, that no step changes; in the places of those of the same kind."""
    copies = {}
    for name, tensor in tensors.items():
        place = places.get(name)
        if place is None or (place.shape, place.dtype) != (tensor.shape, tensor.dtype):
            place = torch.empty(tensor.shape, dtype=tensor.dtype)
        copies[name] = place.copy_(tensor.detach())
    return copies


def _differences(one: Mapping[str, Any], two: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield each leaf that differs: its dotted name, and both values."""
    for key in sorted(set(one) | set(two)):
        before, now = one.get(key), two.get(key)
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            yield from _differences(before, now, f"{path}{key}.")
        elif before != now:
            yield f"{path}{key}", before, now


def _step_back() -> None:
    """Give the thread that calls this the lowest priority: it works in the gaps that the training leaves."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)


def _is_whole(path: Path) -> bool:
    try:
        read_manifest(path)
    except TornFolderError:
        return False
    return True


def _is_disk_full(error: Exception) -> bool:
    """Whether an error says so; safetensors wraps it into one of its own, with the number in its text."""
    return getattr(error, "errno", None) == errno.ENOSPC or f"os error {errno.ENOSPC}" in str(error)
