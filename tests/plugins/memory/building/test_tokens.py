"""Token ids of a corpus, and which of them are held out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from galley_plugins.memory.building import tokens as tokenizing
from galley_plugins.memory.building.corpus import Corpus, CorpusError
from galley_plugins.memory.building.stages import Stage
from galley_plugins.memory.building.tokens import HELD_OUT, TOKENS, TRAIN, entries_of, tokenize, windows
from tests.plugins.memory.conftest import word_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

TOKENIZER = word_tokenizer()
A, THE, MAN, DOG = range(2, 6)


def written(folder: Path, name: str, *texts: str) -> Path:
    path = folder / name
    path.write_text("".join(f'{{"text": "{text}"}}\n' for text in texts))
    return path


def read(stage: Stage) -> tuple[list[int], list[list[int]], list[list[int]]]:
    return (
        stage.read(TOKENS, "int32").tolist(),
        stage.read(TRAIN, "int64", 2).tolist(),
        stage.read(HELD_OUT, "int64", 2).tolist(),
    )


def test_the_held_out_share_cuts_a_document_in_two(tmp_path: Path) -> None:
    path = written(tmp_path, "x.jsonl", "a the man dog", "a", "dog dog man a the a")
    stage = Stage(tmp_path / "tokens", {})
    tokenize(stage, Corpus(path), 0.3, TOKENIZER)
    ids, train, held = read(stage)
    assert ids == [A, THE, MAN, DOG, A, DOG, DOG, MAN, A, THE, A]
    # 3 of the 11 tokens are held out; the document of one token has nothing to predict.
    assert train == [[0, 4], [5, 8]]
    assert held == [[8, 11]]
    assert stage.result == {
        "tokens": 11,
        "documents": 2,
        "entries": 3 + 2,
        "heldout_entries": 2,
        "bad_rows": 0,
    }


def test_another_text_is_held_out_whole(tmp_path: Path) -> None:
    path = written(tmp_path, "x.jsonl", "a the", "man dog a")
    other = written(tmp_path, "y.jsonl", "the the the", "a", "dog man")
    other.write_text(other.read_text() + "oops\n")
    stage = Stage(tmp_path / "tokens", {})
    sizes: list[int] = []
    tokenize(stage, Corpus(path), Corpus(other), TOKENIZER, sizes.append)
    ids, train, held = read(stage)
    assert ids == [A, THE, MAN, DOG, A, THE, THE, THE, A, DOG, MAN]
    assert train == [[0, 2], [2, 5]]
    assert held == [[5, 8], [9, 11]]
    assert stage.result["entries"] == 1 + 2
    assert stage.result["heldout_entries"] == 2 + 1
    assert stage.result["bad_rows"] == 1
    assert sum(sizes) == path.stat().st_size + other.stat().st_size - len("oops\n")


@pytest.mark.parametrize("batch", [1, 20, 1 << 20])
def test_batches_change_nothing(
    tmp_path: Path, corpus_file: Path, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizing, "BATCH", batch)
    stage = Stage(tmp_path / "tokens", {})
    tokenize(stage, Corpus(corpus_file), 0.25, TOKENIZER)
    ids, train, held = read(stage)
    texts = [piece.text for piece in Corpus(corpus_file).pieces()]
    expected = [TOKENIZER(text)["input_ids"] for text in texts]
    assert ids == [token for text in expected for token in text]
    assert held[-1][1] == len(ids)
    assert entries_of(np.array(train)) == stage.result["entries"]
    assert entries_of(np.array(held)) == stage.result["heldout_entries"]


@pytest.mark.parametrize("share", [0.001, 0.999])
def test_nothing_to_hold_out_or_to_build_from_is_refused(tmp_path: Path, share: float) -> None:
    path = written(tmp_path, "x.jsonl", "a the man", "dog")
    with pytest.raises(CorpusError, match=r"found \d tokens with one that follows .* expected some of both"):
        tokenize(Stage(tmp_path / "tokens", {}), Corpus(path), share, TOKENIZER)
    assert not Stage(tmp_path / "tokens", {}).done


lengths = st.lists(st.integers(0, 40), min_size=1, max_size=8)


@given(lengths, st.integers(2, 50))
def test_windows_hold_each_entry_once(sizes: list[int], context: int) -> None:
    stops = np.cumsum(sizes)
    spans = np.array(
        [[stop - size, stop] for stop, size in zip(stops, sizes, strict=True) if size > 1], np.int64
    ).reshape(-1, 2)
    found = windows(spans, context)
    assert (found[:, 1] >= 1).all()
    assert (found[:, 1] <= context).all()
    covered = [place for begin, count in found.tolist() for place in range(begin, begin + count)]
    assert covered == [place for start, stop in spans.tolist() for place in range(start, stop - 1)]
    assert len(covered) == entries_of(spans)
    for start, stop in spans.tolist():  # as few as hold it
        own = [row for row in found.tolist() if start <= row[0] < stop]
        assert len(own) == -(-(stop - start - 1) // context)
