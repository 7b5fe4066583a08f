"""Pairs to learn from, and their order.

Everything follows from the seed and the number of the step, so that a run that was interrupted goes on with
the batches it would have had.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

from galley_plugins.embedding.evaluation.data import DataError, Pairs, labelled, sts_pairs

if TYPE_CHECKING:
    from pathlib import Path

    from galley_plugins.embedding.evaluation.data import Labelled

ALIKE = 4.0  # scores from which on a pair says the same, of at most 5
_SORTED = 16  # batches whose pairs are sorted by length together


@dataclass(frozen=True)
class Batch:
    """Pairs of one step.

    Attributes:
        scores: how alike each pair is; None if all are, and no text is like one of another pair.
    """

    first: list[str]
    second: list[str]
    scores: list[float] | None


class Source(Protocol):
    """Batches by number, without end."""

    def batch(self, number: int) -> Batch:
        """The same for the same number."""


class ScoredPairs:
    """Labelled pairs, each once an epoch; pairs of a batch are of alike lengths.

    Args:
        size: pairs of a batch.
    """

    def __init__(self, pairs: Pairs, size: int, seed: int) -> None:
        if len(pairs) < size:
            raise DataError(f"found {len(pairs)} pairs, expected at least the batch of {size}")
        self._pairs, self._size, self._seed = pairs, size, seed
        self._lengths = [
            max(len(first), len(second)) for first, second in zip(pairs.first, pairs.second, strict=True)
        ]
        self._epoch = lru_cache(maxsize=2)(self._shuffled)

    def batch(self, number: int) -> Batch:
        epoch, place = divmod(number, len(self._pairs) // self._size)
        places = self._epoch(epoch)[place]
        pairs = self._pairs
        return Batch(
            [pairs.first[place] for place in places],
            [pairs.second[place] for place in places],
            [pairs.scores[place] for place in places],
        )

    def _shuffled(self, epoch: int) -> list[list[int]]:
        """The epoch's batches; pairs that would make a smaller one are left to other epochs."""
        draw = random.Random(f"{self._seed} {epoch}")  # noqa: S311
        order = list(range(len(self._pairs)))
        draw.shuffle(order)
        del order[len(order) // self._size * self._size :]
        batches = []
        for start in range(0, len(order), _SORTED * self._size):
            alike = sorted(order[start : start + _SORTED * self._size], key=self._lengths.__getitem__)
            batches += [alike[place : place + self._size] for place in range(0, len(alike), self._size)]
        draw.shuffle(batches)
        return batches


def alike_pairs(pairs: Pairs) -> Pairs:
    """Those that say the same."""
    kept = [place for place, score in enumerate(pairs.scores) if score >= ALIKE]
    return Pairs(
        [pairs.first[place] for place in kept],
        [pairs.second[place] for place in kept],
        [pairs.scores[place] for place in kept],
    )


class AlikePairs:
    """Pairs that say the same, as the positives of each other; all other texts of a batch are negatives."""

    def __init__(self, pairs: Pairs, size: int, seed: int) -> None:
        self._pairs = ScoredPairs(alike_pairs(pairs), size, seed)

    def batch(self, number: int) -> Batch:
        found = self._pairs.batch(number)
        return Batch(found.first, found.second, None)


class ClassPairs:
    """Two texts of the same class, and each class once in a batch at the most.

    Args:
        size: pairs of a batch; fewer if there are not so many classes.
    """

    def __init__(self, texts: Labelled, size: int, seed: int) -> None:
        classes: dict[str, list[str]] = {}
        for text, label in zip(texts.texts, texts.labels, strict=True):
            classes.setdefault(label, []).append(text)
        self._classes = [members for _, members in sorted(classes.items()) if len(members) > 1]
        if len(self._classes) < 2:
            raise DataError(f"found {len(self._classes)} classes of two texts or more, expected at least 2")
        self._size, self._seed = min(size, len(self._classes)), seed

    def batch(self, number: int) -> Batch:
        draw = random.Random(f"{self._seed} classes {number}")  # noqa: S311
        chosen = [draw.sample(members, 2) for members in draw.sample(self._classes, self._size)]
        return Batch([first for first, _ in chosen], [second for _, second in chosen], None)


class Blend:
    """Two sources in turn.

    Args:
        share: of the steps, how many take `second`; 0 to 1.
    """

    def __init__(self, first: Source, second: Source, share: float) -> None:
        self._first, self._second, self._share = first, second, share

    def batch(self, number: int) -> Batch:
        before, after = int(number * self._share), int((number + 1) * self._share)
        return self._second.batch(before) if after > before else self._first.batch(number - before)


@dataclass(frozen=True)
class TrainingData:
    """The data sets of a folder.

    Attributes:
        train, dev, test: of STS-B.
        classes: banking77's training texts.
        digest: SHA-256 of what is trained on.
    """

    train: Pairs
    dev: Pairs
    test: Pairs
    classes: Labelled
    digest: str

    @classmethod
    def read(cls, folder: Path) -> TrainingData:
        """
        Raises:
            DataError: a file is missing or wrong.
        """
        train, classes = folder / "sts" / "stsb_en_train.csv", folder / "cls" / "train.csv"
        dev, test = (sts_pairs(folder / "sts" / f"stsb_en_{split}.csv") for split in ("dev", "test"))
        read = cls(sts_pairs(train), dev, test, labelled(classes), "")
        digest = hashlib.sha256(train.read_bytes() + classes.read_bytes()).hexdigest()
        return cls(read.train, read.dev, read.test, read.classes, digest)


def spread(pairs: Pairs, count: int) -> Pairs:
    """`count` of them, evenly taken, since files go genre by genre."""
    if count >= len(pairs):
        return pairs
    places = [place * len(pairs) // count for place in range(count)]
    return Pairs(
        [pairs.first[place] for place in places],
        [pairs.second[place] for place in places],
        [pairs.scores[place] for place in places],
    )
