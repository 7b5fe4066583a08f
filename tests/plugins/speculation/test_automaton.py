"""The suffix automaton against searching the text itself."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from galley_plugins.speculation import automaton
from galley_plugins.speculation.automaton import Text

unhurried = settings(deadline=None, max_examples=150)
texts = st.lists(st.integers(0, 2), max_size=40)


def ids(tokens: list[int] | range) -> np.ndarray:
    return np.array(tokens, np.int32)


def ends_of(text: list[int], part: list[int]) -> list[int]:
    """Index of the last token of every occurrence that another token follows."""
    size = len(part)
    return [end for end in range(size - 1, len(text) - 1) if text[end - size + 1 : end + 1] == part]


def longest_repeated_suffix(text: list[int]) -> int:
    return max((size for size in range(1, len(text)) if ends_of(text, text[-size:])), default=0)


@given(texts)
@unhurried
def test_the_match_is_the_longest_suffix_that_occurred_before(tokens: list[int]) -> None:
    built = Text(ids(tokens)).automaton
    state, length = automaton.matched(built)
    assert length == longest_repeated_suffix(tokens)
    if length:
        assert built.last[state] == ends_of(tokens, tokens[-length:])[-1]


@given(texts, texts)
@unhurried
def test_a_match_goes_on_with_the_longest_suffix_that_the_text_has(
    tokens: list[int], more: list[int]
) -> None:
    built = Text(ids(tokens)).automaton
    state, length = automaton.matched(built)
    matched = tokens[len(tokens) - length :]
    for token in more:
        state, length = automaton.step(built, state, length, token)
        matched = [*matched, token]
        while matched and not any(
            tokens[start : start + len(matched)] == matched for start in range(len(tokens))
        ):
            matched = matched[1:]
        assert length == len(matched)
        if length:
            assert built.length[built.link[state]] < length <= built.length[state]


@given(texts, texts)
@unhurried
def test_a_text_may_come_in_pieces(first: list[int], second: list[int]) -> None:
    piecewise = Text(ids(first))
    piecewise.extend(ids(second))
    whole = Text(ids(first + second))
    assert piecewise.automaton.text[: len(piecewise)].tolist() == first + second
    assert automaton.matched(piecewise.automaton)[1] == automaton.matched(whole.automaton)[1]


@given(st.lists(texts, max_size=6))
@unhurried
def test_a_long_text_keeps_its_end(pieces: list[list[int]]) -> None:
    text, whole = Text(ids([]), most=16), []
    for piece in pieces:
        text.extend(ids(piece))
        whole += piece
        assert min(len(whole), 8) <= len(text)
        kept = text.automaton.text[: len(text)].tolist()
        assert kept == whole[len(whole) - len(text) :]
        assert automaton.matched(text.automaton)[1] == longest_repeated_suffix(kept)


def test_a_text_that_is_too_long_at_once_keeps_its_end() -> None:
    assert Text(ids(range(100)), most=32).automaton.text[:32].tolist() == list(range(68, 100))


@pytest.mark.parametrize("unit", [[1], [1, 2], list(range(300)), [1] * 299 + [2], [1] + [2] * 299])
def test_no_text_outgrows_its_arrays(unit: list[int]) -> None:
    tokens = (unit * 300)[:300]
    built = automaton.automaton_in(automaton.new_automaton(len(tokens)))
    automaton.extend(built, ids(tokens))
    used, states, edges, _ = built.counts
    assert used == len(tokens) == len(built.text)
    assert states <= len(built.length)
    assert edges <= len(built.edge_to)
