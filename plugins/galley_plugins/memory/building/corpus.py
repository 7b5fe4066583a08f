"""A corpus, read once from front to back in little memory: text, JSON lines or Parquet, one file or a folder.

A row that cannot be read is told to the caller and left out; too many of them end the reading.
"""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")
BLOCK = 1 << 16  # characters of a text file that are one piece
PARQUET_ROWS = 256  # read at once


class CorpusError(ValueError):
    """The corpus cannot be read, or too much of it is wrong; the message says where and what was expected."""


class Piece(NamedTuple):
    """Part of a document.

    Attributes:
        text: at a line's end where the document goes on.
        last: the document ends here.
        size: bytes of the corpus's files that were read for it.
    """

    text: str
    last: bool
    size: int


@dataclass
class Corpus:
    """The documents of a file or folder: a text file is one, a row of JSON lines or Parquet is one each.

    Attributes:
        text_field: of a row, that holds its text or a list of texts.
        most_bad: rows that may be wrong before the reading ends.
        told: called with each wrong row's place and what is wrong.
        bad: wrong rows so far.
    """

    path: Path
    text_field: str = "text"
    most_bad: int = 100
    told: Callable[[str], None] | None = None
    bad: int = field(default=0, init=False)

    def files(self) -> list[Path]:
        """In the order of their names.

        Raises:
            CorpusError: there are none.
        """
        if self.path.is_file():
            return [self.path]
        if not self.path.is_dir():
            raise CorpusError(
                f"{self.path} does not exist; expected a file or a folder of {', '.join(SUFFIXES)}"
            )
        found = sorted(path for path in self.path.rglob("*") if path.suffix in SUFFIXES and path.is_file())
        if not found:
            raise CorpusError(f"{self.path} has no files of {', '.join(SUFFIXES)}")
        return found

    def size(self) -> int:
        """Bytes of its files."""
        return sum(path.stat().st_size for path in self.files())

    def digest(self) -> str:
        """SHA-256 over the files' contents, and what is read of them."""
        digest = hashlib.sha256(self.text_field.encode())
        for path in self.files():
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def pieces(self) -> Iterator[Piece]:
        """
        Raises:
            CorpusError: a file cannot be read, or more than `most_bad` rows are wrong.
        """
        self.bad = 0
        for path in self.files():
            try:
                if path.suffix == ".jsonl":
                    yield from self._json_lines(path)
                elif path.suffix == ".parquet":
                    yield from self._parquet(path)
                else:
                    yield from _text(path)
            except UnicodeDecodeError as error:
                raise CorpusError(f"{path} is not UTF-8: {error}") from None
            except OSError as error:
                raise CorpusError(f"cannot read {path}: {error.strerror or error}") from error

    def _json_lines(self, path: Path) -> Iterator[Piece]:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError) as error:
                    self._wrong(f"{path}, line {number}", f"no JSON ({error})")
                    continue
                value = record.get(self.text_field) if isinstance(record, dict) else None
                found = sorted(record) if isinstance(record, dict) else type(record).__name__
                yield from self._texts(value, f"{path}, line {number}", found, len(line))

    def _parquet(self, path: Path) -> Iterator[Piece]:
        import pyarrow
        from pyarrow import parquet

        try:
            file = parquet.ParquetFile(path)
        except pyarrow.ArrowException as error:
            raise CorpusError(f"{path} is no readable Parquet file: {error}") from None
        if self.text_field not in file.schema_arrow.names:
            raise CorpusError(
                f"{path}: found the columns {file.schema_arrow.names}, expected {self.text_field!r}"
            )
        rows = max(file.metadata.num_rows, 1)
        size, number = path.stat().st_size, 0
        for batch in file.iter_batches(PARQUET_ROWS, columns=[self.text_field]):
            for value in batch.column(0).to_pylist():
                number += 1
                read = size * number // rows - size * (number - 1) // rows
                yield from self._texts(value, f"{path}, row {number}", type(value).__name__, read)

    def _texts(self, value: object, place: str, found: object, size: int) -> Iterator[Piece]:
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not texts or not all(_is_text(text) for text in texts):
            self._wrong(place, f"expected a text, or a list of texts, in {self.text_field!r}; found {found}")
            return
        for index, text in enumerate(texts):
            yield Piece(text, last=True, size=size if index == 0 else 0)

    def _wrong(self, place: str, what: str) -> None:
        self.bad += 1
        if self.told is not None:
            self.told(f"{place}: {what}")
        if self.bad > self.most_bad:
            raise CorpusError(f"more than {self.most_bad} rows are wrong, the last is {place}: {what}")


def _is_text(value: object) -> bool:
    """Half of a surrogate pair, which JSON can hold, is none."""
    try:
        return isinstance(value, str) and (value.isascii() or bool(value.encode()))
    except UnicodeEncodeError:
        return False


def _text(path: Path) -> Iterator[Piece]:
    rest, size, read = "", 0, 0
    with path.open("rb") as raw, io.TextIOWrapper(raw, encoding="utf-8") as file:
        while block := file.read(BLOCK):
            text = rest + block
            size += raw.tell() - read
            read = raw.tell()
            end = text.rfind("\n") + 1 or len(text)
            if end < len(text) or len(block) == BLOCK:
                yield Piece(text[:end], last=False, size=size)
                size = 0
                rest = text[end:]
            else:
                rest = text
    yield Piece(rest, last=True, size=size)
