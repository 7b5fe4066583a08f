"""`--worker-cls` on CUDA; imported only there."""

from __future__ import annotations

import importlib
from typing import Any

from vllm.v1.worker.gpu_worker import Worker

from galley_plugins import vllm_compat
from galley_plugins.options import PluginOptions
from galley_plugins.runners.compose import compose_runner
from galley_plugins.runners.report import ReportingWorker


class GalleyCUDAWorker(ReportingWorker, Worker):
    """vLLM's GPU worker around a runner with Galley's mixins: V2, or V1 where vLLM falls back to it."""

    def _make_model_runner(self) -> Any:
        vllm_compat.check("worker-cuda")
        module = "gpu.model_runner" if self.use_v2_model_runner else "gpu_model_runner"
        base = importlib.import_module(f"vllm.v1.worker.{module}").GPUModelRunner
        options = PluginOptions.from_vllm_config(self.vllm_config)
        return compose_runner(base, options, v2=self.use_v2_model_runner)(self.vllm_config, self.device)
