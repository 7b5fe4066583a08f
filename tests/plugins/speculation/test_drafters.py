from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from galley_plugins.speculation.corpus import Corpus, save_corpus
from galley_plugins.speculation.drafters import make_drafter
from galley_plugins.speculation.drafting import Ask, Opening
from galley_plugins.speculation.options import MiB, SpeculationOptions
from galley_plugins.speculation.store import TableFileError

if TYPE_CHECKING:
    from pathlib import Path

OPTIONS = SpeculationOptions(table_bytes=MiB)


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        ("hybrid", "Hybrid"),
        ("trigram", "Trigram"),
        ("recycling", "Recycling"),
        ("prompt-lookup", "PromptLookup"),
    ],
)
def test_a_method_names_its_drafter(method: str, kind: str) -> None:
    drafter = make_drafter(SpeculationOptions.from_values({"method": method, "table_bytes": MiB}), 100)
    assert type(drafter).__name__ == kind


def test_a_method_that_drafts_by_the_model_itself_has_no_drafter() -> None:
    with pytest.raises(ValueError, match="'self', expected hybrid, trigram, recycling or prompt-lookup"):
        make_drafter(replace(OPTIONS, method="self"), 100)


def test_the_corpus_of_the_options_is_loaded_and_cut(tmp_path: Path) -> None:
    path = tmp_path / "table"
    corpus = Corpus(
        first=np.array([0, 0, 1]),
        second=np.array([2], np.int32),
        offsets=np.array([0, 2]),
        tokens=np.array([7, 8], np.int32),
        probs=np.array([0.6, 0.4], np.float32),
    )
    save_corpus(path, "hash", corpus)
    for successors, expected in ((12, [7, 8]), (1, [7])):
        values = {"method": "trigram", "corpus": str(path), "trigram": {"successors": successors}}
        drafter = make_drafter(SpeculationOptions.from_values(values), 100, "hash")
        drafter.begin(0, Opening(np.array([1, 2], np.int32)))
        drafter.extend(0, np.array([], np.int32))
        assert sorted(drafter.propose([Ask(0, 9, True)])[0].tokens.tolist()) == expected


def test_a_corpus_that_cannot_be_used_is_an_error(tmp_path: Path) -> None:
    options = replace(OPTIONS, method="trigram", corpus=str(tmp_path / "table"))
    with pytest.raises(ValueError, match=r"speculation\.corpus: the tokenizer's hash is missing"):
        make_drafter(options, 100)
    with pytest.raises(FileNotFoundError, match="table does not exist"):
        make_drafter(options, 100, "hash")
    (tmp_path / "table").write_text("nothing")
    with pytest.raises(TableFileError):
        make_drafter(options, 100, "hash")
