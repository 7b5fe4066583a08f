"""Pooling of a prompt's hidden states into one vector, over any number of prefill chunks.

The pooler sees chunks in order; a chunk that starts at 0 starts over, which is what a preempted request does.
Sums are taken in float32, so that a prompt split over chunks gives the vector that one pass would give.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True, slots=True)
class PromptRows:
    """What is known of a prompt before its rows come.

    Attributes:
        length: tokens of the whole prompt.
        start, stop: where the text lies in it.
        placeholder: position of the placeholder, None without one.
        special: which special token stands at the end.
        part: its vector is one of several of the same text, and left as it is.
        context: the text as a contextual encoder reads it, its token ids.
    """

    length: int
    start: int = 0
    stop: int = -1
    placeholder: int | None = None
    special: int = 0
    part: bool = False
    context: tuple[int, ...] = ()

    @classmethod
    def of(cls, length: int, extra: dict[str, Any] | None) -> PromptRows:
        """Read what the API server attached to a request (see `to_extra`); without it, the text is all."""
        found = (extra or {}).get(KEY)
        if found is None:
            return cls(length, 0, length)
        return cls(length, **{**found, "context": tuple(found.get("context", ()))})


KEY = "galley_prompt"


def to_extra(start: int, stop: int, **more: Any) -> dict[str, Any]:
    """What `PromptRows.of` reads, to travel in a request's `PoolingParams.extra_kwargs`."""
    return {KEY: {"start": start, "stop": stop, **more}}


class Pool(Protocol):
    """One prompt's progress towards its vector."""

    def take(self, rows: torch.Tensor, start: int) -> None:
        """Take the next rows: [tokens, hidden] of any floating dtype, the first at position `start`."""

    def vector(self) -> torch.Tensor:
        """[dimensions] float32, after the last row."""


Head = Callable[[torch.Tensor], torch.Tensor]
"""What a trained part makes of rows, each by itself: [rows, hidden] to [rows, dimensions]."""

HEAD_ROWS = 256  # that a head sees at once, since its rows may be as wide as a vocabulary


class MeanPool:
    """The mean over the rows of the text, or over what `head` makes of them."""

    def __init__(self, prompt: PromptRows, head: Head | None = None) -> None:
        self._start, self._stop = prompt.start, prompt.stop
        self._head = head
        self._total: torch.Tensor | None = None

    def take(self, rows: torch.Tensor, start: int) -> None:
        for inside in _text_rows(rows, start, self._start, self._stop, self._head):
            chunk = inside.sum(dim=0, dtype=torch.float32)  # [dimensions]
            self._total = chunk if self._total is None else self._total + chunk

    def vector(self) -> torch.Tensor:
        assert self._total is not None
        return self._total / (self._stop - self._start)


class MaxPool:
    """The largest value in each dimension over what `head` makes of the text's rows."""

    def __init__(self, prompt: PromptRows, head: Head | None = None) -> None:
        self._start, self._stop = prompt.start, prompt.stop
        self._head = head
        self._most: torch.Tensor | None = None

    def take(self, rows: torch.Tensor, start: int) -> None:
        for inside in _text_rows(rows, start, self._start, self._stop, self._head):
            chunk = inside.amax(dim=0).to(torch.float32)
            self._most = chunk if self._most is None else torch.maximum(self._most, chunk)

    def vector(self) -> torch.Tensor:
        assert self._most is not None
        return self._most


def _text_rows(
    rows: torch.Tensor, start: int, first: int, stop: int, head: Head | None
) -> Iterator[torch.Tensor]:
    """Those of a chunk's rows that are the text's, through the head if there is one."""
    inside = rows[max(first - start, 0) : max(stop - start, 0)]
    if not len(inside):
        return
    if head is None:
        yield inside
    else:
        yield from map(head, inside.split(HEAD_ROWS))


class RowsPool:
    """Single rows, side by side or averaged.

    Args:
        positions: in ascending order; the last one may be the prompt's last.
        unit: each row has length 1 before they are combined.
    """

    def __init__(
        self, positions: tuple[int, ...], combine: Literal["concat", "mean"] = "concat", *, unit: bool = False
    ) -> None:
        self._positions = positions
        self._combine = combine
        self._unit = unit
        self._rows: list[torch.Tensor] = []

    def take(self, rows: torch.Tensor, start: int) -> None:
        self._rows += [
            rows[position - start].to(torch.float32, copy=True)
            for position in self._positions
            if start <= position < start + len(rows)
        ]

    def vector(self) -> torch.Tensor:
        rows = torch.stack(self._rows)
        if self._unit:
            rows = torch.nn.functional.normalize(rows, dim=-1)
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
        sparse: vectors are this many weights at the most, as `to_sparse` writes them.
    """

    make_pool: Callable[[PromptRows], Pool]
    every_row: bool = True
    sparse: int | None = None
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
        vector = prompt.pool.vector()
        if self.sparse is not None:
            return to_sparse(vector, min(prompt.dimensions or self.sparse, self.sparse))
        return vector if prompt.rows.part else finish(vector, prompt.dimensions, normalize=prompt.normalize)


def finish(vector: torch.Tensor, dimensions: int | None, *, normalize: bool) -> torch.Tensor:
    """The first `dimensions`, or all, at length 1 if wanted."""
    vector = vector[:dimensions]
    return torch.nn.functional.normalize(vector, dim=-1) if normalize else vector


def to_sparse(vector: torch.Tensor, most: int) -> torch.Tensor:
    """The `most` largest positive weights of [dimensions], as [2 * weights]: their places, then themselves.

    float32 holds every place below 2^24.
    """
    weights, places = vector.topk(min(most, len(vector)))
    kept = weights > 0
    return torch.cat([places[kept].to(torch.float32), weights[kept]])


def from_sparse(pair: torch.Tensor) -> dict[int, float]:
    """Weights by place, as `to_sparse` wrote them, the largest first."""
    places, weights = pair.chunk(2)
    return dict(zip(places.int().tolist(), weights.tolist(), strict=True))
