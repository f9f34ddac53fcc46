"""Processes that average their gradients."""

import functools
from pathlib import Path

import pytest
import torch

from base import parallel
from base.parallel import Group


def record(group: Group, folder: Path) -> None:
    """Average tensors that are the rank, and agree on a number that differs by the rank."""
    one, two = torch.full((2, 2), float(group.rank)), torch.full((1,), 3.0)
    group.average([one, two])
    group.wait()
    (folder / str(group.rank)).write_text(f"{one.tolist()} {two.tolist()} {group.agree(7.0 + group.rank)}")


def test_processes_share_mean_tensors_and_the_first_ones_number(tmp_path: Path) -> None:
    parallel.run(functools.partial(record, folder=tmp_path), 2)
    assert [(tmp_path / str(rank)).read_text() for rank in (0, 1)] == ["[[0.5, 0.5], [0.5, 0.5]] [3.0] 7.0"] * 2


def test_one_process_is_no_group(tmp_path: Path) -> None:
    parallel.run(functools.partial(record, folder=tmp_path), 1)
    assert (tmp_path / "0").read_text() == "[[0.0, 0.0], [0.0, 0.0]] [3.0] 7.0"


def test_batch_that_cannot_be_shared_is_refused() -> None:
    with pytest.raises(ValueError, match="a batch of 5 cannot be shared by 2 processes"):
        Group(0, 2).part(5)
