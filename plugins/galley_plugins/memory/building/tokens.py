"""The corpus as token ids, and which of them are held out.

The held-out text is the corpus's last part, or another text. What is predicted of a document is every token
but its first: entry i of a span [start, stop) is the state at token start + i and the token that follows it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from galley_plugins.memory.building.corpus import CorpusError
from galley_plugins.memory.building.stages import explained

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from galley_plugins.memory.building.corpus import Corpus
    from galley_plugins.memory.building.stages import Stage

TOKENS, TRAIN, HELD_OUT = "tokens.i32", "train.i64", "heldout.i64"
BATCH = 1 << 20  # characters that go to the tokenizer at once


def tokenize(
    stage: Stage,
    corpus: Corpus,
    held_out: Corpus | float,
    tokenizer: Any,
    advance: Callable[[int], None] = lambda size: None,
) -> None:
    """Write the token ids of a corpus, and the spans that are trained on and held out.

    Args:
        held_out: another text, or the share of the corpus's tokens, at its end, that is held out.
        tokenizer: one of Hugging Face's; special tokens are not added.
        advance: called with the bytes read since the last call.

    Raises:
        CorpusError: the corpus cannot be read, or has no two tokens in a row.
    """
    stage.begin()
    path = stage.folder / f"{TOKENS}.partial"
    with explained(path), path.open("wb") as file:
        starts = _append(file, corpus, tokenizer, advance)
        bad = corpus.bad
        count = starts[-1]
        if isinstance(held_out, float):
            spans, held = _split(starts, count - int(count * held_out))
        else:
            other = _append(file, held_out, tokenizer, advance)
            bad += held_out.bad
            spans, held = _spans(starts), _spans(other + count)
            count += other[-1]
    entries, held_entries = entries_of(spans), entries_of(held)
    if not entries or not held_entries:
        raise CorpusError(
            f"{corpus.path}: found {entries} tokens with one that follows to build from and {held_entries} "
            "to hold out, expected some of both"
        )
    for name, array in ((TRAIN, spans), (HELD_OUT, held)):
        path = stage.folder / f"{name}.partial"
        with explained(path):
            path.write_bytes(np.ascontiguousarray(array).tobytes())
    stage.finish(
        {
            "tokens": int(count),
            "documents": len(spans),
            "entries": entries,
            "heldout_entries": held_entries,
            "bad_rows": bad,
        }
    )


def entries_of(spans: NDArray[np.int64]) -> int:
    """How many tokens of the spans have one that follows."""
    return int((spans[:, 1] - spans[:, 0] - 1).sum())


def windows(spans: NDArray[np.int64], context: int) -> NDArray[np.int64]:
    """[windows, 2]: begin and number of the tokens that the model reads at once; each has one that follows.

    A document longer than `context` is read in pieces that do not overlap.
    """
    rows = []
    for start, stop in spans:
        begins = np.arange(start, stop - 1, context)
        rows.append(np.stack([begins, np.minimum(begins + context, stop - 1) - begins], axis=1))
    return np.concatenate(rows) if rows else np.empty((0, 2), np.int64)


def _append(file: Any, corpus: Corpus, tokenizer: Any, advance: Callable[[int], None]) -> NDArray[np.int64]:
    """Write a corpus's tokens; where its documents begin, and how many tokens it has at the end."""
    starts, count = [0], 0
    texts: list[str] = []
    ends: list[bool] = []
    length = 0

    def flush() -> None:
        nonlocal count, length
        if texts:
            encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
            for ids, last in zip(encoded["input_ids"], ends, strict=True):
                file.write(np.asarray(ids, np.int32).tobytes())
                count += len(ids)
                if last:
                    starts.append(count)
        texts.clear()
        ends.clear()
        length = 0

    for piece in corpus.pieces():
        texts.append(piece.text)
        ends.append(piece.last)
        length += len(piece.text)
        advance(piece.size)
        if length >= BATCH:
            flush()
    flush()
    return np.array(starts, np.int64)


def _spans(starts: NDArray[np.int64]) -> NDArray[np.int64]:
    spans = np.stack([starts[:-1], starts[1:]], axis=1)
    return spans[spans[:, 1] - spans[:, 0] > 1]


def _split(starts: NDArray[np.int64], cut: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Documents before and behind a token; one that holds it is cut in two."""
    spans = np.stack([starts[:-1], starts[1:]], axis=1)
    before, behind = np.minimum(spans, cut), np.maximum(spans, cut)
    first, second = (part[part[:, 1] - part[:, 0] > 1] for part in (before, behind))
    return first, second
