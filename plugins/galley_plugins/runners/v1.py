"""Embedding requests on runner V1 (vLLM's CPU runner, and CUDA's former one).

A pooling request runs as a generation of one greedy token whose sample is dropped. Above the runner vLLM
treats every request by its kind: the scheduler ends a pooling request once a step's output has its vector.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from galley_plugins.embedding.pooling import PromptPooler
from galley_plugins.options import PluginOptions
from galley_plugins.runners.requests import register_prompt, with_vectors

if TYPE_CHECKING:
    import torch


class EmbeddingV1:
    """Mixed in before a V1 `GPUModelRunner`."""

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)  # type: ignore[call-arg]
        self.prompt_pooler = PromptPooler(PluginOptions.from_vllm_config(vllm_config).pooling)

    def get_supported_tasks(self) -> tuple[str, ...]:
        return (*super().get_supported_tasks(), "embed")  # type: ignore[misc]

    def _update_states(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        for request_id in scheduler_output.finished_req_ids:
            self.prompt_pooler.remove(request_id)
        for request in scheduler_output.scheduled_new_reqs:
            register_prompt(self.prompt_pooler, request)
        return super()._update_states(scheduler_output, *args, **kwargs)  # type: ignore[misc]

    def sample_tokens(self, grammar_output: Any) -> Any:
        vectors = self._pool_embedding_rows() if self.prompt_pooler else None
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
        pooler: PromptPooler = self.prompt_pooler
        starts = self.query_start_loc.np  # [requests + 1]
        vectors: dict[str, torch.Tensor] = {}
        found = False
        for row, request_id in enumerate(self.input_batch.req_ids):
            if request_id not in pooler:
                continue
            found = True
            chunk = state.hidden_states[int(starts[row]) : int(starts[row + 1])]
            vector = pooler.pool(request_id, chunk, int(self.input_batch.num_computed_tokens_cpu[row]))
            if vector is not None:
                vectors[request_id] = vector.cpu()
            self.discard_request_mask.np[row] = True
        if not found:
            return None
        self.discard_request_mask.copy_to_gpu(self.input_batch.num_reqs)
        return vectors
