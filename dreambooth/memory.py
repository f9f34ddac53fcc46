"""How much memory a process may still take."""

from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")
"""Of this container, as version 2 shows it to a process inside."""


def free_memory(cgroup: Path = CGROUP) -> int:
    """Return bytes: what the machine has left, and no more than the limit of a container leaves."""
    free = int(psutil.virtual_memory().available)
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        used = int((cgroup / "memory.current").read_text())
        told = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return free
    if limit == "max":
        return free
    return max(0, min(free, int(limit) - used + int(told.get("inactive_file", 0))))  # files that it may drop
