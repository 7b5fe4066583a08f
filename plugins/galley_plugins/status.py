"""`GET /galley/status` of a worker, and the check that every process of its engine carries the plugins.

vLLM loads plugins by itself in each process it starts and only logs when one fails, so the API server asks
before it serves: the engine core and every worker process must have reported the same versions.
"""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi.responses import JSONResponse

from galley_plugins import progress, registration
from galley_plugins.options import PluginOptions
from galley_plugins.speculation.options import STATS_VARIABLE

if TYPE_CHECKING:
    from argparse import Namespace

    from fastapi import FastAPI

PATH = "/galley/status"
SAVE_SECONDS = 10.0  # shorter than a supervisor waits for a worker to end

logger = logging.getLogger("vllm.galley.status")


class PluginMissingError(RuntimeError):
    """A process of the engine runs without Galley's plugins, or with other versions of them."""


class StatusEndpoint:
    """An endpoint plugin of vLLM's API server."""

    name = "galley_status"
    required_tasks = None

    def __init__(self) -> None:
        self._status: dict[str, Any] = {}

    def attach_router(self, app: FastAPI) -> None:
        @app.get(PATH)
        async def status() -> JSONResponse:
            return JSONResponse(self._status)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Collect every process's report.

        Raises:
            PluginMissingError: naming the processes that lack the plugins.
        """
        workers: list[dict[str, Any]] = await engine_client.collective_rpc("galley_report")
        loaded = [line for line in progress.read() if line["stage"] == registration.STAGE]
        check_processes(registration.versions(), workers, loaded)
        self._status = {
            **registration.versions(),
            "workers": workers,
            "processes": [{"process": line["process"], "pid": line["pid"]} for line in loaded],
        }
        vllm_config = engine_client.vllm_config
        options = PluginOptions.from_vllm_config(vllm_config)
        speculation = options.speculation
        counters = os.environ.get(STATS_VARIABLE)
        if speculation is not None:
            from galley_plugins.speculation.frontend import validate_requests
            from galley_plugins.speculation.stats import serve_metrics

            if counters:
                serve_metrics(Path(counters), speculation.method)
            if speculation.tables is not None:
                save_before_shutdown(engine_client)
            validate_requests(runs_alone=not vllm_config.use_v2_model_runner)
        if options.generate:
            from galley_plugins.memory import frontend as memory_frontend

            memories = workers[0].get("memory", ())
            memory_frontend.validate_requests({each["name"]: each["weight"] for each in memories})
        if options.embedding is not None:
            from galley_plugins.embedding.frontend import install

            install(state, engine_client, options.embedding, sampled=0 if options.vllm_pools else 1)
        progress.report("ready")


def save_before_shutdown(engine_client: Any) -> None:
    """Let the workers save what they learned when the server ends, while the engine still runs.

    vLLM ends its engine from a thread while the event loop runs on, and workers may be killed without a word.
    """
    loop = asyncio.get_running_loop()
    vllm_own = engine_client.shutdown

    def shutdown(*args: Any, **kwargs: Any) -> Any:
        engine_client.shutdown = vllm_own  # vLLM calls it again in the end
        saving = asyncio.run_coroutine_threadsafe(engine_client.collective_rpc("galley_save"), loop)
        try:
            saving.result(SAVE_SECONDS)
        except Exception as error:
            logger.warning("what plugins have learned was not saved: %r", error)
        return vllm_own(*args, **kwargs)

    engine_client.shutdown = shutdown


def check_processes(
    expected: dict[str, str], workers: list[dict[str, Any]], loaded: list[dict[str, Any]]
) -> None:
    """Compare the reports of an engine's processes with the versions of the API server.

    Args:
        expected: versions by distribution.
        workers: answers of the worker class, one for each rank, each with `pid`.
        loaded: lines that processes wrote when they loaded the plugins, each with `process` and `pid`;
            empty when no status file is kept.

    Raises:
        PluginMissingError: a rank or the engine core did not load them, or loaded other versions.
    """
    if not loaded:
        return
    by_pid = {line["pid"]: line for line in loaded}
    problems = [
        f"worker process {worker['pid']} (rank {worker['rank']}) did not load the plugins"
        for worker in workers
        if worker["pid"] not in by_pid
    ]
    if not any(line["process"].startswith("EngineCore") for line in loaded):
        problems.append("the engine core did not load the plugins")
    for line in loaded:
        found = {name: line.get(name) for name in expected}
        if found != expected:
            problems.append(f"process {line['process']} ({line['pid']}) runs {found}, expected {expected}")
    if problems:
        raise PluginMissingError("; ".join(problems))
