"""A suffix automaton over a request's own text: where did its longest suffix occur before, and what followed?

Online construction of Blumer et al. (1985), amortised constant time a token. Transitions lie in one hash
table with a linked list per state, so that a state costs what it has. Numba-compiled; all state in arrays.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numba import njit

if TYPE_CHECKING:
    from numpy.typing import NDArray

ROOT = 0
_HOPS = 32  # suffix links whose last occurrence is renewed a token; a text's chains are far shorter


class Automaton(NamedTuple):
    """Views of one automaton with room for `n` tokens: up to 2n states and 3n transitions.

    Attributes:
        counts: int32 [4]: tokens, states, edges, the state of the whole text.
        text: int32 [n].
        length: int32 [2n], the longest string of each state.
        link: int32 [2n], suffix links; -1 at the root.
        last: int32 [2n], index of the token that ends the latest occurrence that another token follows; -1.
        first_edge: int32 [2n], head of each state's list of transitions; -1.
        edge_token, edge_to, edge_from, edge_next: int32 [3n].
        slots: int32 [a power of two >= 6n], hash table of transitions, edge + 1; 0 is free.
    """

    counts: NDArray[np.int32]
    text: NDArray[np.int32]
    length: NDArray[np.int32]
    link: NDArray[np.int32]
    last: NDArray[np.int32]
    first_edge: NDArray[np.int32]
    edge_token: NDArray[np.int32]
    edge_to: NDArray[np.int32]
    edge_from: NDArray[np.int32]
    edge_next: NDArray[np.int32]
    slots: NDArray[np.int32]


_HEAD = 5  # `counts`, and the room
_BEFORE_SLOTS = 21  # numbers for each token of room


@njit(cache=True)
def automaton_in(memory: NDArray[np.int32]) -> Automaton:
    """The automaton that lies in one array; arrays are what a call of compiled code spends its time on."""
    room = memory[_HEAD - 1]
    states, edges = 2 * room, 3 * room
    at = _HEAD + room
    middle = at + 4 * states
    return Automaton(
        memory[:4],
        memory[_HEAD:at],
        memory[at : at + states],
        memory[at + states : at + 2 * states],
        memory[at + 2 * states : at + 3 * states],
        memory[at + 3 * states : middle],
        memory[middle : middle + edges],
        memory[middle + edges : middle + 2 * edges],
        memory[middle + 2 * edges : middle + 3 * edges],
        memory[middle + 3 * edges : middle + 4 * edges],
        memory[middle + 4 * edges :],
    )


def new_automaton(room: int) -> NDArray[np.int32]:
    """The memory of an empty automaton with room for `room` tokens, about 108 to 132 bytes each."""
    room = max(room, 16)
    slots = 1 << (6 * room - 1).bit_length()
    memory = np.empty(_HEAD + _BEFORE_SLOTS * room + slots, np.int32)
    memory[:_HEAD] = 0, 1, 0, ROOT, room  # one state, the root
    empty: Automaton = automaton_in(memory)
    empty.length[:] = 0
    empty.slots[:] = 0
    for heads in (empty.link, empty.last, empty.first_edge):
        heads[:] = -1
    return memory


@njit(cache=True)
def _slot(a: Automaton, state: int, token: int) -> int:
    """The slot of a transition, or the free one where it would go."""
    mask = len(a.slots) - 1
    hashed = (np.int64(state) * 1000003 + np.int64(token)) * np.int64(-7046029254386353131)
    position = (hashed >> 32) & mask
    while True:
        edge = a.slots[position] - 1
        if edge < 0 or (a.edge_from[edge] == state and a.edge_token[edge] == token):
            return int(position)
        position = (position + 1) & mask


@njit(cache=True)
def target(a: Automaton, state: int, token: int) -> int:
    """Where `token` leads from `state`; -1 nowhere."""
    edge = a.slots[_slot(a, state, token)] - 1
    return a.edge_to[edge] if edge >= 0 else -1


@njit(cache=True)
def _connect(a: Automaton, state: int, token: int, to: int) -> None:
    position = _slot(a, state, token)
    edge = a.slots[position] - 1
    if edge < 0:
        edge = a.counts[2]
        a.counts[2] += 1
        a.slots[position] = edge + 1
        a.edge_from[edge] = state
        a.edge_token[edge] = token
        a.edge_next[edge] = a.first_edge[state]
        a.first_edge[state] = edge
    a.edge_to[edge] = to


@njit(cache=True)
def extend(a: Automaton, tokens: NDArray[np.int32]) -> None:
    """Append `tokens`; the caller has made sure of the room."""
    for token in tokens:
        index = a.counts[0]
        whole = a.counts[3]
        # The text so far now has a continuation: renew where its suffixes last occurred.
        state = whole
        for _ in range(_HOPS):
            if state <= ROOT:
                break
            a.last[state] = index - 1
            state = a.link[state]
        a.text[index] = token
        a.counts[0] = index + 1
        current = a.counts[1]
        a.counts[1] += 1
        a.length[current] = a.length[whole] + 1
        a.counts[3] = current
        state = whole
        while state != -1 and target(a, state, token) < 0:
            _connect(a, state, token, current)
            state = a.link[state]
        if state == -1:
            a.link[current] = ROOT
            continue
        found = target(a, state, token)
        if a.length[state] + 1 == a.length[found]:
            a.link[current] = found
            continue
        clone = a.counts[1]
        a.counts[1] += 1
        a.length[clone] = a.length[state] + 1
        a.link[clone] = a.link[found]
        a.last[clone] = a.last[found]
        edge = a.first_edge[found]
        while edge >= 0:
            _connect(a, clone, a.edge_token[edge], a.edge_to[edge])
            edge = a.edge_next[edge]
        while state != -1 and target(a, state, token) == found:
            _connect(a, state, token, clone)
            state = a.link[state]
        a.link[found] = clone
        a.link[current] = clone


@njit(cache=True)
def matched(a: Automaton) -> tuple[int, int]:
    """State and length of the text's longest suffix that occurred before; the root and 0 without one."""
    whole = a.counts[3]
    if whole == ROOT:
        return ROOT, 0
    state = a.link[whole]
    return state, a.length[state]


