"""Checkpoints that are whole or not there: the newest valid one is found again, a torn one is put aside and named.

A checkpoint holds all that a step depends on besides its number: trainable weights, optimizer, gradient scaler, and the
records so far. Randomness and order follow from the step (`rng`, `dataset`), and the learning rate does too.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from dreambooth.errors import TrainingError
from dreambooth.folders import TornFolderError, new_folder, read_manifest, require_space

WEIGHTS, OPTIMIZER, RECORDS = "weights.safetensors", "optimizer.pt", "records.json"
BYTES_PER_WEIGHT = 12  # the weight and both moments of Adam in float32
KEEP = 2  # the newest may be found torn by a dying disk; the one before it is the way back
_TORN = "torn-"


@dataclass(frozen=True)
class State:
    """A training after `step` optimizer steps."""

    step: int
    weights: Mapping[str, Tensor]
    """Trainable weights by name, float32."""
    optimizer: Mapping[str, Any]
    """State dicts of the optimizer and of the gradient scaler: tensors and plain values."""
    records: list[dict[str, Any]] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Bytes of its tensors."""
        moments = self.optimizer.get("optimizer", {}).get("state", {})
        held = [value for entry in moments.values() for value in entry.values() if isinstance(value, Tensor)]
        return sum(tensor.nbytes for tensor in [*self.weights.values(), *held])


class Checkpoints:
    """The checkpoints of one training.

    Args:
        folder: of this training alone: its name holds the fingerprint of everything the training depends on, so that
            a state is never continued with other parameters or photos.
        say: receives a line for each thing that people should know.
    """

    def __init__(self, folder: Path, say: Callable[[str], object] = lambda line: None) -> None:
        self.folder = folder
        self._say = say

    def save(self, state: State) -> Path:
        """Write a checkpoint beside its place, rename it, read it back, then remove the oldest ones."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        require_space(self.folder, state.size, "a checkpoint")
        path = self.folder / f"step-{state.step:07d}"
        with new_folder(path, {"step": state.step}) as temporary:
            safetensors.torch.save_file(dict(state.weights), temporary / WEIGHTS)
            torch.save(dict(state.optimizer), temporary / OPTIMIZER)
            (temporary / RECORDS).write_text(json.dumps(state.records), encoding="utf-8")
        read_manifest(path)
        for old in self._newest_first()[KEEP:]:
            shutil.rmtree(old, ignore_errors=True)
        return path

    def newest(self) -> State | None:
        """Return the newest state whose files all verify; put torn ones aside, and name them."""
        for path in self._newest_first():
            try:
                state = self.load(path)
            except TornFolderError as error:
                aside = path.with_name(f"{_TORN}{path.name}")
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
                self._say(f"warning: a torn checkpoint was put aside: {error}")
            else:
                self._say(f"continues after step {state.step}")
                return state
        return None

    def load(self, path: Path) -> State:
        """Return the state in one folder.

        Raises:
            TornFolderError: a file is missing, or is not what the manifest says.
        """
        manifest = read_manifest(path)
        return State(
            step=manifest["step"],
            weights=safetensors.torch.load_file(path / WEIGHTS),
            optimizer=torch.load(path / OPTIMIZER, map_location="cpu", weights_only=True),
            records=json.loads((path / RECORDS).read_text(encoding="utf-8")),
        )

    def remove(self) -> None:
        """Remove all of them: the training is done."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _newest_first(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"), reverse=True) if self.folder.is_dir() else []


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
