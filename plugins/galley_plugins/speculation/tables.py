"""A bounded table from short contexts to weighted next tokens, shared by all requests.

It is laid out like a processor's cache: `sets` sets of four ways, the least recently used way of a set gives
way. All of it lies in tensors, so that the same table serves compiled loops on a CPU and gathers on a GPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numba import njit

from galley_plugins.speculation.drafting import CONTEXT, TOP
from galley_plugins.speculation.store import TableFileError

if TYPE_CHECKING:
    import os

    from numpy.typing import NDArray

WAYS = 4
ENTRY_BYTES = 8 + 4 + TOP * (4 + 4)
_MULTIPLIER = -7046029254386353131  # 2**64 / golden ratio, as a signed integer; odd


class TableArrays(NamedTuple):
    """The table as numpy arrays.

    Attributes:
        keys: int64 [sets, ways], hashed contexts; 0 is free.
        stamps: int32 [sets, ways], the clock when last used.
        tokens: int32 [sets, ways, 8], successors; -1 is free.
        weights: float32 [sets, ways, 8].
    """

    keys: NDArray[np.int64]
    stamps: NDArray[np.int32]
    tokens: NDArray[np.int32]
    weights: NDArray[np.float32]


class NgramTable:
    """Contexts of one to three tokens to at most eight successors each.

    Args:
        budget: bytes it may take; at least one set.
        device: where its tensors live.
    """

    def __init__(self, budget: int, device: torch.device | str = "cpu") -> None:
        sets = max(1, budget // (WAYS * ENTRY_BYTES))
        self.sets = 1 << (sets.bit_length() - 1)  # a power of two, rounded down
        self.keys = torch.zeros((self.sets, WAYS), dtype=torch.int64, device=device)
        self.stamps = torch.zeros((self.sets, WAYS), dtype=torch.int32, device=device)
        self.tokens = torch.full((self.sets, WAYS, TOP), -1, dtype=torch.int32, device=device)
        self.weights = torch.zeros((self.sets, WAYS, TOP), dtype=torch.float32, device=device)
        self.clock = 0

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything to save: the four tensors by name."""
        return {"keys": self.keys, "stamps": self.stamps, "tokens": self.tokens, "weights": self.weights}

    def arrays(self) -> TableArrays:
        """Views for the compiled loops; only on a CPU."""
        return TableArrays(self.keys.numpy(), self.stamps.numpy(), self.tokens.numpy(), self.weights.numpy())

    def __len__(self) -> int:
        return int((self.keys != 0).sum())

    def rows(self) -> dict[str, torch.Tensor]:
        """The entries in use, the least recently used first: keys [rows], tokens and weights [rows, 8]."""
        held = (self.keys != 0).nonzero(as_tuple=True)
        order = torch.argsort(self.stamps[held], stable=True)
        return {name: getattr(self, name)[held][order] for name in ROWS_LAYOUT}


ROWS_LAYOUT: dict[str, tuple[torch.dtype, tuple[int | None, ...]]] = {
    "keys": (torch.int64, (None,)),
    "tokens": (torch.int32, (None, TOP)),
    "weights": (torch.float32, (None, TOP)),
}
"""What `NgramTable.rows` gives, as `store.load_tables` checks it."""


def table_from_rows(
    path: str | os.PathLike[str], tensors: dict[str, torch.Tensor], budget: int, vocab_size: int
) -> NgramTable:
    """A table of `budget` bytes with the entries of a file; where they do not fit, older ones give way.

    Raises:
        TableFileError: keys, tokens or weights are out of range, or not as many of each.
    """
    keys, tokens, weights = (tensors[name].numpy() for name in ROWS_LAYOUT)
    if not len(keys) == len(tokens) == len(weights):
        raise TableFileError(
            f"{path}: {len(keys)} keys, {len(tokens)} rows of tokens, {len(weights)} of weights, "
            "expected as many of each"
        )
    in_range = ((tokens >= -1) & (tokens < vocab_size)).all() and keys.all()
    if not in_range or not np.isfinite(weights).all() or (weights < 0).any():
        raise TableFileError(f"{path}: keys, tokens or weights are out of range")
    table = NgramTable(budget)
    table.clock = write_rows(table.arrays(), keys, tokens, weights)
    return table


@njit(cache=True)
def context_key(order: int, scope: int, c0: int, c1: int, c2: int) -> int:
    """The key of the last `order` tokens of (c0, c1, c2), c2 the newest; other scopes have other keys."""
    hashed = (np.int64(scope) * 8 + order + 1) * np.int64(_MULTIPLIER)
    hashed ^= (hashed >> 31) & 0x1FFFFFFFF
    if order >= 3:
        hashed = (hashed + c0 + 1) * np.int64(_MULTIPLIER)
        hashed ^= (hashed >> 31) & 0x1FFFFFFFF
    if order >= 2:
        hashed = (hashed + c1 + 1) * np.int64(_MULTIPLIER)
        hashed ^= (hashed >> 31) & 0x1FFFFFFFF
    hashed = (hashed + c2 + 1) * np.int64(_MULTIPLIER)
    hashed ^= (hashed >> 31) & 0x1FFFFFFFF
    return int(hashed) if hashed != 0 else 1


