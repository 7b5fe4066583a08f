"""Processes that end with the one that started them, also when it was killed and could not say so."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with(parent_pid: int, with_signal: signal.Signals = signal.SIGKILL) -> None:
    """Have the kernel send this process `with_signal` when its parent ends; Linux only.

    Args:
        parent_pid: the parent that is expected to be alive; if it is gone already, this process exits.
    """
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(with_signal), 0, 0, 0)
    if os.getppid() != parent_pid:
        os._exit(1)
