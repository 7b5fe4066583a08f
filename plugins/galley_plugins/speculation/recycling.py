"""Token Recycling: the candidates that each step computes and throws away are the next steps' drafts.

Token Recycling (arXiv 2408.08696) and its authors' code: the ids of the eight most probable tokens after each
token, overwritten at every position that the model is asked at, fill a fixed tree. Differences: an unknown
token proposes nothing (the authors' matrix starts as token 0 everywhere), the table is bounded and kept by
scope, and the tree is cut to a limit.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from numba import njit

from galley_plugins.speculation.drafting import Draft
from galley_plugins.speculation.store import load_tables, save_tables
from galley_plugins.speculation.tables import (
    ROWS_LAYOUT,
    WAYS,
    NgramTable,
    TableArrays,
    context_key,
    find,
    put,
    table_from_rows,
)

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from galley_plugins.speculation.drafting import Ask, Opening, Seen, Timing
    from galley_plugins.speculation.options import SpeculationOptions

# How many children a node of the template "2.2.2" has, by the ranks on the way to it.
# fmt: off
_CHILDREN: dict[tuple[int, ...], int] = {
    (): 8,
    (0,): 8, (1,): 4, (2,): 3, (3,): 2, (4,): 1, (5,): 1, (6,): 1, (7,): 1,
    (0, 0): 8, (0, 1): 3, (0, 2): 2, (0, 3): 1, (0, 4): 1, (0, 5): 1, (0, 6): 1, (0, 7): 1,
    (1, 0): 2, (1, 1): 1, (2, 0): 1, (3, 0): 1, (4, 0): 1, (5, 0): 1,
    (0, 0, 0): 5, (0, 0, 1): 2, (0, 0, 2): 1, (0, 0, 3): 1, (0, 0, 4): 1,
    (0, 1, 0): 1, (0, 2, 0): 1, (1, 0, 0): 1, (2, 0, 0): 1, (3, 0, 0): 1,
    (0, 0, 0, 0): 3, (0, 0, 0, 1): 1, (0, 0, 0, 2): 1, (0, 0, 1, 0): 1, (0, 1, 0, 0): 1, (1, 0, 0, 0): 1,
    (0, 0, 0, 0, 0): 2, (0, 0, 0, 1, 0): 1,
}
# fmt: on


def _expected(path: tuple[int, ...]) -> float:
    """How probably a node is accepted if a candidate of rank r is right with probability 0.52 / (1 + r)**1.5.

    That is Zipf's law over eight ranks. Its 80 most probable nodes lie on levels of 8, 21, 25, 18, 6, 1 and 1
    nodes, and 69 of them are the template's, more than with other exponents.
    """
    return 0.52 ** len(path) / math.prod(1 + rank for rank in path) ** 1.5


TEMPLATE: tuple[tuple[int, ...], ...] = tuple(
    sorted(
        ((*path, rank) for path, children in _CHILDREN.items() for rank in range(children)),
        key=lambda path: (-_expected(path), len(path), path),
    )
)
"""The 80 nodes as ranks from the root, the most probable first and so parents before children.

A draft of fewer nodes takes the first ones of which the tokens are known.
"""

CHAIN = tuple((0,) * depth for depth in range(1, max(map(len, TEMPLATE)) + 1))


def _arrays(nodes: tuple[tuple[int, ...], ...]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Parent (-1 the root) and rank of each node, int32 [nodes]."""
    places = {path: place for place, path in enumerate(nodes)}
    parents = [places.get(path[:-1], -1) for path in nodes]
    return np.array(parents, np.int32), np.array([path[-1] for path in nodes], np.int32)


