"""Triton's kernels on a CPU."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def interpreting() -> Iterator[Callable[..., Any]]:
    """Calls a function in a process of its own, where Triton's kernels run in its interpreter on the CPU.

    Triton reads the switch when it is imported, and other tests import it.
    """
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        pool.submit(os.getpid).result(120)  # the process has its environment now
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before
        yield lambda function, *given, **named: pool.submit(function, *given, **named).result(240)
