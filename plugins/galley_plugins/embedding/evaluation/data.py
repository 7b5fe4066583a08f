"""Readers of the public data sets that embeddings are measured on.

A file that is not what it should be is refused with its line, what was found there and what was expected.
"""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class DataError(ValueError):
    """A data file is missing or not in its format."""


@dataclass(frozen=True)
class Pairs:
    """Sentence pairs and how alike people found them, 0 to 5."""

    first: list[str]
    second: list[str]
    scores: list[float]

    def __len__(self) -> int:
        return len(self.scores)

    def spread(self, count: int | None) -> Pairs:
        """`count` of them at equal distances, since files are often sorted by genre; else all."""
        if count is None or count >= len(self):
            return self
        places = [index * len(self) // count for index in range(count)]
        first, second, scores = self.first, self.second, self.scores
        return Pairs(
            [first[place] for place in places],
            [second[place] for place in places],
            [scores[place] for place in places],
        )


@dataclass(frozen=True)
class Retrieval:
    """Documents and queries by id, and gains by query id and document id."""

    documents: dict[str, str]
    queries: dict[str, str]
    gains: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Labelled:
    """Texts of classes."""

    texts: list[str]
    labels: list[str]


def data_folder(folder: Path | None) -> Path:
    """The folder, if there is one.

    Raises:
        DataError: saying what it should hold.
    """
    if folder is None or not folder.is_dir():
        raise DataError(
            f"--data: found {folder}, expected a folder with sts/stsb_en_test.csv, from github.com/PhilipMay/"
            "stsb-multi-mt; retrieval/cran.all.1400.xml, cran.qry.xml and cranqrel.trec.txt, from github.com/"
            "oussbenk/cranfield-trec-dataset; cls/train.csv and test.csv, banking77 from github.com/"
            "PolyAI-LDN/task-specific-datasets"
        )
    return folder


def sts_pairs(path: Path) -> Pairs:
    """A CSV of `sentence,sentence,score` without a header, as the STS benchmark is published.

    Raises:
        DataError: naming the line.
    """
    pairs = Pairs([], [], [])
    for number, row in _rows(path):
        if len(row) != 3:
            raise DataError(f"{path}:{number}: found {len(row)} columns, expected sentence, sentence, score")
        try:
            score = float(row[2])
        except ValueError:
            raise DataError(f"{path}:{number}: found a score of {row[2]!r}, expected a number") from None
        pairs.first.append(row[0])
        pairs.second.append(row[1])
        pairs.scores.append(score)
    if len(pairs) < 2:
        raise DataError(f"{path}: found {len(pairs)} pairs, expected at least 2")
    return pairs


def labelled(path: Path) -> Labelled:
    """A CSV of `text,category` with that header, as banking77 is published.

    Raises:
        DataError: naming the line.
    """
    rows = _rows(path)
    _, header = next(rows, (1, []))
    if header != ["text", "category"]:
        raise DataError(f"{path}:1: found the columns {', '.join(header)}, expected text, category")
    found = Labelled([], [])
    for number, row in rows:
        if len(row) != 2:
            raise DataError(f"{path}:{number}: found {len(row)} columns, expected text, category")
        found.texts.append(row[0])
        found.labels.append(row[1])
    return found


def cranfield(folder: Path) -> Retrieval:
    """The Cranfield collection in TREC's format; judgments number queries by their place in the file.

    Raises:
        DataError: naming the file or line.
    """
    documents = {
        number.strip(): _clean(body)
        for number, body in re.findall(
            r"<docno>(.*?)</docno>.*?<text>(.*?)</text>", _read(folder / "cran.all.1400.xml"), re.DOTALL
        )
    }
    titles = re.findall(r"<title>(.*?)</title>", _read(folder / "cran.qry.xml"), re.DOTALL)
    queries = {str(place): _clean(title) for place, title in enumerate(titles, 1)}
    gains: dict[str, dict[str, float]] = {}
    path = folder / "cranqrel.trec.txt"
    for number, line in enumerate(_read(path).splitlines(), 1):
        parts = line.split()
        if len(parts) != 4:
            raise DataError(f"{path}:{number}: found {len(parts)} columns, expected query, 0, document, gain")
        gains.setdefault(parts[0], {})[parts[2]] = float(parts[3])
    if not documents or not queries:
        raise DataError(
            f"{folder}: found {len(documents)} documents and {len(queries)} queries, expected some"
        )
    return Retrieval(documents, queries, gains)


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(_read(path).splitlines(keepends=True))
    for row in reader:
        yield reader.line_num, row


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None


def _clean(text: str) -> str:
    return " ".join(text.split())
