"""What a worker process says of itself through `collective_rpc`."""

from __future__ import annotations

import os
from typing import Any

from galley_plugins import progress


class ReportingWorker:
    """Mixed in before a vLLM worker: start-up stages, and one report for the status page."""

    def load_model(self, *args: Any, **kwargs: Any) -> Any:
        progress.report("loading weights")
        return super().load_model(*args, **kwargs)  # type: ignore[misc]

    def determine_available_memory(self) -> Any:
        progress.report("warming up")
        return super().determine_available_memory()  # type: ignore[misc]

    def galley_save(self: Any) -> None:
        """Keep what plugins have learned; asked for when the server ends."""
        if hasattr(self.model_runner, "save_speculation"):
            self.model_runner.save_speculation()

    def galley_report(self: Any) -> dict[str, Any]:
        runner = self.model_runner
        return {
            "pid": os.getpid(),
            "rank": self.rank,
            "runner": type(runner).__name__,
            "runner_version": 2 if self.use_v2_model_runner else 1,
            "tasks": list(runner.get_supported_tasks()),
            "device": str(self.device),
            "memory": [each.report() for each in getattr(runner, "memories", ())],
        }
