"""What both runner adapters do with memories: load them, change the model, and keep requests' weights."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from galley_plugins.memory.mixed_model import Mix
from galley_plugins.memory.requests import memory_weights
from galley_plugins.memory.served import load_memories
from galley_plugins.options import PluginOptions

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from galley_plugins.memory.served import NamedMemory

logger = logging.getLogger("vllm.galley.memory")

DRAFTERS = ("custom_class", "ngram", "ngram_gpu", "suffix")  # those that read no hidden states
TAPS = "galley_taps"  # of the additional configuration, which the key of vLLM's compiled graphs is made from


class MemoryRows:
    """The memories of a runner and its requests' shares of them.

    Raises:
        ValueError: this engine's model cannot be mixed, with the reason.
    """

    def __init__(self, vllm_config: Any) -> None:
        reason = _unsuited_engine(vllm_config)
        if reason:
            raise ValueError(f"memory: needs {reason}")
        self._vllm_config = vllm_config
        self._shares: dict[str, tuple[float, ...]] = {}  # by request id
        self._nothing: tuple[float, ...] = ()
        self._mix: Mix | None = None
        self.memories: tuple[NamedMemory, ...] = ()

    def attach(self, model: Any, device: torch.device) -> None:
        """Load the memories and let the model, which has been loaded, mix them in.

        Raises:
            ValueError: a memory was made for another model, or is damaged; or the model is built in another
                way than those that can be tapped.
        """
        config = self._vllm_config
        dtype = config.model_config.dtype
        options = PluginOptions.from_vllm_config(config).memory
        self.memories = load_memories(options, config.model_config, device, dtype)
        self._nothing = (0.0,) * len(self.memories)
        self._mix = Mix(
            self.memories,
            hidden=config.model_config.get_hidden_size(),
            tokens=config.scheduler_config.max_num_batched_tokens,
            device=device,
            dtype=dtype,
            compiled=_compiled(config),
        )
        self._mix.attach(model)
        config.additional_config[TAPS] = sorted(self._mix.taps)

    def add(self, request_id: str, params: Any) -> None:
        """A request enters, or comes again.

        Args:
            params: vLLM's `SamplingParams`; None for a request that only pools.
        """
        if params is None:
            self._shares[request_id] = self._nothing
            return
        configured = {each.name: each.share for each in self.memories}
        try:
            self._shares[request_id] = memory_weights(params.extra_args, configured)
        except ValueError as error:  # the API server refuses these
            logger.warning("request %s is served without memories: %s", request_id, error)
            self._shares[request_id] = self._nothing

    def remove(self, request_id: str) -> None:
        self._shares.pop(request_id, None)

    def begin_step(self, request_ids: Sequence[str], starts: torch.Tensor, tokens: int) -> None:
        """As `Mix.begin_step`, of requests by their ids in the order of the batch."""
        assert self._mix is not None
        self._mix.begin_step([self._shares[each] for each in request_ids], starts, tokens)


def _compiled(vllm_config: Any) -> bool:
    from vllm.config import CompilationMode, CUDAGraphMode

    compilation = vllm_config.compilation_config
    graphs = compilation.cudagraph_mode
    return compilation.mode != CompilationMode.NONE or graphs not in (None, CUDAGraphMode.NONE)


def _unsuited_engine(vllm_config: Any) -> str | None:
    """What memories need that this engine has not, if anything."""
    parallel, speculation = vllm_config.parallel_config, vllm_config.speculative_config
    needs = (
        (parallel.pipeline_parallel_size == 1, "all layers in one process (pipeline-parallel-size: 1)"),
        (
            parallel.prefill_context_parallel_size == 1,
            "whole prompts in one process (prefill-context-parallel-size: 1)",
        ),
        (not parallel.use_ubatching, "steps that are not split (without enable-dbo)"),
        (
            not parallel.enable_batch_sharded_sampling,
            "whole rows of logits in each process (without enable-batch-sharded-sampling)",
        ),
        (
            not vllm_config.cache_config.kv_sharing_fast_prefill,
            "every row in every layer (without kv-sharing-fast-prefill)",
        ),
        (
            speculation is None or speculation.method in DRAFTERS,
            f"a drafter that reads no hidden states ({', '.join(DRAFTERS)}), found "
            f"{speculation and speculation.method}",
        ),
    )
    return next((need for met, need in needs if not met), None)
