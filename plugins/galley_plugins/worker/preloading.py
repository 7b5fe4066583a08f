"""Processes of an engine by fork from one that has imported everything: one import of vLLM in place of three.

On a CPU vLLM spawns its engine core, which spawns its workers: fresh interpreters, each of which imports
torch, transformers and vLLM before it does anything. Here a fork server imports them while the API server
does, and both are forked from it, as `multiprocessing` forks them. What it imports must start no thread and
not compute with OpenMP, since no thread survives a fork.

Each process gets the environment and the cores of the one that starts it, as a spawned one would: vLLM binds
the threads of a worker to cores through both, and the OpenMP runtime binds the fork server to one of them. It
ends with the fork server, and so with the API server.
"""

from __future__ import annotations

import os
import sys
from multiprocessing import context, forkserver, resource_tracker

from galley_plugins import vllm_compat
from galley_plugins.processes import die_with

VARIABLE = "GALLEY_PRELOAD"
"""Set to 1 where the API server is to start the fork server; see `worker_environment`."""

_PRELOADED = "galley_plugins.worker.preloaded"


class _Process(context.ForkServerProcess):
    """Takes its starter's environment and cores along."""

    _environment: dict[str, str]
    _cores: set[int]

    def start(self) -> None:
        self._environment, self._cores = dict(os.environ), os.sched_getaffinity(0)
        super().start()

    def run(self) -> None:
        die_with(os.getppid())
        os.environ.clear()
        os.environ.update(self._environment)
        os.sched_setaffinity(0, self._cores)
        server = forkserver._forkserver
        server.ensure_running = resource_tracker.ensure_running  # type: ignore[method-assign]  # it forked this one
        super().run()


class PreloadedContext(context.ForkServerContext):
    """A context of `multiprocessing` whose processes the fork server forks."""

    Process = _Process


def start() -> None:
    """Start the fork server, which imports in the background; see `adopt` for what comes from it."""
    forkserver.set_forkserver_preload([_PRELOADED])
    forkserver.ensure_running()


def forked() -> bool:
    """Whether this process came from the fork server."""
    return forkserver.get_inherited_fds() is not None


def adopt() -> None:
    """In a process that has vLLM: have its further processes forked by our fork server, if there is one."""
    server = forkserver._forkserver
    ours = _PRELOADED in sys.modules or _PRELOADED in server._preload_modules  # type: ignore[attr-defined]
    if not ours or server._forkserver_address is None:  # type: ignore[attr-defined]
        return
    vllm_compat.check("preloading")
    from vllm.v1.engine import utils as engine
    from vllm.v1.executor import multiproc_executor as executor

    made = PreloadedContext()
    engine.get_mp_context = executor.get_mp_context = lambda: made
