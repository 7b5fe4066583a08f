"""Memories on runner V1 (vLLM's CPU runner, and CUDA's former one)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from galley_plugins.runners.memory import MemoryRows

if TYPE_CHECKING:
    from galley_plugins.memory.served import NamedMemory


class MemoryV1:
    """Mixed in last before a V1 `GPUModelRunner`, so that others meet a model that mixes."""

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        self._memory = MemoryRows(vllm_config)
        super().__init__(vllm_config, *args, **kwargs)  # type: ignore[call-arg]

    @property
    def memories(self) -> tuple[NamedMemory, ...]:
        return self._memory.memories

    def load_model(self: Any, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)  # type: ignore[misc]
        self._memory.attach(self.get_model(), self.device)

    def _update_states(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        # Those that were preempted keep their weights.
        for request_id in scheduler_output.finished_req_ids:
            self._memory.remove(request_id)
        for request in scheduler_output.scheduled_new_reqs:
            self._memory.add(request.req_id, request.sampling_params)
        return super()._update_states(scheduler_output, *args, **kwargs)  # type: ignore[misc]

    def _prepare_inputs(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_inputs(scheduler_output, *args, **kwargs)  # type: ignore[misc]
        request_ids = self.input_batch.req_ids
        self._memory.begin_step(
            request_ids,
            self.query_start_loc.gpu[: len(request_ids) + 1],
            scheduler_output.total_num_scheduled_tokens,
        )
        return prepared
