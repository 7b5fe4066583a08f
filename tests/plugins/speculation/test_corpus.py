"""Corpus tables: looked up, cut, and refused where a compiled loop would read beyond them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from galley_plugins.speculation.corpus import (
    Corpus,
    empty_corpus,
    load_corpus,
    pruned,
    save_corpus,
    span,
)
from galley_plugins.speculation.store import TableFileError

if TYPE_CHECKING:
    from pathlib import Path

# (0, 3) -> 1; (2, 0) -> 5, 6, 7; (2, 4) -> 8
TABLE = Corpus(
    first=np.array([0, 1, 1, 3], np.int64),
    second=np.array([3, 0, 4], np.int32),
    offsets=np.array([0, 1, 4, 5], np.int64),
    tokens=np.array([1, 5, 6, 7, 8], np.int32),
    probs=np.array([1.0, 0.5, 0.25, 0.25, 0.125], np.float32),
)


def successors(corpus: Corpus, a: int, b: int) -> dict[int, float]:
    start, end = span(corpus, a, b)
    return dict(zip(corpus.tokens[start:end].tolist(), corpus.probs[start:end].tolist(), strict=True))


def test_successors_are_found_by_bigram() -> None:
    assert successors(TABLE, 0, 3) == {1: 1.0}
    assert successors(TABLE, 2, 0) == {5: 0.5, 6: 0.25, 7: 0.25}
    assert successors(TABLE, 2, 4) == {8: 0.125}
    for a, b in ((0, 0), (0, 4), (1, 3), (2, 3), (2, 5), (3, 0), (-1, 3), (99, 0)):
        assert successors(TABLE, a, b) == {}
        assert successors(empty_corpus(), a, b) == {}


def test_only_the_most_probable_successors_are_kept() -> None:
    cut = pruned(TABLE, 2)
    assert successors(cut, 0, 3) == {1: 1.0}
    assert successors(cut, 2, 0) == {5: 0.5, 6: 0.25}  # not renormalised
    assert successors(cut, 2, 4) == {8: 0.125}
    assert pruned(TABLE, 3) is TABLE


def test_a_table_comes_back_from_its_file(tmp_path: Path) -> None:
    save_corpus(tmp_path / "table", "hash", TABLE)
    loaded = load_corpus(tmp_path / "table", "hash", 9)
    for name, array in TABLE._asdict().items():
        found = getattr(loaded, name)
        assert found.dtype == array.dtype
        assert (found == array).all()
        assert found.flags.carray  # what compiled loops were compiled for
    assert successors(load_corpus(tmp_path / "table", "hash", 9, limit=1), 2, 0) == {5: 0.5}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"first": np.array([0, 1, 1, 4])}, "first does not rise from 0 to 3"),
        ({"first": np.array([0, 2, 1, 3])}, "first does not rise"),
        ({"first": np.empty(0, np.int64)}, "first does not rise"),
        ({"first": np.array([0] * 20 + [3])}, "first has 21 entries, expected at most 10"),
        ({"offsets": np.array([1, 2, 4, 5])}, "offsets does not rise from 0 to 5"),
        ({"offsets": np.array([0, 5])}, "offsets has 2 entries, expected 4"),
        ({"probs": np.ones(4, np.float32)}, "probs has 4 entries, expected 5"),
        ({"probs": np.zeros(5, np.float32)}, "no probabilities"),
        ({"tokens": np.array([1, 5, 6, 7, 9], np.int32)}, "tokens holds 1 to 9, expected 0 to 8"),
        ({"second": np.array([-1, 0, 4], np.int32)}, "second holds -1 to 4"),
        ({"second": np.array([3, 0, 4])}, r"second is torch.int64 \[3\], expected torch.int32"),
    ],
)
def test_a_table_that_makes_no_sense_is_refused(
    tmp_path: Path, change: dict[str, np.ndarray], message: str
) -> None:
    save_corpus(tmp_path / "table", "hash", TABLE._replace(**change))
    with pytest.raises(TableFileError, match=message):
        load_corpus(tmp_path / "table", "hash", 9)


def test_too_many_successors_are_refused(tmp_path: Path) -> None:
    wide = Corpus(
        np.array([0, 1]),
        np.zeros(1, np.int32),
        np.array([0, 33]),
        np.zeros(33, np.int32),
        np.ones(33, np.float32),
    )
    save_corpus(tmp_path / "table", "hash", wide)
    with pytest.raises(TableFileError, match="33 successors, expected at most 32"):
        load_corpus(tmp_path / "table", "hash", 9)
