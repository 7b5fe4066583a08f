"""`--distributed-executor-backend` of a single worker on a CPU, which lives in the engine core's process.

vLLM gives it a process of its own, because OpenMP's threads are bound to cores through environment variables,
which a process reads once. The two then hand each other every step, and while the worker computes, the engine
core looks again and again whether it is done, on a core that the worker needs.

Intel's runtime reads them when it is first used: here, in an engine core that was forked (`preloading`); in
one that vLLM has spawned, imports came first, and only the number of threads is set. Several workers stay in
processes of their own; see `waiting`.
"""

from __future__ import annotations

import torch
from vllm.utils.ompmultiprocessing import OMPProcessManager
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from galley_plugins import vllm_compat
from galley_plugins.worker import preloading


class CPUExecutor(UniProcExecutor):
    """vLLM's executor in one process, with its threads bound as those of a worker apart are."""

    def _init_executor(self) -> None:
        vllm_compat.check("executor-cpu")
        manager = OMPProcessManager(self.vllm_config)
        with manager.configure_omp_envs(rank=0, local_rank=0):
            if not preloading.forked() and not manager.skip_setup:
                torch.set_num_threads(len(manager.cpu_lists[0]))
            super()._init_executor()
