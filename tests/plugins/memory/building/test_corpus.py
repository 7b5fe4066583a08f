"""Documents of files and folders, and rows that cannot be read."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from galley_plugins.memory.building import corpus as reading
from galley_plugins.memory.building.corpus import Corpus, CorpusError

if TYPE_CHECKING:
    from pathlib import Path


def documents(corpus: Corpus) -> list[str]:
    found = [""]
    for piece in corpus.pieces():
        found[-1] += piece.text
        if piece.last:
            found.append("")
    assert found.pop() == ""
    return found


@pytest.mark.parametrize("block", [1, 2, 7, 32, 1 << 16])
@pytest.mark.parametrize(
    "text",
    ["", "\n", "x" * 100, "one\n\ntwo\nthree", "line one\nline two\nline three\n" * 9, "ä\n\n€😀" * 40],
)
def test_a_text_file_is_one_document_whatever_the_block(
    tmp_path: Path, text: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "BLOCK", block)
    path = tmp_path / "text.txt"
    path.write_text(text, encoding="utf-8")
    pieces = list(Corpus(path).pieces())
    assert "".join(piece.text for piece in pieces) == text
    assert [piece.last for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert sum(piece.size for piece in pieces) == path.stat().st_size == Corpus(path).size()


@given(st.text(alphabet="ab\né€😀", max_size=200), st.integers(8, 40))
def test_pieces_end_at_lines_that_fit_a_block(
    tmp_path_factory: pytest.TempPathFactory, text: str, block: int
) -> None:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(text, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "BLOCK", block)
        pieces = [piece.text for piece in Corpus(path).pieces()]
    assert "".join(pieces) == text
    longest = max(len(line) for line in f"{text}\n".splitlines())
    if longest < block:
        assert all(piece.endswith("\n") for piece in pieces[:-1])


def test_line_ends_of_windows_become_plain_ones(tmp_path: Path) -> None:
    path = tmp_path / "text.md"
    path.write_bytes(b"one\r\ntwo\r\n")
    assert documents(Corpus(path)) == ["one\ntwo\n"]
    assert sum(piece.size for piece in Corpus(path).pieces()) == 10


def test_rows_of_json_lines_are_documents(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text('{"turns": ["one", "two"]}\n\n{"turns": "three", "text": "no"}\r\n{"turns": ""}')
    corpus = Corpus(path, "turns")
    assert documents(corpus) == ["one", "two", "three", ""]
    assert corpus.bad == 0


def test_rows_of_parquet_are_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "PARQUET_ROWS", 2)
    path = tmp_path / "table.parquet"
    table = pa.table({"text": ["one", None, "two", "three", ""], "other": [1, 2, 3, 4, 5]})
    parquet.write_table(table, path)
    told: list[str] = []
    corpus = Corpus(path, told=told.append)
    assert documents(corpus) == ["one", "two", "three", ""]
    assert told == [f"{path}, row 2: expected a text, or a list of texts, in 'text'; found NoneType"]
    parquet.write_table(pa.table({"text": [["one", "two"], ["three"]]}), path)
    assert documents(Corpus(path)) == ["one", "two", "three"]
    assert sum(piece.size for piece in Corpus(path).pieces()) == path.stat().st_size


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("two\n")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
    (tmp_path / "sub" / "a.md").write_text("four")
    parquet.write_table(pa.table({"text": ["three"]}), tmp_path / "c.parquet")
    (tmp_path / "ignored.bin").write_bytes(b"\xff")
    corpus = Corpus(tmp_path)
    assert documents(corpus) == ["one", "two\n", "three", "four"]
    assert corpus.size() == sum(path.stat().st_size for path in tmp_path.rglob("*.*")) - 1


BAD_ROWS = [
    (b'{"text": 5}', "line 2: expected a text, or a list of texts, in 'text'; found ['text']"),
    (b'{"body": "a"}', "line 2: expected a text, or a list of texts, in 'text'; found ['body']"),
    (b'["a"]', "line 2: expected a text, or a list of texts, in 'text'; found list"),
    (b'{"text": ["a", 1]}', "line 2: expected a text"),
    (b'{"text": []}', "line 2: expected a text"),
    (b"{oops", "line 2: no JSON"),
    (b'{"text": "\xff"}', "line 2: no JSON"),
    (b"[" * 100_000, "line 2: no JSON"),
    (b'{"text": "a \\ud800 b"}', "line 2: expected a text"),
]


@pytest.mark.parametrize(("row", "message"), BAD_ROWS, ids=range(len(BAD_ROWS)))
def test_a_bad_row_is_told_and_left_out(tmp_path: Path, row: bytes, message: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "one"}\n' + row + b'\n{"text": "two"}\n')
    told: list[str] = []
    corpus = Corpus(path, told=told.append)
    assert documents(corpus) == ["one", "two"]
    assert corpus.bad == 1
    (line,) = told
    assert line.startswith(f"{path}, {message}")


def test_too_many_bad_rows_end_the_reading(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("".join(f'{{"text": {value}}}\n' for value in (1, '"one"', 2, 3, '"two"')))
    assert documents(Corpus(path, most_bad=3)) == ["one", "two"]
    told: list[str] = []
    corpus = Corpus(path, most_bad=2, told=told.append)
    with pytest.raises(
        CorpusError, match=r"more than 2 rows are wrong, the last is .*line 4: expected a text"
    ):
        documents(corpus)
    assert len(told) == 3


def test_rows_are_counted_anew_in_each_reading(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": 1}\n{"text": "one"}\n')
    corpus = Corpus(path, most_bad=1)
    for _ in range(3):
        assert documents(corpus) == ["one"]
        assert corpus.bad == 1


def test_what_is_not_utf_8_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"caf\xe9 \n")
    with pytest.raises(CorpusError, match=r"x\.txt is not UTF-8: .*0xe9"):
        documents(Corpus(tmp_path))


def test_a_damaged_parquet_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    path.write_bytes(b"no table at all")
    with pytest.raises(CorpusError, match=r"x\.parquet is no readable Parquet file"):
        documents(Corpus(path))
    parquet.write_table(pa.table({"text": [f"text {row}" for row in range(5000)]}), path)
    whole = path.read_bytes()
    path.write_bytes(whole[:100] + bytes(2000) + whole[2100:])  # pages, not the footer
    with pytest.raises(CorpusError, match=r"x\.parquet"):
        documents(Corpus(path))


def test_a_parquet_file_without_the_column_is_refused(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"body": ["one"], "n": [1]}), tmp_path / "x.parquet")
    with pytest.raises(CorpusError, match=r"found the columns \['body', 'n'\], expected 'text'"):
        documents(Corpus(tmp_path))


def test_nothing_to_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="nothing does not exist; expected a file or a folder"):
        documents(Corpus(tmp_path / "nothing"))
    with pytest.raises(CorpusError, match=r"has no files of \.txt, \.md, \.jsonl, \.parquet"):
        documents(Corpus(tmp_path))


@pytest.mark.skipif(os.getuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("one")
    path.chmod(0)
    with pytest.raises(CorpusError, match=r"cannot read .*x\.txt: Permission denied"):
        documents(Corpus(path))


def test_the_digest_follows_contents_and_the_field(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jsonl").write_text(json.dumps({"text": "a"}))
    first, second = Corpus(tmp_path / "one"), Corpus(tmp_path / "two")
    assert first.digest() == second.digest()
    assert first.digest() != Corpus(tmp_path / "one", "body").digest()
    (tmp_path / "two" / "b.txt").write_text("")
    assert first.digest() != second.digest()
    (tmp_path / "one" / "a.jsonl").write_text(json.dumps({"text": "b"}))
    assert first.digest() != Corpus(tmp_path / "two" / "a.jsonl").digest()
