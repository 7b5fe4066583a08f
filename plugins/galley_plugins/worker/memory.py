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
    return max(0, min(machine, limit - used + _reclaimable_bytes(cgroup)))


def _reclaimable_bytes(cgroup: Path) -> int:
    """Cached file pages that the kernel gives back when memory is needed; they count as used."""
    try:
        lines = (cgroup / "memory.stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))


def _number(path: Path) -> int | None:
    """What a cgroup file says; None where there is no file or no limit ("max")."""
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
