"""Free memory: of the machine, and of the container where that leaves less."""

from pathlib import Path

import psutil
import pytest

from dreambooth.memory import free_memory

MEGABYTE = 1 << 20


def container(folder: Path, limit: str, used: int, droppable: int) -> Path:
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon {used - droppable}\ninactive_file {droppable}\n")
    return folder


def test_a_container_has_what_its_limit_leaves_and_what_it_may_drop(tmp_path: Path) -> None:
    assert free_memory(container(tmp_path, str(50 * MEGABYTE), 40 * MEGABYTE, 5 * MEGABYTE)) == 15 * MEGABYTE
    assert free_memory(container(tmp_path, str(50 * MEGABYTE), 60 * MEGABYTE, 0)) == 0


@pytest.mark.parametrize("limit", ["max", str(1 << 60), None])
def test_without_a_limit_it_is_what_the_machine_has(tmp_path: Path, limit: str | None) -> None:
    folder = container(tmp_path, limit, 40 * MEGABYTE, 0) if limit else tmp_path / "none"
    available = psutil.virtual_memory().available
    assert free_memory(folder) == pytest.approx(available, rel=0.2)
