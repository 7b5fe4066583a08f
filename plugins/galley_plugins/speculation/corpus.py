"""A tri-gram table counted over a corpus: read-only, sorted, searched in place.

ADED (arXiv 2407.12021): P(c | a, b) by maximum likelihood, the 12 most probable successors of each bi-gram,
not renormalised. `build_table` counts it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numba import njit

from galley_plugins.speculation.store import TableFileError, load_tables, save_tables

if TYPE_CHECKING:
    import os

    from numpy.typing import NDArray

KIND = "trigram-corpus"
MOST_SUCCESSORS = 32  # of one bi-gram; room for scratch is made for this many


class Corpus(NamedTuple):
    """Successors of bi-grams, in two levels of offsets.

    Attributes:
        first: int64 [v + 1], the bi-grams that begin with token a are number first[a] to first[a + 1] - 1.
        second: int32 [bi-grams], their second token, rising for each first one.
        offsets: int64 [bi-grams + 1], the tri-grams of bi-gram i are number offsets[i] to offsets[i + 1] - 1.
        tokens: int32 [tri-grams], successors.
        probs: float32 [tri-grams], their probability, falling within a bi-gram.
    """

    first: NDArray[np.int64]
    second: NDArray[np.int32]
    offsets: NDArray[np.int64]
    tokens: NDArray[np.int32]
    probs: NDArray[np.float32]


def empty_corpus() -> Corpus:
    """A table without tri-grams."""
    return Corpus(
        np.zeros(1, np.int64),
        np.empty(0, np.int32),
        np.zeros(1, np.int64),
        np.empty(0, np.int32),
        np.empty(0, np.float32),
    )


def save_corpus(path: str | os.PathLike[str], tokenizer: str, corpus: Corpus) -> None:
    """Write a table; raises TableFileError as `store.save_tables` does."""
    tensors = {name: torch.from_numpy(array) for name, array in corpus._asdict().items()}
    save_tables(path, KIND, tokenizer, tensors, {})


def load_corpus(
    path: str | os.PathLike[str], tokenizer: str, vocab_size: int, limit: int = MOST_SUCCESSORS
) -> Corpus:
    """Read a table; at most `limit` successors of each bi-gram are kept.

    Raises:
        FileNotFoundError, TableFileError: as `store.load_tables`, and for offsets or tokens out of range.
    """
    lengths = {"first": torch.int64, "second": torch.int32, "offsets": torch.int64}
    lengths |= {"tokens": torch.int32, "probs": torch.float32}
    layout: dict[str, tuple[torch.dtype, tuple[int | None, ...]]] = {
        name: (dtype, (None,)) for name, dtype in lengths.items()
    }
    tensors, _ = load_tables(path, KIND, tokenizer, layout)
    corpus = Corpus(**{name: tensor.numpy() for name, tensor in tensors.items()})
    wrong = _wrong(corpus, vocab_size)
    if wrong:
        raise TableFileError(f"{path}: {wrong}")
    return pruned(corpus, limit)


def pruned(corpus: Corpus, limit: int) -> Corpus:
    """The table with the first `limit` successors of each bi-gram."""
    sizes = np.diff(corpus.offsets)
    if sizes.max(initial=0) <= limit:
        return corpus
    rank = np.arange(len(corpus.tokens)) - np.repeat(corpus.offsets[:-1], sizes)
    offsets = np.concatenate([[0], np.cumsum(np.minimum(sizes, limit))])
    kept = rank < limit
    return corpus._replace(offsets=offsets, tokens=corpus.tokens[kept], probs=corpus.probs[kept])


def _wrong(corpus: Corpus, vocab_size: int) -> str | None:
    """What a compiled loop would read beyond an array or a vocabulary for; None if all is well."""
    for name, offsets, end in (
        ("first", corpus.first, len(corpus.second)),
        ("offsets", corpus.offsets, len(corpus.tokens)),
    ):
        if len(offsets) == 0 or offsets[0] != 0 or offsets[-1] != end or (np.diff(offsets) < 0).any():
            return f"{name} does not rise from 0 to {end}"
    if len(corpus.offsets) != len(corpus.second) + 1:
        return f"offsets has {len(corpus.offsets)} entries, expected {len(corpus.second) + 1}"
    if len(corpus.probs) != len(corpus.tokens):
        return f"probs has {len(corpus.probs)} entries, expected {len(corpus.tokens)}"
    if len(corpus.first) > vocab_size + 1:
        return f"first has {len(corpus.first)} entries, expected at most {vocab_size + 1}"
    widest = int(np.diff(corpus.offsets).max(initial=0))
    if widest > MOST_SUCCESSORS:
        return f"a bi-gram has {widest} successors, expected at most {MOST_SUCCESSORS}"
    for name, tokens in (("second", corpus.second), ("tokens", corpus.tokens)):
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < vocab_size:
            return f"{name} holds {tokens.min()} to {tokens.max()}, expected 0 to {vocab_size - 1}"
    if not (np.isfinite(corpus.probs) & (corpus.probs > 0)).all():
        return "probs holds values that are no probabilities"
    return None


@njit(cache=True)
def span(corpus: Corpus, a: int, b: int) -> tuple[int, int]:
    """The tri-grams of the bi-gram (a, b): the number of the first and of the one after the last."""
    if a < 0 or a + 1 >= len(corpus.first):
        return 0, 0
    low, high = corpus.first[a], corpus.first[a + 1]
    end = high
    while low < high:
        middle = (low + high) // 2
        if corpus.second[middle] < b:
            low = middle + 1
        else:
            high = middle
    if low == end or corpus.second[low] != b:
        return 0, 0
    return corpus.offsets[low], corpus.offsets[low + 1]