@njit(cache=True)
def find(table: TableArrays, key: int) -> int:
    """The way that holds `key`, as set * ways + way; -1 without one."""
    row = (key >> 12) & (table.keys.shape[0] - 1)
    for way in range(WAYS):
        if table.keys[row, way] == key:
            return row * WAYS + way
    return -1


@njit(cache=True)
def claim(table: TableArrays, key: int, clock: int) -> int:
    """Like `find`, but makes an empty entry in place of the least recently used one where there is none."""
    row = (key >> 12) & (table.keys.shape[0] - 1)
    oldest = 0
    for way in range(WAYS):
        if table.keys[row, way] == key:
            table.stamps[row, way] = clock
            return row * WAYS + way
        if table.keys[row, way] == 0:
            oldest = way
            break
        if table.stamps[row, way] < table.stamps[row, oldest]:
            oldest = way
    table.keys[row, oldest] = key
    table.stamps[row, oldest] = clock
    for rank in range(TOP):
        table.tokens[row, oldest, rank] = -1
        table.weights[row, oldest, rank] = 0.0
    return row * WAYS + oldest


@njit(cache=True)
def put(
    table: TableArrays, key: int, tokens: NDArray[np.int32], weights: NDArray[np.float32], clock: int
) -> None:
    """Set an entry's successors (int32 [8]) and weights (float32 [8])."""
    entry = claim(table, key, clock)
    table.tokens[entry // WAYS, entry % WAYS] = tokens
    table.weights[entry // WAYS, entry % WAYS] = weights


@njit(cache=True)
def write_rows(
    table: TableArrays, keys: NDArray[np.int64], tokens: NDArray[np.int32], weights: NDArray[np.float32]
) -> int:
    """Write rows (int64 [rows], [rows, 8] each), the oldest first; returns the clock after it."""
    for row in range(len(keys)):
        put(table, keys[row], tokens[row], weights[row], row + 1)
    return len(keys)


@njit(cache=True)
def blend(
    table: TableArrays, entry: int, tokens: NDArray[np.int32], probs: NDArray[np.float32], rate: float
) -> None:
    """Move an entry's weights towards `probs` (of `tokens`, -1 ends them) by `rate`; weak ones give way."""
    row, way = entry // WAYS, entry % WAYS
    have = table.tokens[row, way]
    weight = table.weights[row, way]
    if have[0] < 0:
        rate = 1.0
    for rank in range(TOP):
        weight[rank] *= 1.0 - rate
    for index in range(len(tokens)):
        token = tokens[index]
        if token < 0:
            break
        gain = np.float32(rate * probs[index])
        weakest = 0
        place = -1
        for rank in range(TOP):
            if have[rank] == token:
                place = rank
                break
            if have[rank] < 0:
                have[rank] = token
                weight[rank] = 0.0
                place = rank
                break
            if weight[rank] < weight[weakest]:
                weakest = rank
        if place >= 0:
            weight[place] += gain
        elif gain > weight[weakest]:
            have[weakest] = token
            weight[weakest] = gain


@njit(cache=True)
def learn_predictions(
    table: TableArrays,
    scopes: NDArray[np.int64],
    contexts: NDArray[np.int32],
    tokens: NDArray[np.int32],
    probs: NDArray[np.float32],
    rates: NDArray[np.float32],
    clock: int,
) -> None:
    """Store the model's own predictions under their last one, two and three tokens of context.

    Args:
        scopes: int64 [rows].
        contexts: int32 [rows, 3].
        tokens, probs: [rows, 8].
        rates: float32 [3], how far a known entry moves, by order.
    """
    for row in range(len(contexts)):
        for order in range(1, CONTEXT + 1):
            if contexts[row, CONTEXT - order] < 0:
                break
            key = context_key(order, scopes[row], contexts[row, 0], contexts[row, 1], contexts[row, 2])
            blend(table, claim(table, key, clock), tokens[row], probs[row], rates[order - 1])


@njit(cache=True)
def learn_text(
    table: TableArrays, scope: int, text: NDArray[np.int32], rate: float, first: float, clock: int
) -> None:
    """Store what follows what in a text that the model did not write.

    Args:
        text: int32 [length].
        rate: how far a known entry moves towards the token seen.
        first: the weight of a token seen after a new context.
    """
    token = np.empty(1, np.int32)
    one = np.ones(1, np.float32)
    for index in range(1, len(text)):
        token[0] = text[index]
        c2 = text[index - 1]
        c1 = text[index - 2] if index >= 2 else -1
        c0 = text[index - 3] if index >= 3 else -1
        for order in range(1, CONTEXT + 1):
            if order > index:
                break
            entry = claim(table, context_key(order, scope, c0, c1, c2), clock)
            if table.tokens[entry // WAYS, entry % WAYS, 0] < 0:
                one[0] = first
                blend(table, entry, token, one, 1.0)
            else:
                one[0] = 1.0
                blend(table, entry, token, one, rate)
