"""`--distributed-executor-backend` of a single worker on a CPU, which lives in the engine core's process.

vLLM gives it a process of its own, because OpenMP's threads are bound to cores through environment variables,
which a process reads once. The two then hand each other every step, and while the worker computes, the engine
core looks again and again whether it is done, on a core that the worker needs.

Here threads are bound by themselves, in a parallel region of their runtime, whatever has used it before.
Several workers stay in processes of their own; see `waiting`.
"""

from __future__ import annotations

import ctypes
import logging
import os
from typing import TYPE_CHECKING

import torch
from vllm.utils.ompmultiprocessing import OMPProcessManager
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from galley_plugins import vllm_compat

if TYPE_CHECKING:
    from collections.abc import Sequence

logger = logging.getLogger(__name__)


class CPUExecutor(UniProcExecutor):
    """vLLM's executor in one process, with its threads bound as those of a worker apart are."""

    def _init_executor(self) -> None:
        vllm_compat.check("executor-cpu")
        manager = OMPProcessManager(self.vllm_config)
        with manager.configure_omp_envs(rank=0, local_rank=0):
            if not manager.skip_setup:
                bind_threads(manager.cpu_lists[0])
            super()._init_executor()


def bind_threads(cores: Sequence[int]) -> None:
    """From now on, parallel regions of the calling thread have so many threads, each bound to its core.

    Where the system or the runtime does not let them, threads stay where they were, which the log says.
    """
    torch.set_num_threads(len(cores))
    runtime = ctypes.CDLL(None)
    problems: list[Exception] = []

    def bind(_: int | None) -> None:
        try:
            os.sched_setaffinity(0, {cores[runtime.omp_get_thread_num()]})  # of this thread alone
        except (OSError, IndexError) as error:
            problems.append(error)

    try:
        region = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(bind)
        runtime.GOMP_parallel(region, None, len(cores), 0)  # also Intel's and LLVM's runtimes have it
    except AttributeError as error:
        problems.append(error)
    if problems:
        logger.warning("threads could not be bound to cores %s: %s", list(cores), problems[0])
