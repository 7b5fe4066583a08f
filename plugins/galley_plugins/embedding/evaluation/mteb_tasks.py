"""STS-B, Cranfield and banking77 as tasks of MTEB, read from the files that `galley embed eval` reads.

Nothing is fetched from a hub. What differs from `galley embed eval`: banking77's probe sees eight texts of
each class, ten times over, and texts of all tasks that are too long are cut.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import mteb
from datasets import Dataset, DatasetDict
from mteb.abstasks import AbsTaskClassification, AbsTaskRetrieval, AbsTaskSTS
from mteb.abstasks.task_metadata import TaskMetadata

from galley_plugins.embedding.evaluation import data

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from galley_plugins.embedding.evaluation.mteb_encoder import ServerEncoder


def _metadata(name: str, kind: str, main_score: str, reference: str) -> Any:
    return TaskMetadata(
        name=name,
        description=f"{name}, from local files.",
        dataset={"path": "local", "revision": "local"},
        type=kind,
        category="t2t",
        reference=reference,
        eval_langs=["eng-Latn"],
        main_score=main_score,
    )


class _Local(ABC):
    """A task whose data lie in a folder with `sts/`, `retrieval/` and `cls/`."""

    dataset: Any
    data_loaded: bool

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def load_data(self, **_: Any) -> None:
        """
        Raises:
            DataError: a file is missing or wrong.
        """
        if not self.data_loaded:
            self.dataset = self._read(self._folder)
            self.data_loaded = True

    @abstractmethod
    def _read(self, folder: Path) -> Any:
        """What the task's `dataset` is to be."""


class Sts(_Local, AbsTaskSTS):
    """STS benchmark: Spearman's correlation of cosines with people's scores, 0 to 5."""

    metadata = _metadata("STSB", "STS", "cosine_spearman", "https://github.com/PhilipMay/stsb-multi-mt")

    def _read(self, folder: Path) -> DatasetDict:
        pairs = data.sts_pairs(folder / "sts" / "stsb_en_test.csv")
        rows = {"sentence1": pairs.first, "sentence2": pairs.second, "score": pairs.scores}
        return DatasetDict(test=Dataset.from_dict(rows))


class Cranfield(_Local, AbsTaskRetrieval):
    """Cranfield: nDCG@10."""

    metadata = _metadata(
        "Cranfield", "Retrieval", "ndcg_at_10", "https://github.com/oussbenk/cranfield-trec-dataset"
    )

    def _read(self, folder: Path) -> dict[str, Any]:
        found = data.cranfield(folder / "retrieval")
        gains = {
            query: {document: int(gain) for document, gain in judged.items()}
            for query, judged in found.gains.items()
        }
        split = {
            "corpus": _texts(found.documents),
            "queries": _texts(found.queries),
            "relevant_docs": gains,
            "top_ranked": None,
        }
        return {"default": {"test": split}}


class Banking77(_Local, AbsTaskClassification):
    """banking77: accuracy of logistic regression on a few texts of each class."""

    metadata = _metadata(
        "Banking77",
        "Classification",
        "accuracy",
        "https://github.com/PolyAI-LDN/task-specific-datasets",
    )

    def _read(self, folder: Path) -> DatasetDict:
        splits = {name: data.labelled(folder / "cls" / f"{name}.csv") for name in ("train", "test")}
        classes = sorted({label for split in splits.values() for label in split.labels})
        return DatasetDict(
            {
                name: Dataset.from_dict(
                    {"text": split.texts, "label": [classes.index(label) for label in split.labels]}
                )
                for name, split in splits.items()
            }
        )


TASKS: dict[str, Any] = {"sts": Sts, "cranfield": Cranfield, "banking77": Banking77}


def evaluate(folder: Path, encoder: ServerEncoder, tasks: Sequence[str] = tuple(TASKS)) -> Iterator[Any]:
    """Run tasks one after another; each result is an `mteb.TaskResult`.

    Raises:
        DataError: a file is missing or wrong.
        ServerError: the server cannot be reached or refuses to embed.
    """
    for task in tasks:
        (result,) = mteb.evaluate(
            encoder, TASKS[task](folder), cache=None, co2_tracker=False, show_progress_bar=False
        )
        yield result


def _texts(texts: dict[str, str]) -> Dataset:
    # A document without a text is never found.
    return Dataset.from_list([{"id": name, "text": text or "-"} for name, text in texts.items()])
