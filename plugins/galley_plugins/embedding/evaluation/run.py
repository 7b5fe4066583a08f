"""The three tasks that `galley embed eval` runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from galley_plugins.embedding.evaluation import data, metrics

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray


class Encoder(Protocol):
    """Anything that embeds texts."""

    def encode(
        self, texts: Sequence[str], *, done: Callable[[int], None] = ..., **fields: Any
    ) -> NDArray[Any]:
        """[texts, dimensions] float32, in order."""


@dataclass(frozen=True)
class Result:
    """One figure of one task."""

    task: str
    metric: str
    value: float
    texts: int


class Progress(Protocol):
    """Told what is embedded."""

    def begin(self, task: str, texts: int) -> Callable[[int], None]:
        """Announce texts; the result is called as they are done."""


def sts(folder: Path, encoder: Encoder, progress: Progress, limit: int | None, split: str) -> Result:
    """STS benchmark: Spearman's correlation of cosines with people's scores."""
    pairs = data.sts_pairs(folder / "sts" / f"stsb_en_{split}.csv").spread(limit)
    done = progress.begin("sts", 2 * len(pairs))
    vectors = encoder.encode([*pairs.first, *pairs.second], done=done)
    value = metrics.sts_spearman(vectors[: len(pairs)], vectors[len(pairs) :], pairs)
    return Result("sts", f"Spearman, STS-B {split}", value, 2 * len(pairs))


def cranfield(folder: Path, encoder: Encoder, progress: Progress, limit: int | None, split: str) -> Result:
    """Cranfield: nDCG@10. Queries are embedded as queries, documents as documents, long ones cut."""
    retrieval = data.cranfield(folder / "retrieval")
    queries = dict(list(retrieval.queries.items())[:limit])
    retrieval = data.Retrieval(retrieval.documents, queries, retrieval.gains)
    texts = len(queries) + len(retrieval.documents)
    done = progress.begin("cranfield", texts)
    asked = encoder.encode(list(queries.values()), done=done, input_type="query", truncate=True)
    found = encoder.encode(
        # A document without a text is never found.
        [text or "-" for text in retrieval.documents.values()],
        done=done, input_type="document", truncate=True,
    )  # fmt: skip
    return Result("cranfield", "nDCG@10, Cranfield", metrics.ndcg(asked, found, retrieval), texts)


def banking77(folder: Path, encoder: Encoder, progress: Progress, limit: int | None, split: str) -> Result:
    """banking77: accuracy of logistic regression on the vectors."""
    train = data.labelled(folder / "cls" / "train.csv")
    test = data.labelled(folder / "cls" / "test.csv")
    train, test = _spread(train, limit and 3 * limit), _spread(test, limit)
    texts = len(train.texts) + len(test.texts)
    done = progress.begin("banking77", texts)
    value = metrics.probe_accuracy(
        encoder.encode(train.texts, done=done),
        train.labels,
        encoder.encode(test.texts, done=done),
        test.labels,
    )
    return Result("banking77", "accuracy, banking77", value, texts)


TASKS: dict[str, Callable[..., Result]] = {"sts": sts, "cranfield": cranfield, "banking77": banking77}


def evaluate(
    folder: Path,
    encoder: Encoder,
    progress: Progress,
    *,
    tasks: Sequence[str] = tuple(TASKS),
    limit: int | None = None,
    split: str = "test",
) -> Iterator[Result]:
    """Run tasks one after another.

    Args:
        folder: holds `sts/`, `retrieval/` and `cls/`.
        limit: pairs, queries or texts of a task at the most, for a quick look.
        split: of STS-B.

    Raises:
        DataError: a file is missing or wrong.
    """
    for task in tasks:
        yield TASKS[task](folder, encoder, progress, limit, split)


def _spread(texts: data.Labelled, count: int | None) -> data.Labelled:
    """`count` of them, evenly taken, since files go class by class."""
    if count is None or count >= len(texts.texts):
        return texts
    places = [place * len(texts.texts) // count for place in range(count)]
    return data.Labelled([texts.texts[place] for place in places], [texts.labels[place] for place in places])
