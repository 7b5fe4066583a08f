"""On a CPU, an engine core that waits for its workers leaves the cores to them.

vLLM's processes hand each other a step through shared memory, and who waits for it looks again and again for
a second, giving way between looks only to what the kernel would run next there. On a GPU's machine that takes
a core that has nothing else to do. On a CPU it takes one from the threads that compute the step, and all of
them wait for the slowest at the end of each product. So here the time between looks grows with the wait.
Workers look as before: their wait is short, and meanwhile their cores have nothing to do.
"""

from __future__ import annotations

import functools
import multiprocessing
import time
from typing import Any

from galley_plugins import vllm_compat

SHARE = 0.01  # of the wait so far, until the next look
LEAST_SECONDS, MOST_SECONDS = 2e-5, 5e-4
WORKER = "VllmWorker"  # how vLLM begins the names of its workers' processes


def pause(waited: float) -> float:
    """Seconds until the next look, by those waited so far."""
    return min(max(SHARE * waited, LEAST_SECONDS), MOST_SECONDS)


def register() -> None:
    """Have this process wait so for other processes' steps, unless it is a worker; further calls do nothing.

    Raises:
        IncompatibleVllmError: this vLLM waits otherwise.
    """
    if multiprocessing.current_process().name.startswith(WORKER):
        return
    vllm_compat.check("waiting")
    from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

    spin = SpinCondition.wait
    if getattr(spin, "patient", False):
        return

    @functools.wraps(spin)
    def wait(self: Any, timeout_ms: int | None = None) -> None:
        waited = time.monotonic() - self.last_read
        if waited <= self.busy_loop_s:
            time.sleep(pause(waited))
        else:  # idle: a message wakes it
            spin(self, timeout_ms)

    wait.patient = True  # type: ignore[attr-defined]
    SpinCondition.wait = wait
