"""Threads are bound to cores where a stage is alone on the machine, and nowhere else: real processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_project import REPOSITORY

from dreambooth import cores

LOOK = """
import os, sys
{before}
import stages
import torch
torch.randn(300, 300) @ torch.randn(300, 300)
bound = len(os.sched_getaffinity(0))
from dreambooth import cores
cores.unbind()
print(os.environ.get("OMP_PROC_BIND"), bound, len(os.sched_getaffinity(0)))
"""
AS_A_PROGRAM = 'sys.argv[0] = "-m"'  # what Python says while it looks for the module of -m
ALL = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(ALL < 2, reason="needs two cores, and a system that tells which a thread may use"),
]


def look(before: str, **environment: str) -> list[str]:
    """Return how threads are bound, on how many cores the first one may run, and on how many after `unbind`."""
    kept = {name: value for name, value in os.environ.items() if name not in cores.DECIDED}
    own = {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPOSITORY), **environment}
    program = [sys.executable, "-c", LOOK.format(before=before)]
    return subprocess.run(program, env=kept | own, capture_output=True, text=True, check=True).stdout.split()


def test_a_stage_that_is_alone_binds_its_threads_and_can_let_a_thread_go() -> None:
    assert look(AS_A_PROGRAM) == ["close", "1", str(ALL)]


@pytest.mark.parametrize(
    ("before", "environment"),
    [("", {}), (AS_A_PROGRAM, {"OMP_NUM_THREADS": "1"}), (f"import torch\n{AS_A_PROGRAM}", {})],
    ids=["imported", "a share of the cores", "torch was there"],
)
def test_whoever_shares_the_machine_or_comes_late_is_not_bound(before: str, environment: dict[str, str]) -> None:
    assert look(before, **environment) == ["None", str(ALL), str(ALL)]


def test_beside_a_gpu_nothing_is_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "DRIVERS", (str(tmp_path),))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert cores.has_gpu()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert not cores.has_gpu()
