"""Train with several single-threaded processes that average their gradients or weights.

Threads meet at every operation: where other work shares the cores, all wait for the one that was put aside, thousands
of times a step. Processes meet once a step or less. On two quiet cores both ways are equally fast.
"""

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


@dataclass(frozen=True)
class Group:
    """The processes of one training."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes the files and the bar."""
        return self.rank == 0

    def part(self, batch_size: int) -> int:
        """Give this process's part of a batch.

        Raises:
            ValueError: The batch cannot be divided.
        """
        if batch_size % self.size:
            raise ValueError(f"a batch of {batch_size} cannot be shared by {self.size} processes")
        return batch_size // self.size

    def average(self, tensors: list[torch.Tensor]) -> None:
        """Replace tensors by their mean over the processes."""
        if self.size == 1:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        flat /= self.size
        parts = torch.split(flat, [tensor.numel() for tensor in tensors])
        torch._foreach_copy_(tensors, [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)])

    def agree(self, value: float) -> float:
        """Give everyone the value of the first process."""
        if self.size == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.float64)
        dist.broadcast(tensor, 0)
        return tensor.item()

    def wait(self) -> None:
        """Let every process come here before any goes on."""
        if self.size > 1:
            dist.barrier()


def _work(rank: int, size: int, meeting: str, work: Callable[[Group], None]) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
    work(Group(rank, size))
    dist.destroy_process_group()


def run(work: Callable[[Group], None], processes: int) -> None:
    """Run `work`, which can be pickled, in so many processes; in this one where it is 1."""
    if processes == 1:
        work(Group())
        return
    with tempfile.TemporaryDirectory() as folder:
        meeting = str(Path(folder) / "meeting")
        mp.spawn(_work, (processes, meeting, work), nprocs=processes)  # type: ignore[no-untyped-call, attr-defined]
