"""The tree search against hand-computed visits and a plain reimplementation."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from galley_plugins.speculation import search
from galley_plugins.speculation.corpus import Corpus, empty_corpus
from galley_plugins.speculation.search import Tree, new_tree
from galley_plugins.speculation.tables import context_key
from galley_plugins.speculation.trigram_table import Trigrams, add, new_trigrams

C1, C2 = 32.0, 8.0
Weights = dict[tuple[int, int], dict[int, float]]


def table_of(weights: Weights) -> tuple[Trigrams, Corpus]:
    table, corpus = new_trigrams(1 << 16), empty_corpus()
    for (a, b), row in weights.items():
        for c, weight in row.items():
            add(table, corpus, 0, a, b, c, weight, 3.0)
    return table, corpus


def searched(
    weights: Weights, a: int, b: int, iterations: int, depth: int = 4
) -> tuple[Tree, int, Trigrams, Corpus]:
    table, corpus = table_of(weights)
    tree = new_tree(iterations)
    nodes = search.search(tree, table, corpus, 0, a, b, iterations, depth, C1, C2)
    return tree, nodes, table, corpus


def paths_of(tree: Tree, nodes: int) -> dict[tuple[int, ...], tuple[int, float]]:
    """Visits and value of every node, by the tokens that lead to it."""
    paths: dict[tuple[int, ...], tuple[int, float]] = {}
    names: list[tuple[int, ...]] = [()]
    for node in range(nodes):
        if node:
            names.append((*names[tree.parents[node]], int(tree.tokens[node])))
        paths[names[node]] = (int(tree.visits[node]), float(tree.values[node]))
    return paths


def draft_of(
    weights: Weights, a: int, b: int, limit: int, iterations: int = 150, depth: int = 4, paths: int = 24
) -> tuple[list[int], list[int]]:
    tree, nodes, table, corpus = searched(weights, a, b, iterations, depth)
    tokens, parents = np.empty(limit, np.int32), np.empty(limit, np.int32)
    count = search.merge(tree, nodes, table, corpus, 0, paths, tokens, parents)
    return tokens[:count].tolist(), parents[:count].tolist()


def test_visits_follow_puct_worked_by_hand() -> None:
    # N(root) - 1 = n visits before each iteration; weight = (32 + ln((n + 9) / 8)) sqrt(n)
    #   1: both are made, 4 is the last     2: 3 is unvisited
    #   3: n = 2  3: .75 + 45.7 * .75 / 2 = 17.9    4: .25 + 45.7 * .25 / 2 =  6.0  -> 3
    #   4: n = 3  3: .75 + 56.1 * .75 / 3 = 14.8    4: .25 + 56.1 * .25 / 2 =  7.3  -> 3
    #   5: n = 4  3: .75 + 65.0 * .75 / 4 = 12.9    4: .25 + 65.0 * .25 / 2 =  8.4  -> 3
    #   6: n = 5  3: .75 + 72.8 * .75 / 5 = 11.7    4: .25 + 72.8 * .25 / 2 =  9.3  -> 3
    #   7: n = 6  3: .75 + 79.9 * .75 / 6 = 10.7    4: .25 + 79.9 * .25 / 2 = 10.2  -> 3
    #   8: n = 7  3: .75 + 86.5 * .75 / 7 = 10.0    4: .25 + 86.5 * .25 / 2 = 11.1  -> 4
    weights = {(1, 2): {3: 0.75, 4: 0.25}}
    order = []
    before = {(3,): 0, (4,): 0}
    for iterations in range(1, 9):
        tree, nodes, _, _ = searched(weights, 1, 2, iterations)
        now = {path: visits for path, (visits, _) in paths_of(tree, nodes).items() if path}
        order += [path[0] for path in now if now[path] > before[path]]
        before = now
    assert order == [4, 3, 3, 3, 3, 3, 3, 4]


def test_a_way_scores_the_sum_of_its_weights_whether_selected_or_rolled_out() -> None:
    weights = {(1, 2): {3: 0.5}, (2, 3): {4: 0.5}, (3, 4): {5: 0.25}, (4, 5): {6: 1.0}}
    for iterations, depths in ((1, 1), (2, 2), (3, 3), (4, 3)):
        tree, nodes, _, _ = searched(weights, 1, 2, iterations)
        paths = paths_of(tree, nodes)
        assert len(paths) == 1 + depths  # one more level at a time, and not beyond four states
        assert paths[()] == (iterations, 1.25 * iterations)


@dataclass
class Node:
    """A node of the reference."""

    state: tuple[int, int]
    prior: float = 0.0
    parent: Node | None = None
    children: list[Node] | None = None
    visits: int = 0
    value: float = 0.0

    def path(self) -> tuple[int, ...]:
        return () if self.parent is None else (*self.parent.path(), self.state[1])


@dataclass
class Reference:
    """The search of ADED with one object per node and the weights in dictionaries."""

    weights: Weights
    state: int
    nodes: list[Node] = field(default_factory=list)

    def uniform(self) -> float:
        mask = 2**64 - 1
        self.state = (self.state + 0x9E3779B97F4A7C15) & mask
        z = self.state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return ((z ^ (z >> 31)) >> 11) / 2**53

    def run(self, a: int, b: int, iterations: int, depth: int) -> list[Node]:
        root = Node((a, b))
        self.nodes = [root]
        for _ in range(iterations):
            way = [root]
            while len(way) < depth and way[-1].children:
                way.append(max(way[-1].children, key=self.puct))
            leaf = way[-1]
            if len(way) < depth and leaf.children is None:
                row = self.weights.get(leaf.state, {})
                leaf.children = [Node((leaf.state[1], c), p, leaf) for c, p in row.items()]
                self.nodes += leaf.children
                way += leaf.children[-1:]
            score = sum(node.prior for node in way[1:])
            state, states = way[-1].state, len(way)
            while states < depth and (row := self.weights.get(state)):
                left = self.uniform() * sum(row.values())
                for c, p in row.items():
                    chosen = c
                    left -= p
                    if left < 0:
                        break
                score += row[chosen]
                state, states = (state[1], chosen), states + 1
            for node in way:
                node.visits += 1
                node.value += score
        return self.nodes

    @staticmethod
    def puct(node: Node) -> float:
        assert node.parent is not None
        if node.visits == 0:
            return math.inf
        parent = node.parent.visits
        explore = (C1 + math.log((parent + C2 + 1) / C2)) * node.prior * math.sqrt(parent)
        return node.value / node.visits + explore / (1 + node.visits)


@given(st.integers(0, 2**32), st.integers(1, 200), st.integers(2, 6))
@settings(deadline=None, max_examples=60)
def test_every_visit_agrees_with_a_plain_reimplementation(seed: int, iterations: int, depth: int) -> None:
    random = np.random.default_rng(seed)
    weights: Weights = {}
    for _ in range(40):
        a, b = (int(token) for token in random.integers(0, 6, 2))
        row = random.random(int(random.integers(1, 5))).astype(np.float32)
        weights[a, b] = {int(random.integers(100)) % 6: float(p) for p in row}
    a, b = next(iter(weights))
    reference = Reference(weights, context_key(2, 0, 0, a, b) & (2**64 - 1))
    expected = {
        node.path(): (node.visits, pytest.approx(node.value))
        for node in reference.run(a, b, iterations, depth)
    }
    tree, nodes, _, _ = searched(weights, a, b, iterations, depth)
    assert paths_of(tree, nodes) == expected


def test_the_same_table_and_context_give_the_same_draft() -> None:
    weights = {(a, b): {a: 0.3, b: 0.4, (a + b) % 7: 0.2} for a in range(7) for b in range(7)}
    assert draft_of(weights, 1, 2, 30) == draft_of(weights, 1, 2, 30)


def test_no_successor_no_draft() -> None:
    assert draft_of({(1, 2): {3: 1.0}}, 2, 1, 8) == ([], [])


# (1, 2) leads mostly to 3, rarely to 4; both go on.
FORK = {
    (1, 2): {3: 0.9, 4: 0.1},
    (2, 3): {5: 0.9, 6: 0.1},
    (2, 4): {7: 1.0},
    (3, 5): {8: 1.0},
    (5, 8): {9: 1.0},
}


def test_paths_are_merged_with_their_greedy_successors_parents_first() -> None:
    tokens, parents = draft_of(FORK, 1, 2, 64)
    paths = []
    for token, parent in zip(tokens, parents, strict=True):
        paths.append((*(paths[parent] if parent >= 0 else ()), token))
    # three levels of search, and 9 as the greedy successor of the deepest path
    assert sorted(paths) == [(3,), (3, 5), (3, 5, 8), (3, 5, 8, 9), (3, 6), (4,), (4, 7)]
    assert all(parent < node for node, parent in enumerate(parents))


def test_a_cut_draft_keeps_the_most_visited_paths() -> None:
    whole = draft_of(FORK, 1, 2, 64)
    assert whole[0][:4] == [3, 5, 8, 9]
    for limit in range(8):
        tokens, parents = draft_of(FORK, 1, 2, limit)
        assert (tokens, parents) == (whole[0][:limit], whole[1][:limit])


def test_only_so_many_paths_are_taken() -> None:
    assert draft_of(FORK, 1, 2, 64, paths=1) == ([3, 5], [-1, 0])
    wide = {(1, 2): dict.fromkeys(range(10, 30), 0.05)} | {(2, c): {c + 100: 1.0} for c in range(10, 30)}
    tokens, _ = draft_of(wide, 1, 2, 64, paths=4)
    assert len(tokens) == 8


def test_a_chain_follows_the_most_visited_child_and_ends_with_the_greedy_successor() -> None:
    tree, _, table, corpus = searched(FORK, 1, 2, 150)
    for limit in range(6):
        tokens = np.empty(limit, np.int32)
        count = search.walk(tree, table, corpus, 0, tokens)
        assert tokens[:count].tolist() == [3, 5, 8, 9][:limit]


def test_random_numbers_are_splitmix64() -> None:
    # The first outputs for the seed 1234567, as its authors publish them.
    state = np.array([1234567], np.uint64)
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [search.uniform(state) for _ in published] == [(value >> 11) / 2**53 for value in published]
