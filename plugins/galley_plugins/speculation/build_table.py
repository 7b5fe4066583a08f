"""Counting a corpus's tri-grams into a table, in bounded memory.

ADED (arXiv 2407.12021) and its authors' code: every three neighbouring tokens of a text count,
P(c | a, b) = count(a, b, c) / count(a, b, any), and the most probable successors of each bi-gram are kept as
they are. Sorted runs of counts go to disk and are merged range by range, so that the counts are exact however
large the corpus.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from galley_plugins.speculation.corpus import MOST_SUCCESSORS, Corpus, empty_corpus, save_corpus
from galley_plugins.speculation.store import tokenizer_hash

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

BLOCK = 1 << 21  # tri-grams counted in memory at once; about 300 MB while they are sorted
TEXT_BLOCK = 1 << 16  # characters of a text file that are one text
BATCH = 1 << 20  # characters that go to the tokenizer at once
BIGRAM_BYTES, TRIGRAM_BYTES = 4 + 8, 4 + 4  # on disk
_BITS = 21  # of a token id
MOST_TOKEN_IDS = 1 << _BITS
_MOST_COUNTED = 1 << 20  # counts of a bi-gram from which on they are not told apart, where some must go


class CorpusError(Exception):
    """The corpus cannot be read, or has nothing to count; the message says where and what was expected."""


@dataclass(frozen=True)
class Built:
    """What a table came to.

    Attributes:
        trigrams, bigrams: in the table.
        dropped: bi-grams that were left out for the bound.
        size: bytes of the file.
    """

    trigrams: int
    bigrams: int
    dropped: int
    size: int


class _Part(NamedTuple):
    """Some bi-grams with their successors, best first.

    Attributes:
        bigrams: int64 [bi-grams], first token << 21 | second, rising.
        totals: int64 [bi-grams], how often each was followed by anything.
        sizes: int64 [bi-grams], its successors here.
        tokens: int32 [tri-grams].
        probs: float32 [tri-grams].
    """

    bigrams: NDArray[np.int64]
    totals: NDArray[np.int64]
    sizes: NDArray[np.int64]
    tokens: NDArray[np.int32]
    probs: NDArray[np.float32]


def build_table(
    corpus: Path,
    out: Path,
    tokenizer: Any,
    *,
    successors: int = 12,
    table_bytes: int = 1 << 29,
    text_field: str = "text",
    progress: Callable[[int], None] | None = None,
) -> Built:
    """Count `corpus` and write the table to `out`.

    Args:
        corpus: a text file, a .jsonl file, or a folder with .txt and .jsonl files.
        tokenizer: one of Hugging Face's; special tokens are not added.
        successors: how many of a bi-gram's successors are kept, at most 32.
        table_bytes: the table's bound, about; the bi-grams that occur most rarely are left out for it.
        text_field: the field of a JSON line that holds a text, or a list of texts.
        progress: called with bytes read since the last call.

    Raises:
        CorpusError: the corpus cannot be read or has no three tokens in a row.
        TableFileError: the table cannot be written.
    """
    if not 1 <= successors <= MOST_SUCCESSORS:
        raise ValueError(f"successors: found {successors}, expected 1 to {MOST_SUCCESSORS}")
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
        counter = TrigramCounter(Path(folder))
        for texts, size in batches(corpus, text_field):
            encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
            for ids in encoded["input_ids"]:
                counter.add(ids)
            if progress is not None:
                progress(size)
        table, dropped = counter.table(successors, table_bytes)
        if len(table.tokens) == 0:
            raise CorpusError(f"{corpus} has no three tokens in a row that fit into the table")
        save_corpus(out, tokenizer_hash(tokenizer), table)
    return Built(len(table.tokens), len(table.second), dropped, out.stat().st_size)


def files_of(corpus: Path) -> list[Path]:
    """The files of a corpus in the order of their names; raises CorpusError if there are none."""
    if corpus.is_file():
        return [corpus]
    if not corpus.is_dir():
        raise CorpusError(f"{corpus} does not exist; expected a text file, a .jsonl file or a folder of them")
    files = sorted(path for path in corpus.rglob("*") if path.suffix in (".txt", ".jsonl") and path.is_file())
    if not files:
        raise CorpusError(f"{corpus} has no .txt and no .jsonl files")
    return files


def batches(corpus: Path, text_field: str) -> Iterator[tuple[list[str], int]]:
    """Texts of the corpus, some at a time, with the bytes that they took in its files."""
    texts: list[str] = []
    length = size = 0
    for path in files_of(corpus):
        read = _json_lines(path, text_field) if path.suffix == ".jsonl" else _text_blocks(path)
        try:
            for text, taken in read:
                texts.append(text)
                length += len(text)
                size += taken
                if length >= BATCH:
                    yield texts, size
                    texts, length, size = [], 0, 0
        except UnicodeDecodeError as error:
            raise CorpusError(f"{path} is not UTF-8: {error}") from None
        except OSError as error:
            raise CorpusError(f"cannot read {path}: {error}") from error
    if texts:
        yield texts, size


def _text_blocks(path: Path) -> Iterator[tuple[str, int]]:
    """A file in blocks that end with a line, where lines are not longer than a block."""
    rest = ""
    with path.open(encoding="utf-8") as file:
        while block := file.read(TEXT_BLOCK):
            text = rest + block
            end = text.rfind("\n") + 1 or len(text)
            rest = text[end:]
            yield text[:end], len(block.encode())
    if rest:
        yield rest, 0


def _json_lines(path: Path, text_field: str) -> Iterator[tuple[str, int]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise CorpusError(f"{path}, line {number}: no JSON ({error})") from None
            found = record.get(text_field) if isinstance(record, dict) else None
            texts = [found] if isinstance(found, str) else found
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                fields = sorted(record) if isinstance(record, dict) else type(record).__name__
                raise CorpusError(
                    f"{path}, line {number}: expected a text, or a list of texts, in the field "
                    f"{text_field!r}; found {fields}"
                )
            for index, text in enumerate(texts):
                yield text, len(line) if index == 0 else 0


class TrigramCounter:
    """Counts tri-grams of texts.

    Args:
        folder: where counts go that memory does not hold.
        block: tri-grams that are held in memory.
    """

    def __init__(self, folder: Path, block: int = BLOCK) -> None:
        self._folder = folder
        self._block = block
        self._waiting: list[NDArray[np.int64]] = []
        self._waiting_count = 0
        self._runs = 0

    def add(self, ids: list[int]) -> None:
        """Count one text's tri-grams."""
        tokens = np.asarray(ids, np.int64)
        if len(tokens) < 3:
            return
        if tokens.max() >= MOST_TOKEN_IDS:
            raise CorpusError(f"token id {tokens.max()}, expected less than {MOST_TOKEN_IDS}")
        keys = (tokens[:-2] << 2 * _BITS) | (tokens[1:-1] << _BITS) | tokens[2:]
        self._waiting.append(keys)
        self._waiting_count += len(keys)
        if self._waiting_count >= self._block:
            self._spill()

    def table(self, limit: int, table_bytes: int) -> tuple[Corpus, int]:
        """The table of everything counted, and how many bi-grams are left out for the bound.

        Args:
            limit: successors kept of a bi-gram; of equally frequent ones, those of the lowest ids.
            table_bytes: keeps the bi-grams counted most often; of equals, those of the lowest ids.
        """
        self._spill()
        costs = np.zeros(_MOST_COUNTED + 2, np.int64)  # bytes of the bi-grams that were counted so often
        total = 0
        free = table_bytes - 8
        parts: list[Path] = []
        for part in self._merged(limit):
            np.add.at(costs, _often(part), _bytes(part))
            parts.append(self._folder / f"part-{len(parts)}.npz")
            np.savez(parts[-1], **part._asdict())
            total += len(part.bigrams)
            free = table_bytes - 8 * (int(part.bigrams[-1] >> _BITS) + 2)
        above = costs[::-1].cumsum()[::-1]  # bytes of those that were counted at least so often
        if above[-1] > free:
            return empty_corpus(), total
        least = int(np.argmax(above <= free))
        spare = free - int(above[least]) if least else 0  # for some of those that were counted once less
        most = int(above[least]) + spare
        firsts = np.empty(most // BIGRAM_BYTES, np.int64)  # touched as far as they are filled
        second = np.empty(most // BIGRAM_BYTES, np.int32)
        offsets = np.zeros(most // BIGRAM_BYTES + 1, np.int64)
        tokens = np.empty(most // TRIGRAM_BYTES, np.int32)
        probs = np.empty(most // TRIGRAM_BYTES, np.float32)
        bigrams = trigrams = 0
        for place in parts:
            with np.load(place) as stored:
                part = _Part(**stored)
            next_best = _often(part) == least - 1
            spent = np.cumsum(np.where(next_best, _bytes(part), 0))
            kept = (_often(part) >= least) | (next_best & (spent <= spare))
            spare -= int(spent[next_best & kept].max(initial=0))
            kept_trigrams = np.repeat(kept, part.sizes)
            end, stop = bigrams + int(kept.sum()), trigrams + int(kept_trigrams.sum())
            firsts[bigrams:end] = part.bigrams[kept] >> _BITS
            second[bigrams:end] = part.bigrams[kept] & (MOST_TOKEN_IDS - 1)
            offsets[bigrams + 1 : end + 1] = trigrams + np.cumsum(part.sizes[kept])
            tokens[trigrams:stop] = part.tokens[kept_trigrams]
            probs[trigrams:stop] = part.probs[kept_trigrams]
            bigrams, trigrams = end, stop
        first = np.searchsorted(firsts[:bigrams], np.arange(int(firsts[bigrams - 1]) + 2 if bigrams else 1))
        corpus = Corpus(first, second[:bigrams], offsets[: bigrams + 1], tokens[:trigrams], probs[:trigrams])
        return corpus, total - bigrams

    def _spill(self) -> None:
        """Write the counts of what waits as a sorted run."""
        if not self._waiting_count:
            return
        keys, counts = np.unique(np.concatenate(self._waiting), return_counts=True)
        np.save(self._folder / f"keys-{self._runs}.npy", keys)
        np.save(self._folder / f"counts-{self._runs}.npy", counts)
        self._waiting, self._waiting_count = [], 0
        self._runs += 1

    def _merged(self, limit: int) -> Iterator[_Part]:
        """All counts, range by range of bi-grams."""
        runs = [
            tuple(np.load(self._folder / f"{name}-{run}.npy", mmap_mode="r") for name in ("keys", "counts"))
            for run in range(self._runs)
        ]
        for low, high in self._ranges([keys for keys, _ in runs]):
            keys, counts = [], []
            for run_keys, run_counts in runs:
                start, stop = np.searchsorted(run_keys, (low, high))
                keys.append(run_keys[start:stop])
                counts.append(run_counts[start:stop])
            if any(map(len, keys)):
                yield _top(np.concatenate(keys), np.concatenate(counts), limit)

    def _ranges(self, runs: list[NDArray[np.int64]]) -> list[tuple[int, int]]:
        """Ranges of keys with about a block of entries each, none of which splits a bi-gram."""
        if not runs:
            return []
        step = max(1, self._block // (16 * len(runs)))  # the runs together are off by a sixteenth at most
        each = max(1, self._block // step)
        sample = np.sort(np.concatenate([keys[step - 1 :: step] for keys in runs]))
        bounds = np.unique(sample[each - 1 :: each] >> _BITS << _BITS)
        edges = [0, *bounds[bounds > 0].tolist(), 1 << 3 * _BITS]
        return list(itertools.pairwise(edges))


def _often(part: _Part) -> NDArray[np.int64]:
    return np.minimum(part.totals, _MOST_COUNTED)


def _bytes(part: _Part) -> NDArray[np.int64]:
    """What each bi-gram takes of the table."""
    return BIGRAM_BYTES + TRIGRAM_BYTES * part.sizes


def _top(keys: NDArray[np.int64], counts: NDArray[np.int64], limit: int) -> _Part:
    """The most frequent successors of each bi-gram; equal keys are added up."""
    keys, inverse = np.unique(keys, return_inverse=True)
    summed = np.zeros(len(keys), np.int64)
    np.add.at(summed, inverse, counts)
    bigrams, starts, spans = np.unique(keys >> _BITS, return_index=True, return_counts=True)
    totals = np.add.reduceat(summed, starts)
    order = np.lexsort((keys, -summed, keys >> _BITS))
    rank = np.arange(len(keys)) - np.repeat(starts, spans)
    kept = order[rank < limit]
    sizes = np.minimum(spans, limit)
    probs = summed[kept] / np.repeat(totals, sizes)
    tokens = keys[kept] & (MOST_TOKEN_IDS - 1)
    return _Part(bigrams, totals, sizes, tokens.astype(np.int32), probs.astype(np.float32))
