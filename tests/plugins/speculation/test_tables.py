"""The n-gram table: what is stored, what gives way, who sees it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from galley_plugins.speculation import tables
from galley_plugins.speculation.tables import ENTRY_BYTES, WAYS, NgramTable, blend, claim, context_key, find


def entry_of(table: NgramTable, order: int, scope: int, *context: int) -> dict[int, float] | None:
    """Successors and weights under a context, oldest token first."""
    padded = (0,) * (3 - len(context)) + context
    place = find(table.arrays(), context_key(order, scope, *padded))
    if place < 0:
        return None
    tokens = table.arrays().tokens[place // WAYS, place % WAYS]
    weights = table.arrays().weights[place // WAYS, place % WAYS]
    return {int(token): float(weight) for token, weight in zip(tokens, weights, strict=True) if token >= 0}


@pytest.mark.parametrize("budget", [WAYS * ENTRY_BYTES, 100_000, 1 << 20, (1 << 20) + 12345])
def test_a_table_keeps_its_bound(budget: int) -> None:
    table = NgramTable(budget)
    size = sum(tensor.numel() * tensor.element_size() for tensor in table.tensors().values())
    assert budget / 2 < size <= budget
    arrays = table.arrays()
    for key in range(1, 40_000):
        claim(arrays, key << 12, 1)
    assert len(table) <= table.sets * WAYS


def test_the_least_recently_used_way_of_a_set_gives_way() -> None:
    table = NgramTable(1)  # a single set
    arrays = table.arrays()
    for clock, key in enumerate([11, 12, 13, 14], start=1):
        claim(arrays, key, clock)
    claim(arrays, 11, 5)
    place = claim(arrays, 15, 6)
    assert find(arrays, 12) == -1
    assert find(arrays, 15) == place
    assert all(find(arrays, key) >= 0 for key in (11, 13, 14))


def test_a_new_entry_is_empty_even_where_another_one_was() -> None:
    table = NgramTable(1)
    arrays = table.arrays()
    for key in range(1, 5):
        blend(arrays, claim(arrays, key, key), np.array([7], np.int32), np.ones(1, np.float32), 1.0)
    place = claim(arrays, 5, 5)
    assert (arrays.tokens[0, place] == -1).all()
    assert (arrays.weights[0, place] == 0).all()


@given(
    st.sets(st.tuples(st.integers(1, 3), st.integers(0, 2**40), *[st.integers(0, 200_000)] * 3), max_size=50)
)
@settings(deadline=None)
def test_contexts_of_other_orders_scopes_and_tokens_have_other_keys(contexts: set[tuple[int, ...]]) -> None:
    looked_at = {(order, scope, *tokens[3 - order :]) for order, scope, *tokens in contexts}
    keys = {context_key(*context) for context in contexts}
    assert len(keys) == len(looked_at)
    assert 0 not in keys


def test_predictions_are_kept_by_scope_and_by_every_order() -> None:
    table = NgramTable(100_000)
    tokens = np.array([[5, 6, -1, -1, -1, -1, -1, -1]] * 2, np.int32)
    probs = np.array([[0.75, 0.25, 0, 0, 0, 0, 0, 0]] * 2, np.float32)
    contexts = np.array([[1, 2, 3], [-1, -1, 3]], np.int32)
    rates = np.array([0.5, 0.5, 0.5], np.float32)
    tables.learn_predictions(table.arrays(), np.array([1, 2]), contexts, tokens, probs, rates, 1)
    for order, context in ((1, (3,)), (2, (2, 3)), (3, (1, 2, 3))):
        assert entry_of(table, order, 1, *context) == {5: 0.75, 6: 0.25}
        assert entry_of(table, order, 0, *context) is None
    assert entry_of(table, 1, 2, 3) == {5: 0.75, 6: 0.25}
    assert len(table) == 4  # what lies before a text's start is no context


def test_a_known_entry_moves_towards_what_is_seen() -> None:
    table = NgramTable(100_000)
    arrays = table.arrays()
    place = claim(arrays, context_key(1, 0, 0, 0, 9), 1)
    blend(arrays, place, np.array([1, 2], np.int32), np.array([0.8, 0.2], np.float32), 0.5)
    blend(arrays, place, np.array([2, 3], np.int32), np.array([0.6, 0.4], np.float32), 0.5)
    assert entry_of(table, 1, 0, 9) == pytest.approx({1: 0.4, 2: 0.4, 3: 0.2})


def test_the_weakest_successor_gives_way_to_a_stronger_one_only() -> None:
    table = NgramTable(100_000)
    arrays = table.arrays()
    place = claim(arrays, context_key(1, 0, 0, 0, 9), 1)
    probs = np.array([0.3, 0.2, 0.15, 0.1, 0.1, 0.06, 0.05, 0.04], np.float32)
    blend(arrays, place, np.arange(8, dtype=np.int32), probs, 1.0)
    blend(arrays, place, np.array([50], np.int32), np.array([0.01], np.float32), 0.5)
    assert set(entry_of(table, 1, 0, 9) or {}) == set(range(8))
    blend(arrays, place, np.array([51], np.int32), np.array([0.9], np.float32), 0.5)
    assert set(entry_of(table, 1, 0, 9) or {}) == {*range(7), 51}


def test_a_text_teaches_what_follows_each_context() -> None:
    table = NgramTable(100_000)
    text = np.array([1, 2, 3, 1, 2, 4], np.int32)
    tables.learn_text(table.arrays(), 0, text, 0.2, 0.3, 1)
    assert entry_of(table, 1, 0, 1) == pytest.approx({2: 0.3 * 0.8 + 0.2})
    assert entry_of(table, 2, 0, 1, 2) == pytest.approx({3: 0.24, 4: 0.2})
    assert entry_of(table, 3, 0, 3, 1, 2) == pytest.approx({4: 0.3})
    assert entry_of(table, 1, 0, 4) is None
