"""Memories on runner V2 (CUDA's default)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from galley_plugins.runners.memory import MemoryRows

if TYPE_CHECKING:
    from galley_plugins.memory.served import NamedMemory


class MemoryV2:
    """Mixed in last before a V2 `GPUModelRunner`, so that others meet a model that mixes."""

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        self._memory = MemoryRows(vllm_config)
        super().__init__(vllm_config, *args, **kwargs)  # type: ignore[call-arg]

    @property
    def memories(self) -> tuple[NamedMemory, ...]:
        return self._memory.memories

    def load_model(self: Any, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)  # type: ignore[misc]
        self._memory.attach(self.get_model(), self.device)

    def finish_requests(self, scheduler_output: Any) -> None:
        # A preempted request comes back as a new one, so only finished ones are forgotten.
        for request_id in scheduler_output.finished_req_ids:
            self._memory.remove(request_id)
        super().finish_requests(scheduler_output)  # type: ignore[misc]

    def add_requests(self, scheduler_output: Any) -> None:
        for request in scheduler_output.scheduled_new_reqs:
            self._memory.add(request.req_id, request.sampling_params)
        super().add_requests(scheduler_output)  # type: ignore[misc]

    def prepare_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        batch = super().prepare_inputs(*args, **kwargs)  # type: ignore[misc]
        # On the device, where vLLM's adaptive verification decides whose the rows are.
        starts = batch.query_start_loc[: batch.num_reqs + 1]
        self._memory.begin_step(batch.req_ids, starts, batch.num_tokens)
        return batch
