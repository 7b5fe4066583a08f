"""Texts of an exact number of tokens, cut from the abstracts of the Cranfield collection."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from galley_plugins.embedding.evaluation.data import cranfield, sts_pairs

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

FORBIDDEN = "\"?'"  # what a prompt's cleaning of texts would change


def data_folder(given: Path | None, environment: Mapping[str, str]) -> Path:
    """The folder with `sts/`, `retrieval/` and `cls/`: the given one, else `$GALLEY_DATA`.

    Raises:
        FileNotFoundError: it is not there, or nothing says where.
    """
    named = given or Path(environment.get("GALLEY_DATA", ""))
    if named == Path():
        raise FileNotFoundError("name the folder with sts/, retrieval/ and cls/ with --data or GALLEY_DATA")
    if not (named / "retrieval").is_dir():
        raise FileNotFoundError(
            f"{named} has no folder retrieval/, expected the Cranfield collection there; "
            "`galley embed eval` without --data says where all data sets come from"
        )
    return named


def abstracts(folder: Path) -> list[str]:
    """The Cranfield collection's documents; one of them has no text."""
    return [text for text in cranfield(folder / "retrieval").documents.values() if text]


def sentences(folder: Path, count: int, words: int = 150) -> list[str]:
    """Sentences of STS-B's dev set and, every eighth, the first `words` of an abstract.

    All end with a full stop and have no quotation marks, so that a prompt takes them as they are.
    """
    short = [text for text in sts_pairs(folder / "sts" / "stsb_en_dev.csv").first if _is_plain(text)]
    found = short[:count]
    for place, text in zip(range(7, count, 8), abstracts(folder), strict=False):
        cut = " ".join(text.split()[:words])
        found[place] = "".join(sign for sign in cut if sign not in FORBIDDEN).rstrip(" .,") + "."
    return found


def _is_plain(text: str) -> bool:
    return text.endswith(".") and not set(text) & set(FORBIDDEN)


class Texts:
    """Texts of any number of tokens; the same arguments give the same texts in every run.

    Args:
        tokenizer: a fast tokenizer of transformers.
        sources: running text to cut from.
    """

    def __init__(self, tokenizer: Any, sources: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        spaced = [f" {text}" for text in sources]
        self._sources: list[list[int]] = tokenizer(spaced, add_special_tokens=False)["input_ids"]

    def of_length(self, length: int, count: int) -> list[str]:
        """`count` different texts of `length` tokens, as the tokenizer counts them alone.

        Raises:
            ValueError: there is too little to cut from.
        """
        found: dict[str, None] = {}
        for turn in itertools.count():
            before = len(found)
            for text in self._cut(length, random.Random(f"{length} {turn}")):
                found[text] = None
                if len(found) == count:
                    return list(found)
            if len(found) == before:
                break
        raise ValueError(f"found {len(found)} different texts of {length} tokens, expected {count}")

    def _cut(self, length: int, order: random.Random) -> Iterator[str]:
        """Stretches that begin with a word and have as many tokens when they stand alone."""
        shuffled = order.sample(self._sources, len(self._sources))
        ids = list(itertools.chain.from_iterable(shuffled))
        start = 0
        while start + length <= len(ids):
            text = self._tokenizer.decode(ids[start : start + length], clean_up_tokenization_spaces=False)
            alone = text.strip()
            if text.startswith(" ") and len(self._tokenizer(alone)["input_ids"]) == length:
                yield alone
                start += length
            else:
                start += 1
