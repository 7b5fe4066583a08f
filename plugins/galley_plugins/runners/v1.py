"""Embedding requests on runner V1 (vLLM's CPU runner, and CUDA's former one).

A pooling request runs as a generation of one greedy token whose sample is dropped. Above the runner vLLM
treats every request by its kind: the scheduler ends a pooling request once a step's output has its vector.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from galley_plugins.runners.embedding import EmbeddingRows
from galley_plugins.runners.output_layer import OutputLayer
from galley_plugins.runners.requests import register_prompt, with_vectors

if TYPE_CHECKING:
    import torch


class EmbeddingV1:
    """Mixed in before a V1 `GPUModelRunner`."""

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)  # type: ignore[call-arg]
        self.embedding = EmbeddingRows(vllm_config)
        self.output_layer: OutputLayer | None = None

    def get_supported_tasks(self) -> tuple[str, ...]:
        return self.embedding.tasks(super().get_supported_tasks())  # type: ignore[misc]

    def load_model(self: Any, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)  # type: ignore[misc]
        model = self.get_model()
        self.embedding.attach(model)
        self.output_layer = OutputLayer(model, self.model_config.get_vocab_size())

    def initialize_kv_cache(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = super().initialize_kv_cache(*args, **kwargs)  # type: ignore[misc]
        if self.embedding.attention is not None:
            self.embedding.attention.attach(self.attn_groups)
        return found

    def _update_states(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        for request_id in scheduler_output.finished_req_ids:
            self.embedding.pooler.remove(request_id)
        for request in scheduler_output.scheduled_new_reqs:
            register_prompt(self.embedding.pooler, request)
        return super()._update_states(scheduler_output, *args, **kwargs)  # type: ignore[misc]

    def _prepare_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_inputs(*args, **kwargs)  # type: ignore[misc]
        batch = self.input_batch
        self.embedding.begin_step(
            batch.req_ids, self.query_start_loc.np, batch.num_computed_tokens_cpu, self.device
        )
        self._begin_output_layer()
        return prepared

    def _begin_output_layer(self: Any) -> None:
        """Leave the output layer out of a step in which every row is an embedding request's."""
        if self.output_layer is not None:
            rows, pooler = self.input_batch.req_ids, self.embedding.pooler
            self.output_layer.needed = not rows or any(request_id not in pooler for request_id in rows)

    def sample_tokens(self, grammar_output: Any) -> Any:
        if self.output_layer is not None:
            self.output_layer.needed = True
        vectors = self._pool_embedding_rows() if self.embedding.pooler else None
        output = super().sample_tokens(grammar_output)  # type: ignore[misc]
        return output if vectors is None else with_vectors(output, vectors)

    def _pool_embedding_rows(self: Any) -> dict[str, torch.Tensor] | None:
        """Pool this step's rows of every embedding request and drop their samples.

        Returns:
            vectors of the prompts that this step completed; None when the step has no embedding row.
        """
        state = self.execute_model_state
        if state is None:  # not the last pipeline rank
            return None
        batch = self.input_batch
        rows = [row for row, request_id in enumerate(batch.req_ids) if request_id in self.embedding.pooler]
        if not rows:
            return None
        vectors = self.embedding.end_step(
            rows, batch.req_ids, self.query_start_loc.np, batch.num_computed_tokens_cpu, state.hidden_states
        )
        self.discard_request_mask.np[rows] = True
        self.discard_request_mask.copy_to_gpu(batch.num_reqs)
        return {request_id: vector.cpu() for request_id, vector in vectors.items()}
