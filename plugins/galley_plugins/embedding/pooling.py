"""Pooling of a prompt's hidden states into one vector, over any number of prefill chunks.

The pooler sees chunks in order; a chunk that starts at 0 starts over, which is what a preempted request does.
Sums are taken in float32, so that a prompt split over chunks gives the vector that one pass would give.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True, slots=True)
class PromptRows:
    """What is known of a prompt before its rows come.

    Attributes:
        length: tokens of the whole prompt.
        start, stop: where the text lies in it.
        placeholder: position of the placeholder, None without one.
    """

    length: int
    start: int = 0
    stop: int = -1
    placeholder: int | None = None

    @classmethod
    def of(cls, length: int, extra: dict[str, Any] | None) -> PromptRows:
        """Read what the API server attached to a request (see `to_extra`); without it, the text is all."""
        found = (extra or {}).get(KEY)
        if found is None:
            return cls(length, 0, length)
        start, stop, placeholder = found
        return cls(length, start, stop, placeholder)


KEY = "galley_prompt"


def to_extra(start: int, stop: int, placeholder: int | None) -> dict[str, Any]:
    """What `PromptRows.of` reads, to travel in a request's `PoolingParams.extra_kwargs`."""
    return {KEY: [start, stop, placeholder]}


class Pool(Protocol):
    """One prompt's progress towards its vector."""

    def take(self, rows: torch.Tensor, start: int) -> None:
        """Take the next rows: [tokens, hidden] of any floating dtype, the first at position `start`."""

    def vector(self) -> torch.Tensor:
        """[dimensions] float32, after the last row."""


class MeanPool:
    """The mean over the rows of the text."""

    def __init__(self, prompt: PromptRows) -> None:
        self._start, self._stop = prompt.start, prompt.stop
        self._total: torch.Tensor | None = None

    def take(self, rows: torch.Tensor, start: int) -> None:
        inside = rows[max(self._start - start, 0) : max(self._stop - start, 0)]
        if len(inside):
            chunk = inside.sum(dim=0, dtype=torch.float32)  # [hidden]
            self._total = chunk if self._total is None else self._total + chunk

    def vector(self) -> torch.Tensor:
        assert self._total is not None
        return self._total / (self._stop - self._start)


class RowsPool:
    """Single rows, side by side or averaged.

    Args:
        positions: in ascending order; the last one may be the prompt's last.
    """

    def __init__(self, positions: tuple[int, ...], combine: Literal["concat", "mean"] = "concat") -> None:
        self._positions = positions
        self._combine = combine
        self._rows: list[torch.Tensor] = []

    def take(self, rows: torch.Tensor, start: int) -> None:
        self._rows += [
            rows[position - start].to(torch.float32, copy=True)
            for position in self._positions
            if start <= position < start + len(rows)
        ]

    def vector(self) -> torch.Tensor:
        rows = torch.stack(self._rows)
        return rows.flatten() if self._combine == "concat" else rows.mean(0)


@dataclass(slots=True)
class _Prompt:
    """Progress of one prompt; `seen` is where its next chunk starts."""

    rows: PromptRows
    dimensions: int | None
    normalize: bool
    seen: int = 0
    pool: Pool | None = None


@dataclass(slots=True)
class PromptPooler:
    """Pools the prompts of embedding requests, known by request id.

    Args:
        make_pool: how one prompt is pooled.
        every_row: the pool needs all rows, so that none may have been read from a cache.
    """

    make_pool: Callable[[PromptRows], Pool]
    every_row: bool = True
    _prompts: dict[str, _Prompt] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self._prompts)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._prompts

    def __getitem__(self, request_id: str) -> PromptRows:
        return self._prompts[request_id].rows

    def add(
        self, request_id: str, rows: PromptRows, *, dimensions: int | None = None, normalize: bool = True
    ) -> None:
        """Register a prompt; a known id starts over."""
        if rows.length < 1:
            raise ValueError(
                f"request {request_id}: found a prompt of {rows.length} tokens, expected at least 1"
            )
        self._prompts[request_id] = _Prompt(rows, dimensions, normalize)

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
            [dimensions] float32 once the prompt is complete, None before.

        Raises:
            ValueError: the pool lacks rows before `start` (they were read from a cache, not computed).
        """
        prompt = self._prompts[request_id]
        hidden_states = hidden_states[: prompt.rows.length - start]
        if prompt.pool is None or start == 0:
            prompt.pool, prompt.seen = self.make_pool(prompt.rows), 0
        if self.every_row and start != prompt.seen:
            raise ValueError(
                f"request {request_id}: pooling found a chunk at token {start}, expected {prompt.seen}"
            )
        prompt.pool.take(hidden_states, start)
        prompt.seen = start + len(hidden_states)
        if prompt.seen < prompt.rows.length:
            return None
        return _finish(prompt.pool.vector(), prompt)


def _finish(vector: torch.Tensor, prompt: _Prompt) -> torch.Tensor:
    if prompt.dimensions is not None:
        vector = vector[: prompt.dimensions]
    if prompt.normalize:
        vector = torch.nn.functional.normalize(vector, dim=-1)
    return vector
