"""Prepare a worker, then become vLLM's server: same process, new program, libraries preloaded."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

from galley_plugins import progress
from galley_plugins.embedding.adapter import AdapterError, check_adapter
from galley_plugins.memory.served import UnsuitableMemoryError, check_memories
from galley_plugins.models import ModelError, resolve
from galley_plugins.processes import die_with
from galley_plugins.speculation.options import STATS_VARIABLE, stats_path
from galley_plugins.worker.arguments import server_arguments
from galley_plugins.worker.device import DeviceError, probe, select
from galley_plugins.worker.environment import NoCompilerError, worker_environment
from galley_plugins.worker.spec import parse

PARENT_VARIABLE = "GALLEY_PARENT_PID"


def main() -> NoReturn:
    """Exit with status 2 when the request cannot be served here; otherwise turn into the server."""
    spec = parse()
    parent = os.environ.get(PARENT_VARIABLE)
    if parent:
        die_with(int(parent), signal.SIGTERM)
    try:
        device = select(spec.device, probe())
        environment = worker_environment(device, os.environ, compiled=spec.compiled)
        model = resolve(spec.weights, progress=_UnpackingReport())
        if "embed" in spec.tasks and spec.embedding.adapter is not None:
            check_adapter(Path(spec.embedding.adapter), str(model))
        if spec.memory:
            check_memories(spec.memory, model)
    except (DeviceError, NoCompilerError, ModelError, AdapterError, UnsuitableMemoryError) as error:
        progress.report("failed", reason=str(error))
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(2)
    if spec.speculation is not None:
        environment[STATS_VARIABLE] = str(stats_path())
    progress.report("starting engine", device=device)
    arguments = server_arguments(spec, model, device)
    program = [sys.executable, "-m", "galley_plugins.worker.serve", *arguments]
    os.execve(sys.executable, program, environment)  # noqa: S606


class _UnpackingReport:
    """Reports each further percent, not each tensor."""

    def __init__(self) -> None:
        self._percent = -1

    def __call__(self, done: int, total: int) -> None:
        percent = 100 * done // max(total, 1)
        if percent != self._percent:
            self._percent = percent
            progress.report("unpacking model", percent=percent)


if __name__ == "__main__":
    main()
