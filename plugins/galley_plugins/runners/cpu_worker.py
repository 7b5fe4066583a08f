"""`--worker-cls` on a CPU."""

from __future__ import annotations

import contextlib
import importlib
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import vllm.v1.worker.cpu_worker as vllm_cpu_worker
from vllm.v1.worker.cpu_worker import CPUWorker

from galley_plugins import few_rows, vllm_compat
from galley_plugins.options import PluginOptions
from galley_plugins.runners.block_tables import with_host_tables
from galley_plugins.runners.compiled_passes import loading_compiled
from galley_plugins.runners.compose import compose_runner
from galley_plugins.runners.report import ReportingWorker
from galley_plugins.runners.seeds import with_seeded_chunks
from galley_plugins.speculation.handover import hands_over, with_drafts

if TYPE_CHECKING:
    from collections.abc import Iterator


class GalleyCPUWorker(ReportingWorker, CPUWorker):
    """vLLM's CPU worker around a runner with Galley's mixins, V1 or V2."""

    _compiled_layers = 0

    def init_device(self) -> None:
        vllm_compat.check("worker-cpu")
        options = PluginOptions.from_vllm_config(self.vllm_config)
        self._hands_over = hands_over(self.vllm_config)
        with _runner_class(options, v2=self.use_v2_model_runner):
            super().init_device()

    def load_model(self, *args: Any, **kwargs: Any) -> Any:
        few = not self.use_v2_model_runner and few_rows.wanted(self.vllm_config)
        with few_rows.loading() if few else contextlib.nullcontext():
            loaded = super().load_model(*args, **kwargs)
        config = self.vllm_config
        # Adapters add to each map's result; a connector of caches would have to be asked around attention.
        left = config.lora_config is not None or config.kv_transfer_config is not None
        if (few or config.quant_config is not None) and not left:
            from galley_plugins.quantization import decoder

            self._compiled_layers = decoder.install(self.model_runner.model)
        return loaded

    def determine_available_memory(self) -> int:
        with loading_compiled():  # here vLLM compiles
            return int(super().determine_available_memory())

    def sample_tokens(self, grammar_output: Any) -> Any:
        output = super().sample_tokens(grammar_output)
        return with_drafts(output, self.model_runner) if self._hands_over else output

    def galley_report(self) -> dict[str, Any]:
        return {**super().galley_report(), "compiled_layers": self._compiled_layers}


@contextmanager
def _runner_class(options: PluginOptions, *, v2: bool) -> Iterator[None]:
    """`CPUWorker.init_device` builds the runner itself, by a name in a module; put ours there."""
    owner: Any = importlib.import_module("vllm.v1.worker.cpu.model_runner") if v2 else vllm_cpu_worker
    original = owner.CPUModelRunner
    base = original if v2 else with_host_tables(with_seeded_chunks(original))
    owner.CPUModelRunner = compose_runner(base, options, v2=v2)
    try:
        yield
    finally:
        owner.CPUModelRunner = original
