"""Prompt lookup: what followed the text's longest suffix where it occurred before in the same request.

Prompt Lookup Decoding (Saxena, 2023), there with n-grams of fixed lengths; here the suffix automaton gives
the longest match of any length, at its latest place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numba import njit

from galley_plugins.speculation import automaton as text_automaton
from galley_plugins.speculation.automaton import ROOT, Automaton, Text
from galley_plugins.speculation.drafting import Draft

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from galley_plugins.speculation.drafting import Ask, Opening, Seen, Timing
    from galley_plugins.speculation.options import SpeculationOptions

LEAST = 2
"""The shortest match that is believed: single tokens, such as a comma, recur before anything."""


class PromptLookup:
    """Drafts chains from the request's own text; there is nothing to share, so scopes do not matter.

    A match that overlaps its earlier occurrence makes the text's end periodic; the period is drafted on.

    Args:
        least: tokens that must match.
    """

    name = "prompt-lookup"

    def __init__(self, options: SpeculationOptions, vocab_size: int, least: int = LEAST) -> None:
        self._least = least
        self._texts: dict[int, Text] = {}

    def begin(self, request: int, opening: Opening) -> None:
        self._texts[request] = Text(opening.tokens)

    def observe(self, seen: Seen) -> None:
        """Nothing is learned from predictions."""

    def extend(self, request: int, tokens: NDArray[np.int32]) -> None:
        self._texts[request].extend(tokens)

    def timed(self, timing: Timing) -> None:
        """Costs change nothing: the limit is the asker's."""

    def propose(self, asks: Sequence[Ask]) -> list[Draft]:
        drafts = []
        for ask in asks:
            tokens = np.empty(max(ask.limit, 0), np.int32)
            count = continuation(self._texts[ask.request].automaton, self._least, tokens)
            drafts.append(Draft.chain(tokens[:count]))
        return drafts

    def end(self, request: int) -> None:
        self._texts.pop(request, None)


@njit(cache=True)
def continuation(a: Automaton, least: int, tokens: NDArray[np.int32]) -> int:
    """Write what followed the longest match of at least `least` tokens; returns how many tokens.

    Args:
        tokens: int32 [limit].
    """
    state, length = text_automaton.matched(a)
    while state > ROOT and a.last[state] < 0:
        state = a.link[state]
        length = a.length[state]
    if state <= ROOT or length < least:
        return 0
    start = a.last[state] + 1
    distance = a.counts[0] - start
    count = len(tokens) if length >= distance else min(len(tokens), distance)
    for index in range(count):
        tokens[index] = a.text[start + index % distance]
    return count
