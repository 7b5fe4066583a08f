"""What every drafter speaks: drafts, what a step showed, and the protocol.

A drafter knows requests by small integers, tokens by id, and nothing of vLLM. Its adapter
(`runners.speculation_v1`) calls it once a step; runner V2 drafts on the device instead (`device`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
from numba import njit

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

TOP = 8  # candidates kept of every verified position (Token Recycling, section 3.1: k = 8)
CONTEXT = 3  # tokens of context that tables look at


class Draft(NamedTuple):
    """A tree of tokens after a request's last token; a chain is a tree whose parents are -1, 0, 1, ...

    Attributes:
        tokens: int32 [nodes], parents before children.
        parents: int32 [nodes], the index of each node's parent; -1 for a child of the last token.

    A draft that is cut from the end stays a draft.
    """

    tokens: NDArray[np.int32]
    parents: NDArray[np.int32]

    @classmethod
    def empty(cls) -> Draft:
        return cls(np.empty(0, np.int32), np.empty(0, np.int32))

    @classmethod
    def chain(cls, tokens: Sequence[int] | NDArray[np.int32]) -> Draft:
        ids = np.asarray(tokens, np.int32)
        return cls(ids, np.arange(-1, len(ids) - 1, dtype=np.int32))

    @property
    def is_chain(self) -> bool:
        return len(self.parents) == 0 or bool(_is_chain(self.parents))

    def depth_first(self) -> Draft:
        """The same tree with every node's first child right after it; runners verify in this order."""
        if self.is_chain:
            return self
        order, parents = depth_first(self.parents)
        return Draft(self.tokens[order], parents)


@njit(cache=True)
def _is_chain(parents: NDArray[np.int32]) -> bool:
    return bool((parents == np.arange(-1, len(parents) - 1)).all())


@njit(cache=True)
def depth_first(parents: NDArray[np.int32]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Depth-first order of a tree whose parents come before their children, earlier children first.

    Args:
        parents: int32 [nodes], -1 for the root's children.

    Returns:
        order: int32 [nodes], the old index at each new place.
        parents: int32 [nodes], by new indices.
    """
    count = len(parents)
    order = np.empty(count, np.int32)
    place = np.empty(count, np.int32)
    renamed = np.empty(count, np.int32)
    stack = np.empty(count + 1, np.int32)
    top = 0
    for node in range(count - 1, -1, -1):
        if parents[node] < 0:
            stack[top] = node
            top += 1
    filled = 0
    while top:
        top -= 1
        node = stack[top]
        order[filled] = node
        place[node] = filled
        renamed[filled] = place[parents[node]] if parents[node] >= 0 else -1
        filled += 1
        for child in range(count - 1, node, -1):
            if parents[child] == node:
                stack[top] = child
                top += 1
    return order, renamed


class Ask(NamedTuple):
    """One request that wants a draft.

    Attributes:
        request: the request's number.
        limit: the most nodes its draft may have, >= 0.
        tree: whether it may branch.
    """

    request: int
    limit: int
    tree: bool


@dataclass(slots=True)
class Seen:
    """What the model said at one step, one row for every position that it was asked at.

    Attributes:
        requests: int32 [rows], the request of each row; rows of a request are consecutive: its last token
            first, then its draft's nodes in depth-first order, as far as they were verified.
        contexts: int32 [rows, 3], the tokens that the prediction follows, oldest first; -1 before the text.
        top_tokens: int32 [rows, 8], the most probable next tokens, best first.
        top_probs: float32 [rows, 8], their probabilities. Approximate: the mass of tokens far from the top
            may be left out of the normalisation.
        accepted: int32 [rows], the token that the text goes on with after this row where the row lies on the
            verified path, else -1.
    """

    requests: NDArray[np.int32]
    contexts: NDArray[np.int32]
    top_tokens: NDArray[np.int32]
    top_probs: NDArray[np.float32]
    accepted: NDArray[np.int32]


@dataclass(slots=True)
class Timing:
    """How long one step took.

    Attributes:
        tokens: tokens that ran through the model.
        requests: requests that they belong to.
        seconds: wall time of the step, drafting included.
        drafting: of it what the step would not have taken without speculation, but for the tokens.
    """

    tokens: int
    requests: int
    seconds: float
    drafting: float = 0.0


@dataclass(slots=True)
class Opening:
    """A request as it enters.

    Attributes:
        tokens: int32 [length], its prompt (and what it had generated before a preemption).
        scope: requests of one scope share what drafters learn; others see nothing of it.
        greedy: temperature 0.
    """

    tokens: NDArray[np.int32]
    scope: int = 0
    greedy: bool = True


class Drafter(Protocol):
    """Proposes tokens from what was seen. Calls of one step come in the order of the methods below."""

    def begin(self, request: int, opening: Opening) -> None:
        """A request enters; its number was free."""

    def observe(self, seen: Seen) -> None:
        """Learn from a step. Called before the tokens of `accepted` are added to the requests' texts."""

    def extend(self, request: int, tokens: NDArray[np.int32]) -> None:
        """Tokens (int32 [n]) were verified and belong to the request's text now."""

    def timed(self, timing: Timing) -> None:
        """Learn what a step costs; called only for steps without prompt chunks."""

    def propose(self, asks: Sequence[Ask]) -> list[Draft]:
        """One draft for each ask, in order; an empty one where drafting does not pay."""

    def end(self, request: int) -> None:
        """A request has left; its number becomes free."""
