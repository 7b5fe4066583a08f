"""How likely is a candidate? Several sources say, and what was accepted so far tells how far to believe them.

Each source's opinion of a candidate falls into a bin with its own running acceptance rate; the rates are
added in the logistic domain with weights that gradient steps adapt. This is the logistic mixing of context
models in data compression (Mahoney, "Adaptive weighing of context models for lossless data compression",
2005), with candidates of a draft in the place of bits; as there, which weights apply depends on what is
known. Every verified position teaches all its candidates, drafted or not.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numba import njit

from galley_plugins.speculation import automaton as text_automaton
from galley_plugins.speculation.drafting import CONTEXT, TOP
from galley_plugins.speculation.tables import WAYS, TableArrays, context_key, find

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from galley_plugins.speculation.automaton import Automaton

MOST = CONTEXT * TOP + 4  # candidates of one context
_PROB_BINS = 12
_ORDER_BINS = _PROB_BINS + 2  # and: not among this context's successors; context unknown
_LENGTHS = 13  # match lengths 1 to 12 and more
_RANKS = 3  # longest match, next, any later
_LOOKUP_BINS = (_LENGTHS - 1) * _RANKS + 2
_JOINT_ORDER = 6
_JOINT_LOOKUP = 6
_JOINT = _JOINT_ORDER**CONTEXT * _JOINT_LOOKUP
RECENT = 4  # last rows whose predictions are looked at
_RECENT_BINS = RECENT * TOP + 1
_OFFSETS = (0, _ORDER_BINS, 2 * _ORDER_BINS, 3 * _ORDER_BINS, 3 * _ORDER_BINS + _LOOKUP_BINS)
_RECENT_OFFSET = _OFFSETS[-1] + _JOINT
BINS = _RECENT_OFFSET + _RECENT_BINS
INPUTS = 6  # three orders, the lookup, all of them jointly, the last rows
_LENGTH_SETS, _KNOWN_SETS = 4, 6
SETS = _LENGTH_SETS + _KNOWN_SETS
DEPTHS = 16


class Mixer(NamedTuple):
    """What was learned of the sources' reliability; one for greedy requests, one for sampled ones.

    Attributes:
        rates: float32 [kinds, bins], running acceptance rates.
        counts: float32 [kinds, bins], how many examples each has seen, capped.
        stretched: float32 [kinds, bins], logit of `rates`.
        weights: float32 [kinds, sets, inputs + 1], of the inputs, and the bias; a candidate's are the sum of
            two sets, by the length of its match and by who else knows of it.
        depth: float32 [kinds, depths], correction in the logistic domain by depth in the draft.
    """

    rates: NDArray[np.float32]
    counts: NDArray[np.float32]
    stretched: NDArray[np.float32]
    weights: NDArray[np.float32]
    depth: NDArray[np.float32]


class Candidates(NamedTuple):
    """Scratch for the candidates of one context.

    Attributes:
        tokens: int32 [most].
        probs: float32 [most, 3], their weight by order; -1 where an order does not have them.
        lookup: int32 [most, 2], match length and rank; 0 without a match.
        recent: int32 [most], 1 + age * TOP + rank in the last of the recent rows that has it; 0 if none has.
        bins: int32 [most, inputs].
        sets: int32 [most, 2], its sets of weights.
        scores: float32 [most], their mixed probability.
        known: bool [4], which orders (and the lookup) know the context at all.
    """

    tokens: NDArray[np.int32]
    probs: NDArray[np.float32]
    lookup: NDArray[np.int32]
    recent: NDArray[np.int32]
    bins: NDArray[np.int32]
    sets: NDArray[np.int32]
    scores: NDArray[np.float32]
    known: NDArray[np.bool_]


KINDS = 2


@njit(cache=True)
def mixer_in(memory: NDArray[np.float32]) -> Mixer:
    """The mixer that lies in one array."""
    each, weights = KINDS * BINS, KINDS * SETS * (INPUTS + 1)
    return Mixer(
        memory[:each].reshape(KINDS, BINS),
        memory[each : 2 * each].reshape(KINDS, BINS),
        memory[2 * each : 3 * each].reshape(KINDS, BINS),
        memory[3 * each : 3 * each + weights].reshape(KINDS, SETS, INPUTS + 1),
        memory[3 * each + weights :].reshape(KINDS, DEPTHS),
    )


def new_mixer() -> NDArray[np.float32]:
    """The memory of a mixer that believes sources by their own word, until it has seen better."""
    rates = np.full(BINS, 0.1, np.float32)
    for order in range(CONTEXT):
        base = _OFFSETS[order]
        for index in range(_PROB_BINS):
            rates[base + index] = max(0.01, ((index + 0.5) / _PROB_BINS) ** 2)
        rates[base + _PROB_BINS] = 0.03
    base = _OFFSETS[CONTEXT]
    for length in range(1, _LENGTHS):
        for rank in range(_RANKS):
            rates[base + (length - 1) * _RANKS + rank] = (1 - 1 / (1 + 0.5 * length)) / (1 + rank)
    rates[base + _LOOKUP_BINS - 2] = 0.02
    rates[base + _LOOKUP_BINS - 1] = 0.05
    memory = np.zeros(KINDS * (3 * BINS + SETS * (INPUTS + 1) + DEPTHS), np.float32)
    mixer: Mixer = mixer_in(memory)
    mixer.rates[:] = rates
    mixer.counts[:] = 1
    mixer.stretched[:] = np.log(rates / (1 - rates))
    mixer.weights[:, :_LENGTH_SETS] = 0.25, 0.25, 0.25, 0.4, 0.4, 0.5, 1.4
    return memory


@njit(cache=True)
def new_candidates() -> Candidates:
    """Scratch space."""
    return Candidates(
        np.empty(MOST, np.int32),
        np.empty((MOST, CONTEXT), np.float32),
        np.empty((MOST, 2), np.int32),
        np.empty(MOST, np.int32),
        np.empty((MOST, INPUTS), np.int32),
        np.empty((MOST, 2), np.int32),
        np.empty(MOST, np.float32),
        np.empty(CONTEXT + 1, np.bool_),
    )


@njit(cache=True)
def _place(c: Candidates, count: int, token: int) -> tuple[int, int]:
    """Index of a candidate, added if new, and how many there are now."""
    for index in range(count):
        if c.tokens[index] == token:
            return index, count
    if count == MOST:
        return -1, count
    c.tokens[count] = token
    for order in range(CONTEXT):
        c.probs[count, order] = -1.0
    c.lookup[count, 0] = 0
    c.lookup[count, 1] = 0
    return count, count + 1


@njit(cache=True)
def gather(
    c: Candidates,
    table: TableArrays,
    scope: int,
    a: Automaton,
    state: int,
    length: int,
    c0: int,
    c1: int,
    c2: int,
    recent: NDArray[np.int32],
    depth: int,
) -> int:
    """Collect the candidates after (c0, c1, c2) and after the automaton's match; returns how many.

    Args:
        recent: int32 [recent, top], the model's predictions at the last rows, newest first; -1 before.
        depth: of these candidates in the draft: so many rows between are not known yet.
    """
    count = 0
    for order in range(1, CONTEXT + 1):
        c.known[order - 1] = False
        if (order == 2 and c1 < 0) or (order == 3 and (c0 < 0 or c1 < 0)):
            continue
        entry = find(table, context_key(order, scope, c0, c1, c2))
        if entry < 0:
            continue
        c.known[order - 1] = True
        row, way = entry // WAYS, entry % WAYS
        for rank in range(TOP):
            token = table.tokens[row, way, rank]
            if token < 0:
                break
            index, count = _place(c, count, token)
            if index >= 0:
                c.probs[index, order - 1] = table.weights[row, way, rank]
    c.known[CONTEXT] = False
    found = 0
    while state > 0 and found < _RANKS:
        end = a.last[state]
        if end >= 0:
            token = a.text[end + 1]
            index, count = _place(c, count, token)
            if index >= 0 and c.lookup[index, 0] == 0:
                c.known[CONTEXT] = True
                c.lookup[index, 0] = length
                c.lookup[index, 1] = found
                found += 1
        state = a.link[state]
        if state >= 0:
            length = a.length[state]
    for index in range(count):
        c.recent[index] = 0
    for age in range(depth, RECENT):
        for rank in range(1, TOP):  # the first is what followed, mostly
            token = recent[age - depth, rank]
            if token < 0:
                break
            for index in range(count):
                if c.tokens[index] == token and c.recent[index] == 0:
                    c.recent[index] = 1 + age * TOP + rank
    return count


@njit(cache=True)
def score(c: Candidates, count: int, mixer: Mixer, kind: int, depth: int) -> None:
    """Fill `bins`, `sets` and `scores` of the first `count` candidates."""
    stretched = mixer.stretched[kind]
    bias = mixer.depth[kind, min(depth, DEPTHS - 1)]
    longer_known = int(c.known[1]) + int(c.known[2])
    for index in range(count):
        matched, rank = c.lookup[index, 0], c.lookup[index, 1]
        c.sets[index, 0] = 0 if matched == 0 else 1 if matched < 3 else 2 if matched < 6 else 3
        c.sets[index, 1] = _LENGTH_SETS + longer_known + (_KNOWN_SETS // 2 if c.recent[index] else 0)
        by_length, by_known = mixer.weights[kind, c.sets[index, 0]], mixer.weights[kind, c.sets[index, 1]]
        joint = 0
        total = bias + by_length[INPUTS] + by_known[INPUTS]
        for order in range(CONTEXT):
            prob = c.probs[index, order]
            if not c.known[order]:
                at, coarse = _PROB_BINS + 1, 0
            elif prob < 0:
                at, coarse = _PROB_BINS, 1
            else:
                at = min(_PROB_BINS - 1, int(_PROB_BINS * math.sqrt(prob)))
                coarse = 2 + min(3, int(4 * prob))
            joint = joint * _JOINT_ORDER + coarse
            place = order * _ORDER_BINS + at
            c.bins[index, order] = place
            total += (by_length[order] + by_known[order]) * stretched[place]
        if matched > 0:
            at = (min(matched, _LENGTHS - 1) - 1) * _RANKS + rank
            joint = joint * _JOINT_LOOKUP + 1 + min(matched // 2, 4)
        else:
            at = _LOOKUP_BINS - 2 if c.known[CONTEXT] else _LOOKUP_BINS - 1
            joint = joint * _JOINT_LOOKUP
        place = CONTEXT * _ORDER_BINS + at
        c.bins[index, CONTEXT] = place
        total += (by_length[CONTEXT] + by_known[CONTEXT]) * stretched[place]
        place = CONTEXT * _ORDER_BINS + _LOOKUP_BINS + joint
        c.bins[index, CONTEXT + 1] = place
        total += (by_length[CONTEXT + 1] + by_known[CONTEXT + 1]) * stretched[place]
        place = _RECENT_OFFSET + c.recent[index]
        c.bins[index, CONTEXT + 2] = place
        total += (by_length[CONTEXT + 2] + by_known[CONTEXT + 2]) * stretched[place]
        c.scores[index] = 1.0 / (1.0 + math.exp(-total))


@njit(cache=True)
def teach(c: Candidates, count: int, mixer: Mixer, kind: int, token: int, pace: float) -> None:
    """Tell the mixer that `token` followed, for candidates scored at depth 0.

    Args:
        pace: step size of the weights.
    """
    for index in range(count):
        truth = 1.0 if c.tokens[index] == token else 0.0
        error = pace * (truth - c.scores[index])
        by_length, by_known = mixer.weights[kind, c.sets[index, 0]], mixer.weights[kind, c.sets[index, 1]]
        for input_ in range(INPUTS):
            place = c.bins[index, input_]
            moved = error * mixer.stretched[kind, place]
            by_length[input_] += moved
            by_known[input_] += moved
            seen = min(mixer.counts[kind, place] + 1.0, 255.0)
            mixer.counts[kind, place] = seen
            rate = mixer.rates[kind, place]
            rate += (truth - rate) / (seen + 0.5)
            mixer.rates[kind, place] = rate
            bounded = min(max(rate, 1e-4), 1 - 1e-4)
            mixer.stretched[kind, place] = math.log(bounded / (1 - bounded))
        by_length[INPUTS] += error
        by_known[INPUTS] += error


@njit(cache=True)
def grow(
    table: TableArrays,
    scope: int,
    text: NDArray[np.int32],
    mixer_memory: NDArray[np.float32],
    kind: int,
    context: NDArray[np.int32],
    recent: NDArray[np.int32],
    limit: int,
    chain: bool,
    least: float,
    shape: NDArray[np.int32],
    odds: NDArray[np.float32],
) -> int:
    """Grow a draft best first: always the node that the text most probably reaches next.

    Args:
        text, mixer_memory: see `automaton_in` and `mixer_in`.
        context: int32 [3], the text's last tokens.
        recent: int32 [recent, top], see `gather`.
        limit: the most nodes.
        chain: every node has at most one child.
        least: nodes reached with a smaller probability are not drafted.
        shape: output int32 [3, >= limit], each node's token, parent and depth, 0 after the last token.
        odds: output float32 [2, >= limit], the probability that a node is accepted, and the same given that
            its parent is.

    Returns:
        the number of nodes, in the order of falling probability.
    """
    a = text_automaton.automaton_in(text)
    mixer = mixer_in(mixer_memory)
    tokens, parents, depths = shape[0], shape[1], shape[2]
    reach, chance = odds[0], odds[1]
    c = new_candidates()
    pool = np.empty(((limit + 1) * (MOST + 1), 4), np.float64)
    states = np.empty(limit + 1, np.int32)
    lengths = np.empty(limit + 1, np.int32)
    contexts = np.empty((limit + 1, CONTEXT), np.int32)
    states[0], lengths[0] = text_automaton.matched(a)
    contexts[0] = context
    waiting = 0
    count = 0
    node = -1  # the node whose successors are collected next; -1 the last token
    while count < limit:
        here = node + 1
        base = 1.0 if node < 0 else reach[node]
        depth = 0 if node < 0 else depths[node] + 1
        found = gather(
            c, table, scope, a, states[here], lengths[here],
            contexts[here, 0], contexts[here, 1], contexts[here, 2], recent, depth,
        )  # fmt: skip
        score(c, found, mixer, kind, depth)
        if chain:
            best = -1
            for index in range(found):
                if best < 0 or c.scores[index] > c.scores[best]:
                    best = index
            waiting = 0
            if best >= 0:
                pool[0, 0], pool[0, 1] = base * c.scores[best], c.tokens[best]
                pool[0, 2], pool[0, 3] = node, c.scores[best]
                waiting = 1
        else:
            total = 0.0
            for index in range(found):
                total += c.scores[index]
            scale = 1.0 / total if total > 1.0 else 1.0
            for index in range(found):
                chosen = base * c.scores[index] * scale
                if chosen >= least:
                    pool[waiting, 0], pool[waiting, 1] = chosen, c.tokens[index]
                    pool[waiting, 2], pool[waiting, 3] = node, c.scores[index]
                    waiting += 1
        best = -1
        for index in range(waiting):
            if best < 0 or pool[index, 0] > pool[best, 0]:
                best = index
        if best < 0 or pool[best, 0] < least:
            break
        reach[count] = pool[best, 0]
        token = np.int32(pool[best, 1])
        tokens[count] = token
        parent = int(pool[best, 2])
        parents[count] = parent
        chance[count] = pool[best, 3]
        depths[count] = 0 if parent < 0 else depths[parent] + 1
        waiting -= 1
        for column in range(4):
            pool[best, column] = pool[waiting, column]
        node = count
        count += 1
        states[count], lengths[count] = text_automaton.step(a, states[parent + 1], lengths[parent + 1], token)
        contexts[count, 0] = contexts[parent + 1, 1]
        contexts[count, 1] = contexts[parent + 1, 2]
        contexts[count, 2] = token
    return count
