"""Learned tri-gram weights against hand-computed values and a plain model of the table."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from galley_plugins.speculation import trigram_table
from galley_plugins.speculation.corpus import MOST_SUCCESSORS, Corpus, empty_corpus
from galley_plugins.speculation.trigram_table import BIGRAM_BYTES, CELLS, Trigrams, adapt, add, new_trigrams

GAIN, CAP = 0.04, 3.0
NONE = empty_corpus()
# (1, 2) -> 5: 0.5, 6: 0.25 and (3, 1) -> 2: 1
CORPUS = Corpus(
    first=np.array([0, 0, 1, 1, 2], np.int64),
    second=np.array([2, 1], np.int32),
    offsets=np.array([0, 2, 3], np.int64),
    tokens=np.array([5, 6, 2], np.int32),
    probs=np.array([0.5, 0.25, 1.0], np.float32),
)
SMALLEST = 64  # bi-grams


def known(table: Trigrams, a: int, b: int, scope: int = 0, corpus: Corpus = NONE) -> dict[int, float]:
    tokens = np.empty(MOST_SUCCESSORS, np.int32)
    weights = np.empty(MOST_SUCCESSORS, np.float32)
    count = trigram_table.successors(table, corpus, scope, a, b, tokens, weights)
    return dict(zip(tokens[:count].tolist(), weights[:count].tolist(), strict=True))


def window(*tokens: int) -> np.ndarray:
    return np.array(tokens, np.int32)


def test_every_trigram_of_the_window_gains_and_missing_ones_start_at_nothing() -> None:
    table = new_trigrams(1 << 20)
    adapt(table, NONE, 0, window(1, 2, 3, 1, 2, 4), GAIN, CAP)
    assert known(table, 1, 2) == pytest.approx({3: 0.04, 4: 0.04})
    assert known(table, 2, 3) == pytest.approx({1: 0.04})
    assert known(table, 3, 1) == pytest.approx({2: 0.04})
    assert known(table, 2, 4) == {}
    adapt(table, NONE, 0, window(2, 3, 1, 2, 4, 1), GAIN, CAP)
    assert known(table, 1, 2) == pytest.approx({3: 0.04, 4: 0.08})
    assert known(table, 2, 4) == pytest.approx({1: 0.04})


@pytest.mark.parametrize("tokens", [(), (1,), (1, 2)])
def test_fewer_than_three_tokens_teach_nothing(tokens: tuple[int, ...]) -> None:
    table = new_trigrams(1 << 20)
    adapt(table, NONE, 0, window(*tokens), GAIN, CAP)
    assert trigram_table.bigrams_held(table) == 0


def test_weights_stop_at_the_cap() -> None:
    table = new_trigrams(1 << 20)
    for _ in range(74):
        add(table, NONE, 0, 1, 2, 3, GAIN, CAP)
    assert known(table, 1, 2) == pytest.approx({3: 2.96})
    for _ in range(3):
        add(table, NONE, 0, 1, 2, 3, GAIN, CAP)
    assert known(table, 1, 2) == {3: 3.0}


def test_a_bigram_starts_from_the_corpus_which_stays_as_it_is() -> None:
    table = new_trigrams(1 << 20)
    assert known(table, 1, 2, corpus=CORPUS) == {5: 0.5, 6: 0.25}
    add(table, CORPUS, 0, 1, 2, 6, GAIN, CAP)
    add(table, CORPUS, 0, 1, 2, 7, GAIN, CAP)
    assert known(table, 1, 2, corpus=CORPUS) == pytest.approx({5: 0.5, 6: 0.29, 7: 0.04})
    assert known(table, 1, 2, scope=1, corpus=CORPUS) == {5: 0.5, 6: 0.25}
    assert known(table, 3, 1, corpus=CORPUS) == {2: 1.0}
    assert known(table, 3, 2, corpus=CORPUS) == known(table, 9, 9, corpus=CORPUS) == {}


def test_scopes_see_nothing_of_each_other() -> None:
    table = new_trigrams(1 << 20)
    add(table, NONE, 7, 1, 2, 3, GAIN, CAP)
    assert known(table, 1, 2, scope=7) == pytest.approx({3: 0.04})
    assert known(table, 1, 2, scope=8) == {}


def test_a_full_bigram_gives_up_its_weakest_successor() -> None:
    table = new_trigrams(1 << 20)
    for token in range(MOST_SUCCESSORS):
        for _ in range(1 if token == 20 else 2):
            add(table, NONE, 0, 1, 2, token, GAIN, CAP)
    add(table, NONE, 0, 1, 2, 99, GAIN, CAP)
    expected = {token: 0.08 for token in range(MOST_SUCCESSORS) if token != 20} | {99: 0.04}
    assert known(table, 1, 2) == pytest.approx(expected)


@pytest.mark.parametrize("budget", [SMALLEST * BIGRAM_BYTES, 100_000, 1 << 20])
def test_a_table_keeps_its_bound(budget: int) -> None:
    table = new_trigrams(budget)
    assert 0.95 * budget <= sum(array.nbytes for array in table) - table.state.nbytes <= budget


def test_the_least_recently_learned_bigram_gives_way() -> None:
    table = new_trigrams(SMALLEST * BIGRAM_BYTES)
    for a in range(SMALLEST):
        add(table, NONE, 0, a, 0, 1, GAIN, CAP)
    add(table, NONE, 0, 0, 0, 1, GAIN, CAP)  # learned again
    add(table, NONE, 0, 1000, 0, 1, GAIN, CAP)
    assert trigram_table.bigrams_held(table) == SMALLEST
    assert known(table, 1, 0) == {}
    assert known(table, 0, 0) == pytest.approx({1: 0.08})
    assert known(table, 2, 0) == known(table, 1000, 0) == pytest.approx({1: 0.04})


def test_an_evicted_bigram_falls_back_to_the_corpus() -> None:
    table = new_trigrams(SMALLEST * BIGRAM_BYTES)
    add(table, CORPUS, 0, 1, 2, 5, GAIN, CAP)
    for a in range(10, 10 + SMALLEST):
        add(table, CORPUS, 0, a, 0, 1, GAIN, CAP)
    assert known(table, 1, 2, corpus=CORPUS) == {5: 0.5, 6: 0.25}


class Model:
    """The table as dictionaries."""

    def __init__(self, bigrams: int) -> None:
        self.bigrams, self.cells = bigrams, CELLS * bigrams
        self.rows: OrderedDict[tuple[int, int, int], dict[int, float]] = OrderedDict()

    def add(self, scope: int, a: int, b: int, c: int) -> None:
        key = (scope, a, b)
        if key not in self.rows:
            if len(self.rows) == self.bigrams:
                self.rows.popitem(last=False)
            self.rows[key] = {}
        self.rows.move_to_end(key)
        row = self.rows[key]
        if c in row:
            row[c] = min(float(np.float32(row[c] + GAIN)), CAP)
            return
        if len(row) == MOST_SUCCESSORS:
            weakest = min(row, key=lambda token: row[token])
            self.rows[key] = {
                (c if token == weakest else token): (GAIN if token == weakest else weight)
                for token, weight in row.items()
            }
            return
        while sum(map(len, self.rows.values())) == self.cells:
            self.rows.popitem(last=False)
        row[c] = GAIN


def agree(table: Trigrams, model: Model) -> None:
    assert trigram_table.bigrams_held(table) == len(model.rows)
    for (scope, a, b), row in model.rows.items():
        found = known(table, a, b, scope)
        assert list(found) == list(row)
        assert found == pytest.approx(row)


@given(st.integers(0, 2**32), st.sampled_from([4, 12, 60]), st.sampled_from([1, 3]))
@settings(deadline=None, max_examples=25)
def test_random_learning_agrees_with_a_plain_model(seed: int, vocabulary: int, scopes: int) -> None:
    random = np.random.default_rng(seed)
    table, model = new_trigrams(SMALLEST * BIGRAM_BYTES), Model(SMALLEST)
    for step in range(600):
        scope = int(random.integers(scopes))
        a, b = (int(token) for token in random.zipf(1.5, 2) % vocabulary)
        c = int(random.integers(vocabulary))
        add(table, NONE, scope, a, b, c, GAIN, CAP)
        model.add(scope, a, b, c)
        if step % 150 == 0:
            agree(table, model)
    agree(table, model)


def test_what_is_exported_comes_back_the_oldest_giving_way() -> None:
    table = new_trigrams(1 << 20)
    for a in range(100):
        for c in range(1 + a % 2):
            add(table, NONE, 5, a, 0, c, GAIN, CAP)
    add(table, NONE, 5, 0, 0, 9, GAIN, CAP)
    keys, sizes, tokens, weights = trigram_table.export(table)
    assert len(keys) == 100
    assert sizes.sum() == len(tokens) == len(weights) == 151
    for bigrams in (SMALLEST, 1000):
        again = new_trigrams(bigrams * BIGRAM_BYTES)
        trigram_table.restore(again, keys, sizes, tokens, weights)
        assert trigram_table.bigrams_held(again) == min(bigrams, 100)
        assert known(again, 0, 0, 5) == pytest.approx({0: 0.04, 9: 0.04})
        assert known(again, 99, 0, 5) == pytest.approx({0: 0.04, 1: 0.04})
    assert known(again, 1, 0, 5) == known(table, 1, 0, 5)
