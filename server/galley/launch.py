"""The command line and environment that start one worker; all the gateway knows of what a worker is."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from galley.config import ModelConfig

STATUS_VARIABLE = "GALLEY_STATUS_FILE"
PARENT_VARIABLE = "GALLEY_PARENT_PID"


def worker_command(model: ModelConfig, host: str, port: int) -> list[str]:
    """Arguments that run a worker of `model`; the program is this interpreter."""
    command = [sys.executable, "-m", "galley_plugins.worker", "--weights", model.weights]
    for name in model.served_names:
        command += ["--name", name]
    command += ["--host", host, "--port", str(port)]
    command += ["--tasks", ",".join(sorted(model.tasks)), "--device", model.device]
    command += ["--compile", model.compile]
    embedding = model.embedding.model_dump(mode="json", exclude_unset=True, exclude_none=True)
    if embedding:
        command += ["--embedding", json.dumps(embedding)]
    if model.speculation is not None:
        chosen = model.speculation.model_dump(mode="json", exclude_unset=True)
        command += ["--speculation", json.dumps(chosen)]
    quantization = model.quantization.model_dump(mode="json", exclude_unset=True)
    if quantization:
        command += ["--quantization", json.dumps(quantization)]
    if model.memory:
        memories = [each.model_dump(mode="json", exclude_unset=True) for each in model.memory]
        command += ["--memory", json.dumps(memories)]
    if model.engine:
        command += ["--engine", json.dumps(model.engine)]
    return command


def worker_environment(model: ModelConfig, status_file: Path | None = None) -> dict[str, str]:
    """Environment of a worker: this process's own, without its settings, with the model's `env`.

    With a status file the worker is supervised: it reports its stages there and ends with this process.
    """
    kept = ("GALLEY_CACHE_DIR", "GALLEY_DATA")
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("GALLEY_") or name in kept
    }
    if status_file is not None:
        environment[STATUS_VARIABLE] = str(status_file)
        environment[PARENT_VARIABLE] = str(os.getpid())
    return {**environment, **model.env}
