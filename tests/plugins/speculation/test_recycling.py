"""Token Recycling against streams and trees worked by hand."""

from __future__ import annotations

from collections import Counter
from functools import reduce
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from galley_plugins.speculation.drafting import Ask, Draft, Opening, Seen
from galley_plugins.speculation.options import MiB, SpeculationOptions
from galley_plugins.speculation.recycling import CHAIN, TEMPLATE, Recycling
from galley_plugins.speculation.store import TableFileError, load_tables, save_tables
from galley_plugins.speculation.tables import WAYS, context_key, find

if TYPE_CHECKING:
    from pathlib import Path

VOCABULARY = 1000
PROBS = [0.4, 0.2, 0.1, 0.08, 0.06, 0.04, 0.02, 0.01]


def make() -> Recycling:
    return Recycling(SpeculationOptions(method="recycling", table_bytes=MiB), VOCABULARY)


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, np.int32)


def eight(first: int) -> list[int]:
    return list(range(first, first + 8))


def seen(*rows: tuple[int, int, list[int], int]) -> Seen:
    """Rows of (request, token, candidates after it, accepted)."""
    requests, tokens, candidates, accepted = zip(*rows, strict=True)
    return Seen(
        requests=ids(*requests),
        contexts=np.array([[-1, 0, token] for token in tokens], np.int32),
        top_tokens=np.array(candidates, np.int32),
        top_probs=np.array([PROBS] * len(rows), np.float32),
        accepted=ids(*accepted),
    )


