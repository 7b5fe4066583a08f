"""Counting corpora: probabilities and cuts by hand, and blocks that must not matter."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from typing import TYPE_CHECKING

import numpy as np
import pytest
from transformers import AutoTokenizer

from galley_plugins.speculation import build_table as building
from galley_plugins.speculation.build_table import CorpusError, TrigramCounter, batches, build_table
from galley_plugins.speculation.corpus import Corpus, load_corpus, span
from galley_plugins.speculation.store import tokenizer_hash

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase


@pytest.fixture
def tokenizer(tokenizer_folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tokenizer_folder)


def successors(corpus: Corpus, a: int, b: int) -> dict[int, float]:
    start, end = span(corpus, a, b)
    return dict(zip(corpus.tokens[start:end].tolist(), corpus.probs[start:end].tolist(), strict=True))


def as_dict(corpus: Corpus) -> dict[tuple[int, int], dict[int, float]]:
    firsts = np.repeat(np.arange(len(corpus.first) - 1), np.diff(corpus.first))
    return {
        (a, b): successors(corpus, a, b) for a, b in zip(firsts.tolist(), corpus.second.tolist(), strict=True)
    }


def texts_of(corpus: Path, field: str = "text") -> list[str]:
    return [text for texts, _ in batches(corpus, field) for text in texts]


def test_probabilities_are_relative_frequencies(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("a b c a b d a b c\n")  # (a, b) -> c twice, d once; the others are certain
    built = build_table(corpus, tmp_path / "table", tokenizer)
    table = load_corpus(tmp_path / "table", tokenizer_hash(tokenizer), len(tokenizer))
    assert as_dict(table) == {
        (1, 2): {3: pytest.approx(2 / 3), 4: pytest.approx(1 / 3)},
        (2, 3): {1: 1.0},
        (2, 4): {1: 1.0},
        (3, 1): {2: 1.0},
        (4, 1): {2: 1.0},
    }
    assert (built.trigrams, built.bigrams, built.dropped) == (6, 5, 0)
    assert built.size == (tmp_path / "table").stat().st_size


def test_trigrams_do_not_cross_texts(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    corpus = tmp_path / "corpus.jsonl"
    lines = [{"text": "a b c"}, {"text": "a b"}, {"text": "d"}, {"text": ""}, {"text": "a b d"}]
    corpus.write_text("\n\n".join(map(json.dumps, lines)))
    build_table(corpus, tmp_path / "table", tokenizer)
    table = load_corpus(tmp_path / "table", tokenizer_hash(tokenizer), len(tokenizer))
    assert as_dict(table) == {(1, 2): {3: 0.5, 4: 0.5}}


def counted(texts: list[list[int]], folder: Path, block: int = 1 << 20) -> TrigramCounter:
    counter = TrigramCounter(folder, block)
    for text in texts:
        counter.add(text)
    return counter


def test_the_twelve_most_probable_successors_stay_as_they_are(tmp_path: Path) -> None:
    # After (1, 2): token 100 + n follows n times, for n = 1 to 14, and 200 once.
    texts = [[1, 2, 100 + n] for n in range(1, 15) for _ in range(n)] + [[1, 2, 200]]
    table, _ = counted(texts, tmp_path).table(12, 1 << 20)
    total = sum(range(1, 15)) + 1
    expected = {100 + n: pytest.approx(n / total) for n in range(14, 2, -1)}
    assert successors(table, 1, 2) == expected
    assert list(successors(table, 1, 2)) == list(expected)  # the most probable first


def test_of_equally_frequent_successors_the_lowest_ids_stay(tmp_path: Path) -> None:
    texts = [[1, 2, token] for token in (9, 5, 7, 3)]
    table, _ = counted(texts, tmp_path).table(2, 1 << 20)
    assert successors(table, 1, 2) == {3: 0.25, 5: 0.25}


@pytest.mark.parametrize("block", [1, 10, 100, 5000])
def test_blocks_on_disk_change_nothing(tmp_path: Path, block: int) -> None:
    random = np.random.default_rng(0)
    texts = [(random.zipf(1.4, 60) % 40).tolist() for _ in range(40)]
    counts: defaultdict[tuple[int, int], Counter[int]] = defaultdict(Counter)
    for text in texts:
        for a, b, c in zip(text, text[1:], text[2:], strict=False):
            counts[a, b][c] += 1
    expected = {}
    for bigram, row in counts.items():
        best = sorted(row.items(), key=lambda item: (-item[1], item[0]))[:3]
        expected[bigram] = {c: pytest.approx(count / row.total()) for c, count in best}
    table, dropped = counted(texts, tmp_path, block).table(3, 1 << 30)
    assert dropped == 0
    assert as_dict(table) == expected


def test_the_rarest_bigrams_are_left_out_for_the_bound(tmp_path: Path) -> None:
    texts = [[a, 0, 5] for a in range(10) for _ in range(a + 1)]  # (a, 0) is followed a + 1 times
    for bound in (100_000, 400, 200, 100, 50):
        folder = tmp_path / str(bound)
        folder.mkdir()
        table, dropped = counted(texts, folder).table(12, bound)
        kept = [a for a in range(10) if successors(table, a, 0)]
        assert kept == list(range(dropped, 10))
        assert sum(array.nbytes for array in table) <= bound + 8  # one offset more
        # 20 bytes for each, and for the 10 possible first tokens 88
        assert len(kept) == min(10, max(0, (bound - 88) // 20))


@pytest.mark.parametrize("block", [1, 7, 1000])
def test_of_equally_rare_bigrams_the_lowest_ids_fill_the_bound(tmp_path: Path, block: int) -> None:
    texts = [[a, 0, c] for a in range(10) for c in range(1 + a % 2)] + [[9, 0, 0]]
    # (9, 0) is followed three times, the other odd ones twice, the even ones once. The possible first tokens
    # take 88 bytes, an odd one 28, an even one 20: 88 + 5 * 28 + 2 * 20 = 268.
    table, dropped = counted(texts, tmp_path, block).table(12, 275)
    assert [a for a in range(10) if successors(table, a, 0)] == [0, 1, 2, 3, 5, 7, 9]
    assert dropped == 3


def test_ids_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    counted([[2**21 - 1] * 3], tmp_path)
    with pytest.raises(CorpusError, match="token id 2097152"):
        counted([[1, 2, 2**21]], tmp_path)


def test_a_folder_is_read_file_by_file(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("two\n")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
    (tmp_path / "sub" / "c.txt").write_text("three")
    (tmp_path / "ignored.bin").write_bytes(b"\xff")
    assert texts_of(tmp_path) == ["one", "two\n", "three"]


def test_a_field_may_hold_several_texts(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text('{"turns": ["one", "two"]}\n{"turns": "three"}\n')
    assert texts_of(path, "turns") == ["one", "two", "three"]


@pytest.mark.parametrize("text", ["", "x" * 100, "line one\nline two\nline three\n" * 9, "ä\n\n€" * 40])
def test_a_text_is_read_in_blocks_of_whole_lines(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "TEXT_BLOCK", 32)
    monkeypatch.setattr(building, "BATCH", 64)
    path = tmp_path / "text.txt"
    path.write_text(text, encoding="utf-8")
    texts = texts_of(path)
    assert "".join(texts) == text
    assert all(len(block) <= 64 for block in texts)
    assert "\n" not in text or all(block.endswith("\n") for block in texts[:-1])
    assert sum(size for _, size in batches(path, "text")) == path.stat().st_size


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b'{"text": "a"}\n{"text": 5}\n', "line 2: expected a text, .* 'text'; found .'text'."),
        ("x.jsonl", b'{"body": "a"}\n', "line 1: .* in the field 'text'; found .'body'."),
        ("x.jsonl", b'["a"]\n', "line 1: .*; found list"),
        ("x.jsonl", b'{"text": ["a", 1]}\n', "line 1: expected"),
        ("x.jsonl", b"{oops\n", "line 1: no JSON"),
        ("x.jsonl", b'{"text": "\xff"}\n', "x.jsonl"),
        ("x.txt", b"caf\xe9 \n", "x.txt is not UTF-8"),
        ("x.txt", b"a b", "no three tokens in a row"),
        ("x.txt", b"", "no three tokens in a row"),
    ],
)
def test_a_bad_corpus_is_refused_by_its_place(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match=message):
        build_table(tmp_path / name, tmp_path / "table", tokenizer)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "tokenizer"])


def test_nothing_to_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="does not exist"):
        texts_of(tmp_path / "nothing")
    with pytest.raises(CorpusError, match=r"no \.txt and no \.jsonl"):
        texts_of(tmp_path)


@pytest.mark.parametrize("successors_kept", [0, 33])
def test_successors_have_bounds(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, successors_kept: int
) -> None:
    with pytest.raises(ValueError, match=f"found {successors_kept}, expected 1 to 32"):
        build_table(tmp_path, tmp_path / "table", tokenizer, successors=successors_kept)
