"""Tri-gram weights learned while serving: sparse, bounded by bytes, the least recently learned give way.

Bi-grams lie in a hash table and in a list by age; each has a linked list of its successors, so that what is
stored costs what it has. A bi-gram that is learned for the first time starts from the corpus's successors,
which gives every scope the table of ADED (arXiv 2407.12021) as if it had loaded the corpus for itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numba import njit

from galley_plugins.speculation.corpus import MOST_SUCCESSORS, Corpus, span
from galley_plugins.speculation.tables import context_key

if TYPE_CHECKING:
    from numpy.typing import NDArray

CELLS = 2  # room for tri-grams, per bi-gram; texts have 1.1 to 1.5
BIGRAM_BYTES = 8 + 5 * 4 + CELLS * 3 * 4

# what `state` holds
_NEWEST, _OLDEST, _FREE_BIGRAM, _FREE_CELL, _BIGRAMS_MADE, _CELLS_MADE, _HELD = range(7)


class Trigrams(NamedTuple):
    """The table's arrays; -1 ends a list.

    Attributes:
        keys: int64 [bi-grams], hashed scope and tokens.
        heads: int32 [bi-grams], the first cell of each one's successors.
        newer, older: int32 [bi-grams], neighbours by age.
        chain: int32 [bi-grams], the next one of the same bucket, or the next free one.
        buckets: int32 [bi-grams], the first one of each.
        tokens: int32 [cells], successors.
        weights: float32 [cells].
        following: int32 [cells], the bi-gram's next successor, or the next free cell.
        state: int64 [7], ends of the lists and how much is in use.
    """

    keys: NDArray[np.int64]
    heads: NDArray[np.int32]
    newer: NDArray[np.int32]
    older: NDArray[np.int32]
    chain: NDArray[np.int32]
    buckets: NDArray[np.int32]
    tokens: NDArray[np.int32]
    weights: NDArray[np.float32]
    following: NDArray[np.int32]
    state: NDArray[np.int64]


def new_trigrams(budget: int) -> Trigrams:
    """An empty table of at most `budget` bytes (at least 64 bi-grams); its memory is touched as it fills."""
    bigrams = max(budget // BIGRAM_BYTES, 64)
    cells = CELLS * bigrams
    return Trigrams(
        keys=np.empty(bigrams, np.int64),
        heads=np.empty(bigrams, np.int32),
        newer=np.empty(bigrams, np.int32),
        older=np.empty(bigrams, np.int32),
        chain=np.empty(bigrams, np.int32),
        buckets=np.full(bigrams, -1, np.int32),
        tokens=np.empty(cells, np.int32),
        weights=np.empty(cells, np.float32),
        following=np.empty(cells, np.int32),
        state=np.array([-1, -1, -1, -1, 0, 0, 0], np.int64),
    )


def bigrams_held(table: Trigrams) -> int:
    """How many bi-grams the table holds."""
    return int(table.state[_HELD])


@njit(cache=True)
def _bucket(table: Trigrams, key: int) -> int:
    return ((key >> 17) & 0x3FFFFFFFFFFF) % len(table.buckets)


@njit(cache=True)
def _lookup(table: Trigrams, key: int) -> int:
    """The bi-gram with this key; -1 without one."""
    entry = table.buckets[_bucket(table, key)]
    while entry >= 0 and table.keys[entry] != key:
        entry = table.chain[entry]
    return entry


@njit(cache=True)
def _attach(table: Trigrams, entry: int) -> None:
    """Make a bi-gram that is in no list the newest."""
    newest = table.state[_NEWEST]
    table.older[entry] = newest
    table.newer[entry] = -1
    if newest >= 0:
        table.newer[newest] = entry
    else:
        table.state[_OLDEST] = entry
    table.state[_NEWEST] = entry


@njit(cache=True)
def _detach(table: Trigrams, entry: int) -> None:
    newer, older = table.newer[entry], table.older[entry]
    if newer >= 0:
        table.older[newer] = older
    else:
        table.state[_NEWEST] = older
    if older >= 0:
        table.newer[older] = newer
    else:
        table.state[_OLDEST] = newer


@njit(cache=True)
def _evict(table: Trigrams) -> None:
    """Free the oldest bi-gram and its cells."""
    entry = table.state[_OLDEST]
    _detach(table, entry)
    bucket = _bucket(table, table.keys[entry])
    if table.buckets[bucket] == entry:
        table.buckets[bucket] = table.chain[entry]
    else:
        before = table.buckets[bucket]
        while table.chain[before] != entry:
            before = table.chain[before]
        table.chain[before] = table.chain[entry]
    cell = table.heads[entry]
    while cell >= 0:
        following = table.following[cell]
        table.following[cell] = table.state[_FREE_CELL]
        table.state[_FREE_CELL] = cell
        cell = following
    table.chain[entry] = table.state[_FREE_BIGRAM]
    table.state[_FREE_BIGRAM] = entry
    table.state[_HELD] -= 1


@njit(cache=True)
def _add_bigram(table: Trigrams, key: int) -> int:
    """A new bi-gram without successors; the oldest one gives way if need be."""
    if table.state[_FREE_BIGRAM] < 0 and table.state[_BIGRAMS_MADE] == len(table.keys):
        _evict(table)
    entry = table.state[_FREE_BIGRAM]
    if entry >= 0:
        table.state[_FREE_BIGRAM] = table.chain[entry]
    else:
        entry = table.state[_BIGRAMS_MADE]
        table.state[_BIGRAMS_MADE] += 1
    bucket = _bucket(table, key)
    table.keys[entry] = key
    table.heads[entry] = -1
    table.chain[entry] = table.buckets[bucket]
    table.buckets[bucket] = entry
    table.state[_HELD] += 1
    _attach(table, entry)
    return entry


@njit(cache=True)
def _add_cell(table: Trigrams, entry: int, last: int, token: int, weight: float) -> int:
    """Put a successor behind the cell `last` of a bi-gram, the newest one; its cell."""
    while table.state[_FREE_CELL] < 0 and table.state[_CELLS_MADE] == len(table.tokens):
        _evict(table)  # never `entry`: there is room for four bi-grams of the most successors
    cell = table.state[_FREE_CELL]
    if cell >= 0:
        table.state[_FREE_CELL] = table.following[cell]
    else:
        cell = table.state[_CELLS_MADE]
        table.state[_CELLS_MADE] += 1
    table.tokens[cell] = token
    table.weights[cell] = weight
    table.following[cell] = -1
    if last < 0:
        table.heads[entry] = cell
    else:
        table.following[last] = cell
    return cell


@njit(cache=True)
def _claim(table: Trigrams, corpus: Corpus, scope: int, a: int, b: int) -> int:
    """The bi-gram (a, b), made the newest; a new one has the corpus's successors."""
    key = context_key(2, scope, 0, a, b)
    entry = _lookup(table, key)
    if entry >= 0:
        _detach(table, entry)
        _attach(table, entry)
        return entry
    entry = _add_bigram(table, key)
    start, end = span(corpus, a, b)
    last = -1
    for index in range(start, end):
        last = _add_cell(table, entry, last, corpus.tokens[index], corpus.probs[index])
    return entry


