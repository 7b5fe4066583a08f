"""Embedding requests on runner V2 (CUDA's default).

The same idea as on V1, with V2's own seams: `sample` has hidden states and batch together, and a row whose
`num_sampled` is 0 neither stores nor returns its sample.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from galley_plugins.runners.embedding import EmbeddingRows
from galley_plugins.runners.requests import register_prompt, with_vectors

if TYPE_CHECKING:
    import torch


class EmbeddingV2:
    """Mixed in before a V2 `GPUModelRunner`."""

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)  # type: ignore[call-arg]
        self.embedding = EmbeddingRows(vllm_config)
        self._step_vectors: dict[str, torch.Tensor] | None = None

    def get_supported_tasks(self) -> tuple[str, ...]:
        return self.embedding.tasks(super().get_supported_tasks())  # type: ignore[misc]

    def load_model(self: Any, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)  # type: ignore[misc]
        self.embedding.attach(self.get_model())

    def initialize_kv_cache(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = super().initialize_kv_cache(*args, **kwargs)  # type: ignore[misc]
        if self.embedding.attention is not None:
            self.embedding.attention.attach(self.attn_groups)
        return found

    def finish_requests(self, scheduler_output: Any) -> None:
        # A preempted request comes back as a new one, so only finished ones are forgotten.
        for request_id in scheduler_output.finished_req_ids:
            self.embedding.pooler.remove(request_id)
        super().finish_requests(scheduler_output)  # type: ignore[misc]

    def add_requests(self, scheduler_output: Any) -> None:
        for request in scheduler_output.scheduled_new_reqs:
            register_prompt(self.embedding.pooler, request)
        super().add_requests(scheduler_output)  # type: ignore[misc]

    def prepare_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        batch = super().prepare_inputs(*args, **kwargs)  # type: ignore[misc]
        self.embedding.begin_step(
            batch.req_ids, batch.query_start_loc_np, batch.num_computed_tokens_np, self.device
        )
        return batch

    def sample(
        self, hidden_states: torch.Tensor, input_batch: Any, grammar_output: Any
    ) -> tuple[Any, torch.Tensor, torch.Tensor]:
        sampler_output, num_sampled, num_rejected = super().sample(  # type: ignore[misc]
            hidden_states, input_batch, grammar_output
        )
        rows = [
            row for row, request_id in enumerate(input_batch.req_ids) if request_id in self.embedding.pooler
        ]
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
        vectors = self.embedding.end_step(
            rows,
            input_batch.req_ids,
            input_batch.query_start_loc_np,
            input_batch.num_computed_tokens_np,
            hidden_states,
        )
        return {request_id: vector.to("cpu", non_blocking=True) for request_id, vector in vectors.items()}

    def sample_tokens(self, grammar_output: Any) -> Any:
        self._step_vectors = None
        output = super().sample_tokens(grammar_output)  # type: ignore[misc]
        vectors, self._step_vectors = self._step_vectors, None
        return output if vectors is None else with_vectors(output, vectors)
