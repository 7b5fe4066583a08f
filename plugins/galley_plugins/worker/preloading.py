"""Processes of an engine by fork from one that has imported everything: one import of vLLM for all.

On a CPU vLLM spawns its engine core, which spawns its workers where there are several: fresh interpreters,
each of which imports torch, transformers and vLLM before it does anything. Here the API server imports for
all of them, then forks a fork server, from which they are forked as `multiprocessing` forks them. What is
imported must start no thread and not compute with OpenMP, since no thread survives a fork.

Each process gets the environment and the cores of the one that starts it, as a spawned one would: vLLM binds
the threads of a worker to cores through both, and the OpenMP runtime binds the fork server to one of them. It
ends with the fork server, and so with the API server.
"""

from __future__ import annotations

import importlib
import os
import socket
import sys
import threading
from multiprocessing import context, forkserver, resource_tracker, util
from typing import Any

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
    """Import what processes of an engine import, then fork the server that forks them; see `adopt`.

    Where an import has started a thread after all, there is none, and vLLM starts its processes itself.
    """
    importlib.import_module(_PRELOADED)
    if threading.active_count() > 1:
        return
    resource_tracker.ensure_running()
    server: Any = forkserver._forkserver
    with socket.socket(socket.AF_UNIX) as listener:
        address = f"{util.get_temp_dir()}/forkserver"
        listener.bind(address)
        listener.listen()
        alive, ours = os.pipe()  # the fork server ends when nobody has the second end any more
        parent = os.getpid()
        pid = os.fork()
        if not pid:
            try:
                os.close(ours)
                _serve(listener.fileno(), alive, parent)
            finally:
                os._exit(0)
        os.close(alive)
    server._forkserver_address, server._forkserver_alive_fd, server._forkserver_pid = address, ours, pid


def _serve(listener: int, alive: int, parent: int) -> None:
    from vllm.utils.system_utils import set_process_title

    die_with(parent)  # the API server; what was forked from here goes with it
    set_process_title("ForkServer")  # also where its processes will have theirs, which is found only once
    forkserver.main(listener, alive, [])


def forked() -> bool:
    """Whether this process came from the fork server."""
    return forkserver.get_inherited_fds() is not None


def adopt() -> None:
    """In a process that has vLLM: have its further processes forked by our fork server, if there is one."""
    server = forkserver._forkserver
    if _PRELOADED not in sys.modules or server._forkserver_address is None:  # type: ignore[attr-defined]
        return
    vllm_compat.check("preloading")
    from vllm.v1.engine import utils as engine
    from vllm.v1.executor import multiproc_executor as executor

    made = PreloadedContext()
    engine.get_mp_context = executor.get_mp_context = lambda: made