def row_of(drafter: Recycling, token: int, scope: int = 0) -> list[int] | None:
    """The matrix's row."""
    place = find(drafter.table.arrays(), context_key(1, scope, 0, 0, token))
    return None if place < 0 else drafter.table.tokens[place // WAYS, place % WAYS].tolist()


def draft(drafter: Recycling, limit: int, tree: bool = True, request: int = 0) -> Draft:
    return drafter.propose([Ask(request, limit, tree)])[0]


def test_the_template_is_the_papers() -> None:
    assert len(set(TEMPLATE)) == 80
    assert [sum(len(path) == depth for path in TEMPLATE) for depth in range(1, 7)] == [8, 21, 25, 15, 8, 3]
    parents = {path[:-1] for path in TEMPLATE}
    assert len(set(TEMPLATE) - parents) == 40  # leaves
    children = Counter(path[:-1] for path in TEMPLATE)
    assert {path: children[path] for path in [(), (0,), (1,), (0, 0), (0, 0, 0), (0, 0, 0, 0), (0,) * 5]} == {
        (): 8,
        (0,): 8,
        (1,): 4,
        (0, 0): 8,
        (0, 0, 0): 5,
        (0, 0, 0, 0): 3,
        (0,) * 5: 2,
    }
    assert {(3, 1), (5, 0, 0), (0, 7, 0), (0, 0, 1, 1), (0, 0, 0, 2, 0), (0, 0, 0, 1, 0, 0)} <= set(TEMPLATE)
    for path in TEMPLATE:  # ranks without gaps, parents first
        assert path[-1] == 0 or (*path[:-1], path[-1] - 1) in TEMPLATE
        assert len(path) == 1 or TEMPLATE.index(path[:-1]) < TEMPLATE.index(path)
    assert list(CHAIN) == [(0,) * depth for depth in range(1, 7)]


def test_rejected_rows_are_stored_and_the_last_write_wins() -> None:
    drafter = make()
    drafter.begin(0, Opening(ids(5, 10)))
    drafter.observe(
        seen(
            (0, 10, eight(20), 20),  # the last token; its first candidate was drafted and accepted
            (0, 20, eight(30), 31),
            (0, 21, eight(40), -1),  # rejected
            (0, 20, eight(50), -1),  # rejected, and later than the accepted 20
        )
    )
    assert row_of(drafter, 10) == eight(20)
    assert row_of(drafter, 20) == eight(50)
    assert row_of(drafter, 21) == eight(40)
    assert row_of(drafter, 5) is None  # a prompt's tokens are unknown
    assert row_of(drafter, 31) is None
    drafter.observe(seen((0, 31, eight(60), 60), (0, 10, eight(70), -1)))
    assert row_of(drafter, 10) == eight(70)
    assert row_of(drafter, 31) == eight(60)


def learned() -> Recycling:
    """1 -> 11, 12, ...; 11 -> 21, ...; 12 -> 31, ...; 21 -> 41, ...; the last token is 1."""
    drafter = make()
    drafter.begin(0, Opening(ids(1)))
    drafter.observe(
        seen((0, 1, eight(11), -1), (0, 11, eight(21), -1), (0, 12, eight(31), -1), (0, 21, eight(41), -1))
    )
    return drafter


def test_a_small_tree_takes_the_most_probable_nodes() -> None:
    # 0.52 for every level over (1 + rank) ** 1.5:
    #   [0] .520  [0,0] .270  [1] .184  [0,0,0] .141  [2] .100  [0,1] [1,0] .096  ([0,0,0,0] .073 is unknown)
    #   [3] .065  [0,2] [2,0: unknown] .052  [0,0,1] .050  ([0,1,0] unknown)  [1,0,0: unknown]  [4] .047
    expected = [
        *[(11, -1), (21, 0), (12, -1), (41, 1), (13, -1), (22, 0), (31, 2)],
        *[(14, -1), (23, 0), (42, 1), (15, -1)],
    ]
    for limit in range(len(expected) + 1):
        found = draft(learned(), limit)
        assert list(zip(found.tokens.tolist(), found.parents.tolist(), strict=True)) == expected[:limit]
    assert found.tokens.dtype == found.parents.dtype == np.int32


def test_a_whole_tree_has_the_templates_levels() -> None:
    drafter = make()
    drafter.begin(0, Opening(ids(0)))
    # After token t come 8 t + 1, 8 t + 2, ...: every node has a token of its own.
    tokens = [reduce(lambda token, rank: 8 * token + 1 + rank, path, 0) for path in ((), *TEMPLATE)]
    drafter.observe(seen(*((0, token, eight(8 * token + 1), -1) for token in tokens)))
    found = draft(drafter, 96)
    assert len(found.tokens) == len(set(found.tokens.tolist())) == 80
    paths: list[tuple[int, ...]] = []
    names = [0]
    for token, parent in zip(found.tokens.tolist(), found.parents.tolist(), strict=True):
        above = names[parent + 1]
        paths.append((*(paths[parent] if parent >= 0 else ()), token - 8 * above - 1))
        names.append(token)
    assert tuple(paths) == TEMPLATE
    assert [sum(len(path) == depth for path in paths) for depth in range(1, 7)] == [8, 21, 25, 15, 8, 3]


def test_a_chain_is_rank_0_all_the_way() -> None:
    drafter = learned()
    found = draft(drafter, 16, tree=False)
    assert found.is_chain
    assert found.tokens.tolist() == [11, 21, 41]
    assert draft(drafter, 2, tree=False).tokens.tolist() == [11, 21]
    drafter.observe(
        seen((0, 41, eight(1), -1))
    )  # ... 41 -> 1 -> 11 -> 21: a chain is no deeper than the tree
    assert draft(drafter, 16, tree=False).tokens.tolist() == [11, 21, 41, 1, 11, 21]


def test_unknown_tokens_propose_nothing() -> None:
    drafter = make()
    drafter.begin(0, Opening(ids(1)))
    drafter.begin(1, Opening(ids()))
    assert [len(found.tokens) for found in drafter.propose([Ask(0, 80, True), Ask(1, 80, False)])] == [0, 0]


def test_candidates_may_end_early() -> None:
    drafter = make()
    drafter.begin(0, Opening(ids(1)))
    drafter.observe(seen((0, 1, [7, 8, *[-1] * 6], -1)))
    assert draft(drafter, 80).tokens.tolist() == [7, 8]


def test_a_draft_starts_from_the_last_verified_token() -> None:
    drafter = learned()
    drafter.extend(0, ids(11, 12))
    assert draft(drafter, 1).tokens.tolist() == [31]
    drafter.extend(0, ids())
    assert draft(drafter, 1).tokens.tolist() == [31]
    drafter.end(0)
    drafter.begin(0, Opening(ids(9, 1)))
    assert draft(drafter, 1).tokens.tolist() == [11]


def test_scopes_share_nothing() -> None:
    drafter = make()
    for request, scope in ((0, 5), (200, 6), (2, 5)):
        drafter.begin(request, Opening(ids(1), scope=scope))
    drafter.observe(seen((0, 1, eight(11), 11), (200, 1, eight(21), 21)))
    drafts = drafter.propose([Ask(2, 1, True), Ask(200, 1, True), Ask(0, 1, True)])
    assert [found.tokens.tolist() for found in drafts] == [[11], [21], [11]]
    assert row_of(drafter, 1, scope=0) is None


def test_the_least_recently_written_rows_give_way() -> None:
    drafter = make()
    drafter.begin(0, Opening(ids(0)))
    for first in range(0, 200_000, 1000):
        drafter.observe(seen(*((0, token, eight(token), -1) for token in range(first, first + 1000))))
    size = sum(tensor.numel() * tensor.element_size() for tensor in drafter.table.tensors().values())
    assert size <= MiB
    assert all(row_of(drafter, token) == eight(token) for token in range(199_900, 200_000))
    assert all(row_of(drafter, token) is None for token in range(100))


def test_what_was_learned_comes_back_from_a_file(tmp_path: Path) -> None:
    drafter = learned()
    drafter.save(tmp_path / "tables", "hash")
    assert (tmp_path / "tables").stat().st_size < 2000  # rows that are known, not the whole table
    again = Recycling(SpeculationOptions(method="recycling", table_bytes=2 * MiB), VOCABULARY)
    again.load(tmp_path / "tables", "hash")
    again.begin(0, Opening(ids(1)))
    assert draft(again, 80).tokens.tolist() == draft(drafter, 80).tokens.tolist()
    assert draft(again, 80).parents.tolist() == draft(drafter, 80).parents.tolist()
    with pytest.raises(TableFileError, match="tokenizer"):
        again.load(tmp_path / "tables", "other")


def test_newer_rows_outlive_a_smaller_table(tmp_path: Path) -> None:
    drafter = make()
    drafter.begin(0, Opening(ids(0)))
    for first in range(0, 8000, 1000):
        drafter.observe(seen(*((0, token, eight(token % 900), -1) for token in range(first, first + 1000))))
    drafter.save(tmp_path / "tables", "hash")
    again = Recycling(SpeculationOptions(method="recycling", table_bytes=MiB), VOCABULARY)
    again._budget = MiB // 8
    again.load(tmp_path / "tables", "hash")
    assert len(again.table) < len(drafter.table)
    assert sum(row_of(again, token) is not None for token in range(7000, 8000)) > 750
    assert not any(row_of(again, token) for token in range(4000))


@pytest.mark.parametrize(
    "change",
    [
        {"keys": torch.tensor([1, 2, 3])},
        {"keys": torch.tensor([1, 2, 3, 0])},
        {"tokens": torch.full((4, 8), VOCABULARY, dtype=torch.int32)},
        {"tokens": torch.full((4, 8), -2, dtype=torch.int32)},
        {"tokens": torch.zeros((4, 7), dtype=torch.int32)},
        {"weights": torch.zeros((4, 8), dtype=torch.float16)},
    ],
    ids=["few keys", "a free key", "tokens too high", "tokens too low", "tokens' shape", "weights' type"],
)
def test_a_file_that_makes_no_sense_is_refused_and_changes_nothing(
    tmp_path: Path, change: dict[str, torch.Tensor]
) -> None:
    drafter = learned()
    drafter.save(tmp_path / "tables", "hash")
    tensors, numbers = load_tables(tmp_path / "tables", "recycling", "hash")
    save_tables(tmp_path / "bad", "recycling", "hash", tensors | change, numbers)
    with pytest.raises(TableFileError, match="bad"):
        drafter.load(tmp_path / "bad", "hash")
    assert row_of(drafter, 1) == eight(11)
