"""What both runner adapters do with a request and with a step's output."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.sampling_params import SamplingParams
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

from galley_plugins.embedding.pooling import PromptRows
from galley_plugins.memory.requests import TOTAL

if TYPE_CHECKING:
    import torch

    from galley_plugins.embedding.pooling import PromptPooler


def register_prompt(pooler: PromptPooler, request: Any) -> None:
    """Turn a scheduled pooling request into one greedy token for the runner; leave other requests alone."""
    params = request.pooling_params
    if params is None:
        return
    length = (
        len(request.prompt_token_ids) if request.prompt_token_ids is not None else len(request.prompt_embeds)
    )
    rows = PromptRows.of(length, params.extra_kwargs)
    pooler.add(
        request.req_id, rows, dimensions=params.dimensions, normalize=params.use_activation is not False
    )
    request.pooling_params = None
    request.sampling_params = SamplingParams(temperature=0.0, max_tokens=1, extra_args={TOTAL: 0.0})


def with_vectors(output: Any, vectors: dict[str, torch.Tensor]) -> Any:
    """Add the vectors that a step completed to its output, now or when an asynchronous output is awaited."""
    if isinstance(output, AsyncModelRunnerOutput):
        return OutputWithVectors(output, vectors)
    output.pooler_output = [vectors.get(request_id) for request_id in output.req_ids]
    return output


class OutputWithVectors(AsyncModelRunnerOutput):
    """A step's asynchronous output, with the vectors that the step completed."""

    def __init__(self, inner: AsyncModelRunnerOutput, vectors: dict[str, torch.Tensor]) -> None:
        self._inner = inner
        self._vectors = vectors

    def get_output(self) -> ModelRunnerOutput:
        output: ModelRunnerOutput = with_vectors(self._inner.get_output(), self._vectors)
        return output
