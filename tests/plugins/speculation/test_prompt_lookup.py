"""Prompt lookup: matches, their continuations, and when there are none."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from galley_plugins.speculation.drafting import Ask, Opening
from galley_plugins.speculation.options import SpeculationOptions
from galley_plugins.speculation.prompt_lookup import PromptLookup


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, np.int32)


def looked_up(tokens: tuple[int, ...], limit: int = 16, least: int = 2) -> list[int]:
    drafter = PromptLookup(SpeculationOptions(method="prompt-lookup"), 1000, least)
    drafter.begin(0, Opening(ids(*tokens)))
    found = drafter.propose([Ask(0, limit, True)])[0]
    assert found.is_chain
    return found.tokens.tolist()


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ((), []),
        ((1,), []),
        ((1, 2, 3, 4), []),
        ((1, 2, 1), []),  # one token is too short a match
        ((1, 2, 3, 4, 1, 2), [3, 4, 1, 2]),
        ((1, 2, 3, 9, 2, 4, 9, 1, 2), [3, 9, 2, 4, 9, 1, 2]),  # (1, 2) and not the later (2)
        ((1, 2, 3, 1, 2, 4, 1, 2), [4, 1, 2]),  # the latest of two places
        ((1, 2, 1, 2, 1, 2), [1, 2] * 8),  # a period goes on
        ((7, 7, 7), [7] * 16),
    ],
)
def test_drafts_what_followed_the_longest_match(tokens: tuple[int, ...], expected: list[int]) -> None:
    assert looked_up(tokens) == expected
    for limit in (0, 1, 3):
        assert looked_up(tokens, limit) == expected[:limit]


def test_the_shortest_match_can_be_chosen() -> None:
    assert looked_up((1, 2, 1), least=1) == [2, 1]
    assert looked_up((1, 2, 3, 4, 1, 2), least=3) == []


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(1, 3), st.integers(0, 8))
@settings(deadline=None)
def test_agrees_with_searching_the_text(tokens: list[int], least: int, limit: int) -> None:
    expected: list[int] = []
    for size in range(len(tokens) - 1, least - 1, -1):
        starts = [at for at in range(len(tokens) - size) if tokens[at : at + size] == tokens[-size:]]
        if starts:
            after = tokens[starts[-1] + size :]
            expected = (after * 8 if size >= len(after) else after)[:limit]
            break
    assert looked_up(tuple(tokens), limit, least) == expected


def test_generated_tokens_count_and_requests_are_their_own() -> None:
    drafter = PromptLookup(SpeculationOptions(method="prompt-lookup"), 1000)
    drafter.begin(0, Opening(ids(1, 2, 3, 1)))
    drafter.begin(1, Opening(ids(2, 1)))
    drafter.extend(0, ids(2))
    drafter.extend(1, ids(2))
    drafts = drafter.propose([Ask(1, 4, False), Ask(0, 4, False)])
    assert [found.tokens.tolist() for found in drafts] == [[], [3, 1, 2]]
    drafter.end(0)
    drafter.begin(0, Opening(ids(5)))
    assert len(drafter.propose([Ask(0, 4, False)])[0].tokens) == 0
