"""Embedding requests on runner V2 (CUDA's default).

The same idea as on V1, with V2's own seams: `sample` has hidden states and batch together, and a row whose
`num_sampled` is 0 neither stores nor returns its sample.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from galley_plugins.embedding.pooling import PromptPooler
from galley_plugins.options import PluginOptions
from galley_plugins.runners.requests import register_prompt, with_vectors

if TYPE_CHECKING:
    import torch


class EmbeddingV2:
    """Mixed in before a V2 `GPUModelRunner`."""

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)  # type: ignore[call-arg]
        self.prompt_pooler = PromptPooler(PluginOptions.from_vllm_config(vllm_config).pooling)
        self._step_vectors: dict[str, torch.Tensor] | None = None

    def get_supported_tasks(self) -> tuple[str, ...]:
        return (*super().get_supported_tasks(), "embed")  # type: ignore[misc]

    def finish_requests(self, scheduler_output: Any) -> None:
        # A preempted request comes back as a new one, so only finished ones are forgotten.
        for request_id in scheduler_output.finished_req_ids:
            self.prompt_pooler.remove(request_id)
        super().finish_requests(scheduler_output)  # type: ignore[misc]

    def add_requests(self, scheduler_output: Any) -> None:
        for request in scheduler_output.scheduled_new_reqs:
            register_prompt(self.prompt_pooler, request)
        super().add_requests(scheduler_output)  # type: ignore[misc]

    def sample(
        self, hidden_states: torch.Tensor, input_batch: Any, grammar_output: Any
    ) -> tuple[Any, torch.Tensor, torch.Tensor]:
        sampler_output, num_sampled, num_rejected = super().sample(  # type: ignore[misc]
            hidden_states, input_batch, grammar_output
        )
        rows = [row for row, request_id in enumerate(input_batch.req_ids) if request_id in self.prompt_pooler]
        if rows:
            num_sampled[rows] = 0
            self._step_vectors = self._pool_rows(rows, hidden_states, input_batch)
        return sampler_output, num_sampled, num_rejected

    def _pool_rows(
        self, rows: list[int], hidden_states: torch.Tensor, input_batch: Any
    ) -> dict[str, torch.Tensor]:
        """Vectors of the prompts that this step completes, on their way to the host.

        Their copies are queued on the main stream before vLLM's own, whose event the output waits for.
        """
        starts = input_batch.query_start_loc_np  # [requests + 1]
        vectors: dict[str, torch.Tensor] = {}
        for row in rows:
            request_id = input_batch.req_ids[row]
            chunk = hidden_states[int(starts[row]) : int(starts[row + 1])]
            vector = self.prompt_pooler.pool(request_id, chunk, int(input_batch.num_computed_tokens_np[row]))
            if vector is not None:
                vectors[request_id] = vector.to("cpu", non_blocking=True)
        return vectors

    def sample_tokens(self, grammar_output: Any) -> Any:
        self._step_vectors = None
        output = super().sample_tokens(grammar_output)  # type: ignore[misc]
        vectors, self._step_vectors = self._step_vectors, None
        return output if vectors is None else with_vectors(output, vectors)
