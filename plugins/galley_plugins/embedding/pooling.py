"""Pooling of a prompt's hidden states into one vector, over any number of prefill chunks.

Mean pooling sums in float32, so that a prompt split over chunks gives the vector that one pass would give.
The pooler sees chunks in order; a chunk that starts at 0 starts over, which is what a preempted request does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from galley_plugins.options import Pooling


@dataclass(slots=True)
class _Prompt:
    """Progress of one prompt.

    Attributes:
        length: tokens of the whole prompt.
        dimensions: leading components to keep; None keeps all.
        normalize: scale the vector to unit length.
        seen: tokens pooled so far; the next chunk starts here.
        total: [hidden] float32, sum over the tokens seen (mean pooling only).
    """

    length: int
    dimensions: int | None
    normalize: bool
    seen: int = 0
    total: torch.Tensor | None = None


class PromptPooler:
    """Pools the prompts of embedding requests, known by request id.

    Args:
        pooling: "mean" over all tokens, or the "last" token's row.
    """

    def __init__(self, pooling: Pooling) -> None:
        self.pooling = pooling
        self._prompts: dict[str, _Prompt] = {}

    def __len__(self) -> int:
        return len(self._prompts)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._prompts

    def add(
        self, request_id: str, length: int, *, dimensions: int | None = None, normalize: bool = True
    ) -> None:
        """Register a prompt of `length` tokens; a known id starts over."""
        if length < 1:
            raise ValueError(f"request {request_id}: found a prompt of {length} tokens, expected at least 1")
        self._prompts[request_id] = _Prompt(length, dimensions, normalize)

    def remove(self, request_id: str) -> None:
        """Forget a request, finished or aborted; unknown ids are fine."""
        self._prompts.pop(request_id, None)

    def pool(self, request_id: str, hidden_states: torch.Tensor, start: int) -> torch.Tensor | None:
        """Take the next chunk of a prompt.

        Args:
            hidden_states: [tokens, hidden], the chunk's rows, any floating dtype; rows past the prompt
                (padding) are ignored.
            start: position of the chunk's first token in the prompt.

        Returns:
            [hidden] or [dimensions] float32 once the prompt is complete, None before.

        Raises:
            ValueError: mean pooling lacks rows before `start` (they were read from a cache, not computed).
        """
        prompt = self._prompts[request_id]
        hidden_states = hidden_states[: prompt.length - start]
        end = start + hidden_states.shape[0]
        if self.pooling == "mean":
            self._accumulate(request_id, prompt, hidden_states, start)
        prompt.seen = end
        if end < prompt.length:
            return None
        if prompt.total is not None:
            vector = prompt.total / prompt.length
        else:
            vector = hidden_states[prompt.length - 1 - start].to(torch.float32, copy=True)
        return _finish(vector, prompt)

    def _accumulate(self, request_id: str, prompt: _Prompt, hidden_states: torch.Tensor, start: int) -> None:
        if start == 0:
            prompt.total = None
        elif start != prompt.seen:
            raise ValueError(
                f"request {request_id}: mean pooling found a chunk at token {start}, expected {prompt.seen}"
            )
        chunk = hidden_states.sum(dim=0, dtype=torch.float32)  # [hidden]
        prompt.total = chunk if prompt.total is None else prompt.total + chunk


def _finish(vector: torch.Tensor, prompt: _Prompt) -> torch.Tensor:
    if prompt.dimensions is not None:
        vector = vector[: prompt.dimensions]
    if prompt.normalize:
        vector = torch.nn.functional.normalize(vector, dim=-1)
    return vector