class Recycling:
    """Drafts the tree "2.2.2" of the candidates that were last seen after each token.

    A table entry is one row of the authors' matrix: the token and its scope make its key. The least recently
    written rows give way in a full table. Nothing is learned from a prompt: the logits of its positions are
    not computed (the authors do not use them either).
    """

    name = "recycling"

    def __init__(self, options: SpeculationOptions, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._budget = options.table_bytes
        self.table = NgramTable(self._budget)
        self._last: dict[int, int] = {}  # each request's last token
        self._scopes = np.zeros(64, np.int64)  # by request
        self._tree, self._chain = _arrays(TEMPLATE), _arrays(CHAIN)

    def begin(self, request: int, opening: Opening) -> None:
        self._last[request] = int(opening.tokens[-1]) if len(opening.tokens) else -1
        if request >= len(self._scopes):
            self._scopes = np.concatenate([self._scopes, np.zeros(request + 1, np.int64)])
        self._scopes[request] = opening.scope

    def observe(self, seen: Seen) -> None:
        """Learn: the candidates of every row, of accepted tokens and rejected ones, in order of the rows."""
        self.table.clock += 1
        recycle(
            self.table.arrays(),
            self._scopes[seen.requests],
            np.ascontiguousarray(seen.contexts[:, -1]),
            np.ascontiguousarray(seen.top_tokens),
            np.ascontiguousarray(seen.top_probs),
            self.table.clock,
        )

    def extend(self, request: int, tokens: NDArray[np.int32]) -> None:
        if len(tokens):
            self._last[request] = int(tokens[-1])

    def timed(self, timing: Timing) -> None:
        """Costs change nothing: the limit is the asker's."""

    def propose(self, asks: Sequence[Ask]) -> list[Draft]:
        table = self.table.arrays()
        drafts = []
        for ask in asks:
            nodes, ranks = self._tree if ask.tree else self._chain
            tokens, parents = np.empty((2, max(min(ask.limit, len(nodes)), 0)), np.int32)
            scope = int(self._scopes[ask.request])
            count = fill(table, scope, self._last[ask.request], nodes, ranks, tokens, parents)
            drafts.append(Draft(tokens[:count], parents[:count]))
        return drafts

    def end(self, request: int) -> None:
        self._last.pop(request, None)

    def save(self, path: str | os.PathLike[str], tokenizer: str) -> None:
        """Write the table's rows, the oldest first; raises as `store.save_tables`."""
        save_tables(path, self.name, tokenizer, self.table.rows(), {})

    def load(self, path: str | os.PathLike[str], tokenizer: str) -> None:
        """Put what `save` wrote in the place of what was learned; raises as `store.load_tables`.

        A table of another `table_bytes` is taken too; older rows give way to newer ones.
        """
        tensors, _ = load_tables(path, self.name, tokenizer, ROWS_LAYOUT)
        self.table = table_from_rows(path, tensors, self._budget, self._vocab_size)


@njit(cache=True)
def recycle(
    table: TableArrays,
    scopes: NDArray[np.int64],
    inputs: NDArray[np.int32],
    tokens: NDArray[np.int32],
    weights: NDArray[np.float32],
    clock: int,
) -> None:
    """Overwrite the row of each input token with the candidates seen after it; the last one of equals stays.

    Args:
        scopes: int64 [rows].
        inputs: int32 [rows].
        tokens, weights: [rows, 8], best first.
    """
    for row in range(len(inputs)):
        put(table, context_key(1, scopes[row], 0, 0, inputs[row]), tokens[row], weights[row], clock)


@njit(cache=True)
def fill(
    table: TableArrays,
    scope: int,
    last: int,
    nodes: NDArray[np.int32],
    ranks: NDArray[np.int32],
    tokens: NDArray[np.int32],
    parents: NDArray[np.int32],
) -> int:
    """Fill the template from the table until the draft is full.

    Args:
        last: the text's last token.
        nodes, ranks: int32 [template], each node's parent and rank, parents first.
        tokens, parents: int32 [limit], the draft.

    Returns:
        the number of its nodes.
    """
    entries = np.full(len(nodes) + 1, -1, np.int64)  # by template node, the root first
    places = np.full(len(nodes) + 1, -1, np.int32)
    entries[0] = find(table, context_key(1, scope, 0, 0, last))
    count = 0
    for node in range(len(nodes)):
        if count == len(tokens):
            break
        entry = entries[nodes[node] + 1]
        if entry < 0:
            continue
        token = table.tokens[entry // WAYS, entry % WAYS, ranks[node]]
        if token < 0:
            continue
        tokens[count] = token
        parents[count] = places[nodes[node] + 1]
        places[node + 1] = count
        entries[node + 1] = find(table, context_key(1, scope, 0, 0, token))
        count += 1
    return count
