"""ADED's drafter: what it learns of texts, what it drafts, what it keeps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from galley_plugins.speculation import trigram_table
from galley_plugins.speculation.corpus import MOST_SUCCESSORS, Corpus
from galley_plugins.speculation.drafting import Ask, Draft, Opening
from galley_plugins.speculation.options import MiB, SpeculationOptions, TrigramOptions
from galley_plugins.speculation.store import TableFileError, load_tables, save_tables
from galley_plugins.speculation.trigram import Trigram

if TYPE_CHECKING:
    from pathlib import Path

VOCABULARY = 1000
# (1, 2) -> 3: 0.5, 4: 0.25; (2, 3) -> 5: 1
CORPUS = Corpus(
    first=np.array([0, 0, 1, 2], np.int64),
    second=np.array([2, 3], np.int32),
    offsets=np.array([0, 2, 3], np.int64),
    tokens=np.array([3, 4, 5], np.int32),
    probs=np.array([0.5, 0.25, 1.0], np.float32),
)


def make(corpus: Corpus | None = None, **options: float) -> Trigram:
    return Trigram(
        SpeculationOptions(method="trigram", table_bytes=MiB, trigram=TrigramOptions(**options)),
        VOCABULARY,
        corpus,
    )


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, np.int32)


def known(drafter: Trigram, a: int, b: int, scope: int = 0) -> dict[int, float]:
    tokens, weights = np.empty(MOST_SUCCESSORS, np.int32), np.empty(MOST_SUCCESSORS, np.float32)
    count = trigram_table.successors(drafter.table, drafter._corpus, scope, a, b, tokens, weights)
    return dict(zip(tokens[:count].tolist(), weights[:count].tolist(), strict=True))


def draft(drafter: Trigram, limit: int = 16, tree: bool = True, request: int = 0) -> Draft:
    return drafter.propose([Ask(request, limit, tree)])[0]


def test_each_step_raises_every_trigram_of_the_last_16_tokens() -> None:
    drafter = make()
    drafter.begin(0, Opening(ids(*range(100, 120))))
    assert known(drafter, 106, 107) == {}  # a prompt alone teaches nothing
    drafter.extend(0, ids(120))
    # The window is 105 to 120: its first tri-gram begins with 105, its last one ends with 120.
    assert known(drafter, 104, 105) == {}
    for a in range(105, 119):
        assert known(drafter, a, a + 1) == pytest.approx({a + 2: 0.04})
    drafter.extend(0, ids(121, 122))  # two tokens in one step: 107 to 122
    assert known(drafter, 106, 107) == pytest.approx({108: 0.04})
    assert known(drafter, 107, 108) == pytest.approx({109: 0.08})
    assert known(drafter, 120, 121) == pytest.approx({122: 0.04})


def test_one_token_a_step_raises_a_trigram_fourteen_times() -> None:
    drafter = make()
    drafter.begin(0, Opening(ids(1, 2)))
    for token in range(3, 40):
        drafter.extend(0, ids(token))
    assert known(drafter, 1, 2) == pytest.approx({3: 14 * 0.04})


def test_a_repeated_trigram_stops_at_the_cap() -> None:
    drafter = make()
    drafter.begin(0, Opening(ids(7, 7)))
    for steps, weight in ((1, 0.04), (2, 0.04 + 2 * 0.04), (30, 3.0)):
        drafter.begin(1, Opening(ids(7, 7), scope=steps))
        for _ in range(steps):
            drafter.extend(1, ids(7))
        assert known(drafter, 7, 7, scope=steps) == pytest.approx({7: weight})
        drafter.end(1)


def test_a_repeating_text_is_drafted() -> None:
    drafter = make()
    drafter.begin(0, Opening(ids(1, 2, 3, 4, 1, 2, 3, 4, 1)))
    drafter.extend(0, ids(2))
    assert draft(drafter, tree=False).tokens.tolist() == [3, 4, 1, 2]
    assert draft(drafter, limit=2, tree=False).tokens.tolist() == [3, 4]
    found = draft(drafter)
    assert found.tokens.tolist() == [3, 4, 1, 2]
    assert found.is_chain
    assert found.tokens.dtype == found.parents.dtype == np.int32


def test_a_corpus_is_drafted_from_and_what_texts_say_is_added() -> None:
    drafter = make(CORPUS)
    drafter.begin(0, Opening(ids(1, 2)))
    drafter.extend(0, ids())
    assert sorted(draft(drafter).tokens.tolist()) == [3, 4, 5]
    drafter.begin(1, Opening(ids(1, 2)))
    drafter.extend(1, ids(4))
    assert known(drafter, 1, 2) == pytest.approx({3: 0.5, 4: 0.29})
    assert known(drafter, 1, 2, scope=1) == {3: 0.5, 4: 0.25}


def test_scopes_share_nothing() -> None:
    drafter = make()
    for request, scope in ((0, 10), (1, 10), (2, 11)):
        drafter.begin(request, Opening(ids(1, 2), scope=scope))
    drafter.extend(0, ids(3))
    drafts = drafter.propose([Ask(1, 8, True), Ask(2, 8, True)])
    assert [found.tokens.tolist() for found in drafts] == [[3], []]


@pytest.mark.parametrize("tokens", [(), (1,)])
def test_a_context_of_less_than_two_tokens_has_no_draft(tokens: tuple[int, ...]) -> None:
    drafter = make(CORPUS)
    drafter.begin(0, Opening(ids(*tokens)))
    drafter.extend(0, ids())
    assert len(draft(drafter).tokens) == 0


def test_drafts_are_trees_within_the_limit() -> None:
    random = np.random.default_rng(1)
    text = (random.zipf(1.3, 400) % 30).astype(np.int32)
    drafter = make()
    drafter.begin(3, Opening(text[:100]))
    for position in range(100, 400, 3):
        drafter.extend(3, text[position : position + 3])
        for limit in (0, 1, 5, 64):
            found = draft(drafter, limit, request=3)
            assert len(found.tokens) == len(found.parents) <= min(limit, 48)
            assert (found.parents < np.arange(len(found.parents))).all()
            assert len(set(zip(found.parents.tolist(), found.tokens.tolist(), strict=True))) == len(
                found.tokens
            )
            chain = draft(drafter, limit, tree=False, request=3)
            assert chain.is_chain
            assert len(chain.tokens) <= min(limit, 4)


def test_options_reach_the_search() -> None:
    text = ids(1, 2, 3, 4, 5, 6, 1)
    for depth in (2, 3, 5):
        drafter = make(depth=depth)
        drafter.begin(0, Opening(text))
        drafter.extend(0, ids(2))
        assert len(draft(drafter, tree=False).tokens) == depth
    drafter = make(gain=0.5, cap=0.75, window=3)
    drafter.begin(0, Opening(ids(1, 2, 3)))
    drafter.extend(0, ids(4))
    assert known(drafter, 1, 2) == {}
    assert known(drafter, 2, 3) == {4: 0.5}
    drafter.extend(0, ids())
    assert known(drafter, 2, 3) == {4: 0.75}


def test_an_ended_request_leaves_what_it_taught() -> None:
    drafter = make()
    drafter.begin(0, Opening(ids(1, 2)))
    drafter.extend(0, ids(3))
    drafter.end(0)
    drafter.begin(0, Opening(ids(1, 2)))
    assert draft(drafter).tokens.tolist() == [3]


def test_what_was_learned_comes_back_from_a_file(tmp_path: Path) -> None:
    drafter = make()
    drafter.begin(0, Opening(ids(1, 2), scope=4))
    drafter.extend(0, ids(3, 1, 2))
    drafter.save(tmp_path / "tables", "hash")
    again = make()
    again.load(tmp_path / "tables", "hash")
    again.begin(9, Opening(ids(1, 2), scope=4))
    assert draft(again, request=9).tokens.tolist() == draft(drafter).tokens.tolist() == [3, 1, 2, 3]
    with pytest.raises(TableFileError, match="tokenizer is 'hash', expected 'other'"):
        again.load(tmp_path / "tables", "other")


@pytest.mark.parametrize(
    "change",
    [
        {"sizes": torch.tensor([2], dtype=torch.int32)},
        {"sizes": torch.tensor([0], dtype=torch.int32)},
        {"sizes": torch.tensor([1, 0], dtype=torch.int32)},
        {"tokens": torch.tensor([VOCABULARY], dtype=torch.int32)},
        {"tokens": torch.tensor([-1], dtype=torch.int32)},
        {"weights": torch.tensor([float("nan")])},
        {"weights": torch.tensor([0.5, 0.5])},
        {"weights": torch.tensor([0.5], dtype=torch.float64)},
        {"keys": torch.tensor([[5]])},
    ],
    ids=lambda change: f"{next(iter(change))} {next(iter(change.values())).tolist()}",
)
def test_a_file_that_makes_no_sense_is_refused_and_changes_nothing(
    tmp_path: Path, change: dict[str, torch.Tensor]
) -> None:
    drafter = make()
    drafter.begin(0, Opening(ids(1, 2)))
    drafter.extend(0, ids(3))
    drafter.save(tmp_path / "tables", "hash")
    tensors, numbers = load_tables(tmp_path / "tables", "trigram", "hash")
    assert tensors["sizes"].tolist() == [1]
    save_tables(tmp_path / "bad", "trigram", "hash", tensors | change, numbers)
    with pytest.raises(TableFileError, match="bad"):
        drafter.load(tmp_path / "bad", "hash")
    assert known(drafter, 1, 2) == pytest.approx({3: 0.04})
