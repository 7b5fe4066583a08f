from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from galley_plugins.speculation.options import SwiftOptions
from galley_plugins.speculation.swift import (
    Chains,
    SkipSearch,
    every_second,
    expected_improvement,
    matchness,
    skip_count,
    skipped_layers,
)

LAYERS = 30
SUBLAYERS = 56
OPTIONS = SwiftOptions()
TARGET = np.isin(np.arange(SUBLAYERS), np.random.default_rng(7).choice(SUBLAYERS, 25, replace=False))


def closeness(skip_set: np.ndarray) -> float:
    """1 for `TARGET`, about 0.5 for a random set."""
    return 1 - float((skip_set != TARGET).mean())


def searched(options: SwiftOptions, steps: int) -> SkipSearch:
    search = SkipSearch(LAYERS, options)
    for _ in range(steps):
        skip_set = search.propose()
        search.judge(skip_set, closeness(skip_set))
    return search


@pytest.mark.parametrize(("layers", "count"), [(30, 25), (32, 27), (40, 34), (80, 70), (4, 1)])
def test_forty_five_percent_of_the_middle_sub_layers_are_skipped(layers: int, count: int) -> None:
    assert skip_count(layers, 0.45) == count  # int(2 * (layers - 2) * 0.45)


def test_the_start_is_every_second_layer_and_never_the_first_or_the_last() -> None:
    odd = [1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27]
    assert skipped_layers(every_second(LAYERS)) == (odd, odd)
    assert skipped_layers(every_second(5)) == ([1, 3], [1, 3])


def test_a_set_names_its_layers() -> None:
    skip_set = np.zeros(SUBLAYERS, np.bool_)
    skip_set[[0, 27, 28, 30, 55]] = True
    assert skipped_layers(skip_set) == ([1, 28], [1, 3, 28])


def test_every_proposal_but_the_first_skips_as_many_and_keeps_the_outer_layers() -> None:
    search = SkipSearch(LAYERS, OPTIONS)
    first = search.propose()
    assert (first == every_second(LAYERS)).all()
    search.judge(first, 0.1)
    for _ in range(60):
        skip_set = search.propose()
        assert skip_set.shape == (SUBLAYERS,)
        assert skip_set.sum() == 25
        attention, mlp = skipped_layers(skip_set)
        assert all(1 <= layer <= 28 for layer in attention + mlp)
        search.judge(skip_set, closeness(skip_set))


def test_only_a_better_set_is_kept() -> None:
    search = SkipSearch(LAYERS, OPTIONS)
    start = search.propose()
    assert search.judge(start, 0.0)  # the first score that there is
    sets = [search._any(1)[0] for _ in range(4)]
    assert search.judge(sets[0], 0.4)
    assert not search.judge(sets[1], 0.4)
    assert not search.judge(sets[2], 0.2)
    assert (search.skip_set == sets[0]).all()
    assert search.score == 0.4
    assert search.judge(sets[3], 0.42)
    assert (search.skip_set == sets[3]).all()
    assert search.iterations == 5


def test_the_search_ends_with_a_score_above_what_is_enough() -> None:
    search = SkipSearch(LAYERS, OPTIONS)
    search.judge(search.propose(), 0.93)
    assert not search.done
    search.judge(search.propose(), 0.94)
    assert search.done


def test_the_search_ends_after_300_proposals_that_are_not_better() -> None:
    search = SkipSearch(LAYERS, replace(OPTIONS, bayes_interval=10**6))
    search.judge(search.propose(), 0.1)
    for _ in range(299):
        search.judge(search.propose(), 0.1)
    assert not search.done
    search.judge(search.propose(), 0.2)  # better: counts from the start again
    for step in range(300):
        assert not search.done, step
        search.judge(search.propose(), 0.2)
    assert search.done
    assert search.iterations == 601


def test_the_search_ends_after_1000_proposals() -> None:
    search = SkipSearch(LAYERS, replace(OPTIONS, bayes_interval=10**6))
    for step in range(1000):
        assert not search.done, step
        search.judge(search.propose(), step / 2000)
    assert search.done


def test_the_same_seed_searches_the_same_way() -> None:
    one, two = searched(OPTIONS, 80), searched(OPTIONS, 80)
    assert (one.propose() == two.propose()).all()
    assert (one.skip_set == two.skip_set).all()
    other = searched(replace(OPTIONS, seed=1), 80)
    assert not (one.propose() == other.propose()).all()


def test_expected_improvement_is_that_of_a_normal_variable() -> None:
    """Far from everything scored, the surrogate knows the mean and the spread alone."""
    scored = np.zeros((4, SUBLAYERS), np.bool_)
    for row in range(4):
        scored[row, row] = True
    scores = np.array([0.1, 0.3, 0.1, 0.3])
    (gain,) = expected_improvement(scored, scores, np.ones((1, SUBLAYERS), np.bool_))
    assert gain == pytest.approx(0.0833, rel=0.25)  # standard normal beyond 1: 0.0833


def test_the_surrogate_finds_what_lies_near_the_best() -> None:
    random = np.random.default_rng(3)
    scored = random.random((120, SUBLAYERS)).argsort(axis=1) < 25
    scores = np.array([closeness(skip_set) for skip_set in scored])
    candidates = random.random((300, SUBLAYERS)).argsort(axis=1) < 25
    values = np.array([closeness(skip_set) for skip_set in candidates])
    chosen = values[int(expected_improvement(scored, scores, candidates).argmax())]
    assert chosen >= np.quantile(values, 0.9)


def test_proposals_of_the_surrogate_climb_where_random_ones_do_not() -> None:
    random = searched(replace(OPTIONS, bayes_interval=10**6), 150)
    guided = searched(replace(OPTIONS, bayes_interval=5), 150)
    assert guided.score > random.score + 0.05
    assert guided.score > 0.8


def test_matchness_is_the_share_of_equal_tokens() -> None:
    verified = np.array([5, 6, 7, 8], np.int32)
    assert matchness(np.array([5, 6, 1, 8], np.int32), verified) == 0.75


@pytest.mark.parametrize("layers", [2, 3])
def test_a_model_without_enough_layers_is_refused(layers: int) -> None:
    with pytest.raises(ValueError, match=f"{layers} layers"):
        SkipSearch(layers, OPTIONS)


def test_drafts_end_with_an_unsure_token_or_at_their_limit() -> None:
    chains = Chains(np.array([3, 0, 2, 9]), confidence=0.8)
    assert chains.active.tolist() == [0, 2, 3]
    onward = chains.extend(np.array([11, 21, 31]), np.array([0.9, 0.8, 0.79], np.float32))
    assert onward.tolist() == [True, True, False]
    onward = chains.extend(np.array([12, 22]), np.array([0.99, 0.99], np.float32))
    assert onward.tolist() == [True, False]
    chains.extend(np.array([13]), np.array([1.0], np.float32))
    assert not len(chains.active)
    assert chains.tokens == [[11, 12, 13], [], [21, 22], [31]]
