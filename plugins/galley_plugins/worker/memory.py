"""Memory that a worker may use: the machine's, or less where a container's limit is lower."""

from __future__ import annotations

from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")  # version 2; inside a container this is the container's own group


def available_bytes(cgroup: Path = CGROUP) -> int:
    """Memory that is free now, in bytes."""
    machine = int(psutil.virtual_memory().available)
    limit, used = _number(cgroup / "memory.max"), _number(cgroup / "memory.current")
    if limit is None or used is None:
        return machine
    return max(0, min(machine, limit - used))


def _number(path: Path) -> int | None:
    """What a cgroup file says; None where there is no file or no limit ("max")."""
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