@njit(cache=True)
def step(a: Automaton, state: int, length: int, token: int) -> tuple[int, int]:
    """The longest suffix of (the string matched so far + `token`) that occurs in the text."""
    while True:
        to = target(a, state, token)
        if to >= 0:
            return to, length + 1
        if state == ROOT:
            return ROOT, 0
        state = a.link[state]
        length = a.length[state]


@njit(cache=True)
def extend_in(memory: NDArray[np.int32], tokens: NDArray[np.int32]) -> None:
    """`extend`, of the automaton that lies there."""
    extend(automaton_in(memory), tokens)


class Text:
    """A request's text and its automaton, at most `most` tokens; older ones are forgotten by halves.

    Args:
        most: bounds the memory: about 130 bytes a token.

    Attributes:
        memory: int32, of `automaton_in`; another array once the room is used up.
    """

    def __init__(self, tokens: NDArray[np.int32], most: int = 32768) -> None:
        self._most = most
        tokens = tokens[-most:]
        self.memory = new_automaton(min(most, 2 * len(tokens) + 256))
        extend_in(self.memory, np.ascontiguousarray(tokens, np.int32))

    def __len__(self) -> int:
        return int(self.memory[0])

    @property
    def automaton(self) -> Automaton:
        found: Automaton = automaton_in(self.memory)
        return found

    def reserve(self, count: int) -> None:
        """Make room for `count` more tokens; beyond the bound, the older half of the text is forgotten."""
        needed = len(self) + count
        if needed <= self.memory[_HEAD - 1]:
            return
        kept = self.memory[_HEAD : _HEAD + len(self)]
        if needed > self._most:
            kept = kept[-(self._most // 2) :]
        self.memory = new_automaton(max(min(self._most, 2 * (len(kept) + count)), len(kept) + count))
        extend_in(self.memory, np.ascontiguousarray(kept))

    def extend(self, tokens: NDArray[np.int32]) -> None:
        self.reserve(len(tokens))
        extend_in(self.memory, np.ascontiguousarray(tokens, np.int32))