@njit(cache=True)
def add(table: Trigrams, corpus: Corpus, scope: int, a: int, b: int, c: int, gain: float, cap: float) -> None:
    """Add `gain` to P(c | a, b), up to `cap`; where a bi-gram is full, its weakest successor gives way."""
    entry = _claim(table, corpus, scope, a, b)
    last, weakest, count = -1, -1, 0
    cell = table.heads[entry]
    while cell >= 0:
        if table.tokens[cell] == c:
            table.weights[cell] = min(table.weights[cell] + gain, cap)
            return
        if weakest < 0 or table.weights[cell] < table.weights[weakest]:
            weakest = cell
        last = cell
        count += 1
        cell = table.following[cell]
    if count == MOST_SUCCESSORS:
        table.tokens[weakest] = c
        table.weights[weakest] = min(gain, cap)
    else:
        _add_cell(table, entry, last, c, min(gain, cap))


@njit(cache=True)
def adapt(
    table: Trigrams, corpus: Corpus, scope: int, window: NDArray[np.int32], gain: float, cap: float
) -> None:
    """ADED's adaptive update: `add` for every tri-gram of the window (int32 [n]), oldest first."""
    for index in range(len(window) - 2):
        add(table, corpus, scope, window[index], window[index + 1], window[index + 2], gain, cap)


@njit(cache=True)
def successors(
    table: Trigrams,
    corpus: Corpus,
    scope: int,
    a: int,
    b: int,
    tokens: NDArray[np.int32],
    weights: NDArray[np.float32],
) -> int:
    """Write what may follow (a, b) into `tokens` and `weights` (>= 32 long); how many there are.

    In the order of the corpus and then of learning. Nothing becomes newer by being read.
    """
    count = 0
    entry = _lookup(table, context_key(2, scope, 0, a, b))
    if entry >= 0:
        cell = table.heads[entry]
        while cell >= 0:
            tokens[count] = table.tokens[cell]
            weights[count] = table.weights[cell]
            count += 1
            cell = table.following[cell]
        return count
    start, end = span(corpus, a, b)
    for index in range(start, end):
        tokens[count] = corpus.tokens[index]
        weights[count] = corpus.probs[index]
        count += 1
    return count


@njit(cache=True)
def export(
    table: Trigrams,
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int32], NDArray[np.float32]]:
    """All that was learned, the oldest first.

    Returns:
        keys int64 [bi-grams]; how many successors each has, int32 [bi-grams]; these, int32 [tri-grams]; their
        weights, float32 [tri-grams].
    """
    keys = np.empty(table.state[_HELD], np.int64)
    sizes = np.zeros(table.state[_HELD], np.int32)
    tokens = np.empty(table.state[_CELLS_MADE], np.int32)
    weights = np.empty(table.state[_CELLS_MADE], np.float32)
    total = 0
    index = 0
    entry = table.state[_OLDEST]
    while entry >= 0:
        keys[index] = table.keys[entry]
        cell = table.heads[entry]
        while cell >= 0:
            tokens[total] = table.tokens[cell]
            weights[total] = table.weights[cell]
            total += 1
            sizes[index] += 1
            cell = table.following[cell]
        index += 1
        entry = table.newer[entry]
    return keys, sizes, tokens[:total].copy(), weights[:total].copy()


@njit(cache=True)
def restore(
    table: Trigrams,
    keys: NDArray[np.int64],
    sizes: NDArray[np.int32],
    tokens: NDArray[np.int32],
    weights: NDArray[np.float32],
) -> None:
    """Put what `export` gave into an empty table; what does not fit is the oldest."""
    start = 0
    for index in range(len(keys)):
        entry = _add_bigram(table, keys[index])
        last = -1
        for cell in range(start, start + sizes[index]):
            last = _add_cell(table, entry, last, tokens[cell], weights[cell])
        start += sizes[index]
