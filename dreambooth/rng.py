"""Randomness as a function: every number follows from (seed, purpose, counters), never from what was drawn before.

So a resumed training draws what the straight one would have, and neither the number of processes, nor gradient
accumulation, nor a sample drawn in between changes a single bit. B rows.
"""

import hashlib
from collections.abc import Sequence

import torch


def derive_seed(seed: int, purpose: str, *counters: int) -> int:
    """Return 63 bits for one purpose and place: sha256 of "seed/purpose/counter/...", so that no two places meet."""
    text = "/".join((str(seed), purpose, *map(str, counters)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, purpose: str, *counters: int) -> torch.Generator:
    """Return a CPU generator for one purpose and place."""
    return torch.Generator("cpu").manual_seed(derive_seed(seed, purpose, *counters))


def normal(shape: Sequence[int], seed: int, purpose: str, step: int, rows: Sequence[int]) -> torch.Tensor:
    """Return (B, *shape) of standard normal float32, each row from its own generator, on the CPU."""
    return torch.stack([torch.randn(tuple(shape), generator=generator(seed, purpose, step, row)) for row in rows])


def integers(high: int, seed: int, purpose: str, step: int, rows: Sequence[int]) -> torch.Tensor:
    """Return (B,) int64, uniform in [0, high), each row from its own generator, on the CPU."""
    draws = [torch.randint(high, (1,), generator=generator(seed, purpose, step, row)) for row in rows]
    return torch.cat(draws)


def permutation(n: int, seed: int, purpose: str, epoch: int) -> list[int]:
    """Return 0..n-1 in the random order of one epoch."""
    order: list[int] = torch.randperm(n, generator=generator(seed, purpose, epoch)).tolist()
    return order
