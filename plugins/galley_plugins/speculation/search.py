"""ADED's Monte-Carlo tree search over tri-gram weights, and the draft that it gives.

ADED (arXiv 2407.12021) and its authors' code. Each iteration selects by PUCT,

    W(c) / N(c) + (c1 + ln((N + c2 + 1) / c2)) * P(c) * sqrt(N) / (1 + N(c)),   infinite for N(c) = 0,

expands a leaf with all its successors, rolls out from the last of them by sampling in proportion to P, and
adds the sum of P along the whole way to every node above. The authors' code looks that sum up under the wrong
token, so that it is almost always 0; here it is what the paper says. They also add 1 to it, which raises all
W / N alike and so changes nothing.

A state is two tokens, and a way has `depth` states, the text's last two tokens being the first. The random
numbers follow from these two tokens, so that a draft depends on the table and the context alone.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numba import njit

from galley_plugins.speculation.corpus import MOST_SUCCESSORS, Corpus
from galley_plugins.speculation.tables import context_key
from galley_plugins.speculation.trigram_table import Trigrams, successors

if TYPE_CHECKING:
    from numpy.typing import NDArray

_ROOT = 0


class Tree(NamedTuple):
    """Scratch for one search; node 0 is the last token. One is enough for a thread.

    Attributes:
        tokens: int32 [nodes].
        parents: int32 [nodes]; -1 for the root.
        first: int32 [nodes], the first of a node's children, which lie side by side.
        children: int32 [nodes], how many; -1 before the node is expanded.
        priors: float64 [nodes], P given the parent's state.
        visits: int64 [nodes], N.
        values: float64 [nodes], W.
        next_tokens, next_weights: int32, float32 [32], successors of one state.
        places: int32 [nodes], where in the draft a node is; -1.
        random: uint64 [1], state of the generator.
    """

    tokens: NDArray[np.int32]
    parents: NDArray[np.int32]
    first: NDArray[np.int32]
    children: NDArray[np.int32]
    priors: NDArray[np.float64]
    visits: NDArray[np.int64]
    values: NDArray[np.float64]
    next_tokens: NDArray[np.int32]
    next_weights: NDArray[np.float32]
    places: NDArray[np.int32]
    random: NDArray[np.uint64]


def new_tree(iterations: int) -> Tree:
    """Room for a search of so many iterations."""
    room = 1 + iterations * MOST_SUCCESSORS
    return Tree(
        tokens=np.empty(room, np.int32),
        parents=np.empty(room, np.int32),
        first=np.empty(room, np.int32),
        children=np.empty(room, np.int32),
        priors=np.empty(room, np.float64),
        visits=np.empty(room, np.int64),
        values=np.empty(room, np.float64),
        next_tokens=np.empty(MOST_SUCCESSORS, np.int32),
        next_weights=np.empty(MOST_SUCCESSORS, np.float32),
        places=np.empty(room, np.int32),
        random=np.zeros(1, np.uint64),
    )


@njit(cache=True)
def uniform(state: NDArray[np.uint64]) -> float:
    """The next number in [0, 1): SplitMix64 (Steele et al., 2014), its upper 53 bits."""
    state[0] += np.uint64(0x9E3779B97F4A7C15)
    mixed = state[0]
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed = mixed ^ (mixed >> np.uint64(31))
    return np.float64(mixed >> np.uint64(11)) / 9007199254740992.0


@njit(cache=True)
def _add_node(tree: Tree, node: int, parent: int, token: int, prior: float) -> None:
    tree.tokens[node] = token
    tree.parents[node] = parent
    tree.children[node] = -1
    tree.priors[node] = prior
    tree.visits[node] = 0
    tree.values[node] = 0.0


@njit(cache=True)
def _select(tree: Tree, node: int, c1: float, c2: float) -> int:
    """The child with the highest PUCT score, the earliest of equals."""
    visits = tree.visits[node]
    weight = (c1 + math.log((visits + c2 + 1.0) / c2)) * math.sqrt(visits)
    best, best_score = -1, -1.0
    for child in range(tree.first[node], tree.first[node] + tree.children[node]):
        if tree.visits[child] == 0:
            return child
        score = tree.values[child] / tree.visits[child]
        score += weight * tree.priors[child] / (1 + tree.visits[child])
        if score > best_score:
            best, best_score = child, score
    return best


@njit(cache=True)
def _sample(tree: Tree, count: int) -> int:
    """One of the `count` next tokens, in proportion to their weights."""
    total = 0.0
    for index in range(count):
        total += tree.next_weights[index]
    left = uniform(tree.random) * total
    for index in range(count):
        left -= tree.next_weights[index]
        if left < 0.0:
            return index
    return count - 1


@njit(cache=True)
def search(
    tree: Tree,
    table: Trigrams,
    corpus: Corpus,
    scope: int,
    a: int,
    b: int,
    iterations: int,
    depth: int,
    c1: float,
    c2: float,
) -> int:
    """Fill the tree for a text that ends in (a, b); returns how many nodes it has.

    Args:
        iterations: at most as many as `new_tree` made room for.
        depth: states of a way, the first included: the tree is `depth` - 1 deep.
    """
    _add_node(tree, _ROOT, -1, b, 0.0)
    tree.random[0] = np.uint64(context_key(2, 0, 0, a, b))
    nodes = 1
    for _ in range(iterations):
        node, before, states, value = _ROOT, a, 1, 0.0
        while states < depth and tree.children[node] > 0:
            before = tree.tokens[node]
            node = _select(tree, node, c1, c2)
            value += tree.priors[node]
            states += 1
        if states < depth and tree.children[node] < 0:
            count = successors(
                table, corpus, scope, before, tree.tokens[node], tree.next_tokens, tree.next_weights
            )
            tree.first[node] = nodes
            tree.children[node] = count
            for index in range(count):
                _add_node(tree, nodes, node, tree.next_tokens[index], tree.next_weights[index])
                nodes += 1
            if count > 0:
                before = tree.tokens[node]
                node = nodes - 1
                value += tree.priors[node]
                states += 1
        if nodes == 1:
            break
        older, newer = before, tree.tokens[node]
        while states < depth:
            count = successors(table, corpus, scope, older, newer, tree.next_tokens, tree.next_weights)
            if count == 0:
                break
            chosen = _sample(tree, count)
            value += tree.next_weights[chosen]
            older, newer = newer, tree.next_tokens[chosen]
            states += 1
        while node >= 0:
            tree.visits[node] += 1
            tree.values[node] += value
            node = tree.parents[node]
    return nodes


@njit(cache=True)
def most_visited(tree: Tree, nodes: int, paths: int) -> NDArray[np.int32]:
    """The nodes but the root by falling visits, int32 [at most `paths`]; the earlier of equals first.

    A node is a path. No node comes before its parent, which was made earlier and is visited as often.
    """
    chosen = np.empty(paths, np.int32)
    count = 0
    for node in range(1, nodes):
        place = count
        while place > 0 and tree.visits[chosen[place - 1]] < tree.visits[node]:
            place -= 1
        if place == paths:
            continue
        for index in range(min(count, paths - 1), place, -1):
            chosen[index] = chosen[index - 1]
        chosen[place] = node
        count = min(count + 1, paths)
    return chosen[:count]


@njit(cache=True)
def _greedy(tree: Tree, table: Trigrams, corpus: Corpus, scope: int, node: int) -> tuple[int, int]:
    """The most probable successor of a node below the root: its token, and its node if there is one.

    -1 stands for none; the earlier of equals is taken.
    """
    if tree.children[node] >= 0:
        best = -1
        for child in range(tree.first[node], tree.first[node] + tree.children[node]):
            if best < 0 or tree.priors[child] > tree.priors[best]:
                best = child
        return (tree.tokens[best], best) if best >= 0 else (-1, -1)
    count = successors(
        table,
        corpus,
        scope,
        tree.tokens[tree.parents[node]],
        tree.tokens[node],
        tree.next_tokens,
        tree.next_weights,
    )
    chosen = -1
    for index in range(count):
        if chosen < 0 or tree.next_weights[index] > tree.next_weights[chosen]:
            chosen = index
    return (tree.next_tokens[chosen], -1) if chosen >= 0 else (-1, -1)


@njit(cache=True)
def merge(
    tree: Tree,
    nodes: int,
    table: Trigrams,
    corpus: Corpus,
    scope: int,
    paths: int,
    tokens: NDArray[np.int32],
    parents: NDArray[np.int32],
) -> int:
    """Merge the most visited paths, each with its greedy successor, until the draft is full.

    Where not all of it fits, the least visited paths are left out; 24 paths have at most 48 nodes. (The
    authors drop the paths of most different tokens first, until the tokens of all paths, shared or not, are
    at most 64. For a smaller limit that leaves the shortest paths only.)

    Args:
        tokens, parents: int32 [limit], the draft; parents before children.

    Returns:
        the number of nodes.
    """
    tree.places[:nodes] = -1
    count = 0
    for node in most_visited(tree, nodes, paths):
        if tree.places[node] < 0:
            if count == len(tokens):
                break
            tokens[count] = tree.tokens[node]
            parents[count] = tree.places[tree.parents[node]]
            tree.places[node] = count
            count += 1
        token, child = _greedy(tree, table, corpus, scope, node)
        if token >= 0 and count < len(tokens):
            tokens[count] = token
            parents[count] = tree.places[node]
            if child >= 0:
                tree.places[child] = count
            count += 1
    return count


@njit(cache=True)
def walk(tree: Tree, table: Trigrams, corpus: Corpus, scope: int, tokens: NDArray[np.int32]) -> int:
    """Follow the most visited child from the root down, and then the greedy successor, into `tokens`.

    Returns:
        the number of tokens, at most len(tokens).
    """
    node, count = _ROOT, 0
    while count < len(tokens) and tree.children[node] > 0:
        best = -1
        for child in range(tree.first[node], tree.first[node] + tree.children[node]):
            if tree.visits[child] > 0 and (best < 0 or tree.visits[child] > tree.visits[best]):
                best = child
        if best < 0:
            break
        node = best
        tokens[count] = tree.tokens[node]
        count += 1
    if node != _ROOT and count < len(tokens):
        token, _ = _greedy(tree, table, corpus, scope, node)
        if token >= 0:
            tokens[count] = token
            count += 1
    return count
