"""What this system lets processes decide about the cores that they run on."""

from __future__ import annotations

import subprocess
import sys

import pytest

_PROGRAM = """
import os
core = min(os.sched_getaffinity(0))
os.sched_setaffinity(0, {core})
assert os.sched_getaffinity(0) == {core}
"""


def processes_bind() -> bool:
    """Whether a process can bind itself to a core."""
    ran = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, timeout=60, check=False)
    return ran.returncode == 0


needs_binding = pytest.mark.skipif(not processes_bind(), reason="processes may not choose their cores here")
