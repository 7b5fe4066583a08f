"""How several branches of one request are verified in one forward pass, with ordinary causal attention.

A tree in depth-first order falls into runs: chains that each continue from some node of an earlier run. The
first run is the request's own row. Every other run becomes a row of its own, whose block table shares the
request's full blocks and ends in private blocks, which hold a copy of the last partial block and of the run's
ancestors. Each node passes through the model once; only attention sees rows. If a run other than the first
wins, its private blocks are copied back over the request's own, block by block, whatever lies inside them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np


@dataclass(slots=True)
class Run:
    """One chain of a tree that does not continue the request's own row.

    Attributes:
        request: row of the request in the batch.
        start, stop: its nodes, by depth-first order.
        first_block: index in the request's block table that `blocks[0]` stands in for.
        blocks: private blocks, in the order of positions.
    """

    request: int
    start: int
    stop: int
    first_block: int
    blocks: list[int]


@dataclass(slots=True)
class BranchPlan:
    """What a step with trees adds to the runner's own inputs; rows and tokens as the runner numbers them.

    Attributes:
        positions: (token index, position) of every node of a tree.
        slots: (token index, slot) of nodes outside their request's own row.
        extra_tokens, extra_slots: keys and values that are stored a second time: ancestors of a run.
        copies: (source block, private block) to copy before the forward pass.
        rows: (request, start, stop) token ranges of attention rows, in the order of tokens.
        lengths: sequence length of each row.
        tables: (row, index in the block table, block) where a row's table differs from its request's.
        orphans: nodes (token index) for which there was no private block; they can not be accepted.
    """

    positions: list[tuple[int, int]] = field(default_factory=list)
    slots: list[tuple[int, int]] = field(default_factory=list)
    extra_tokens: list[int] = field(default_factory=list)
    extra_slots: list[int] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    rows: list[tuple[int, int, int]] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    tables: list[tuple[int, int, int]] = field(default_factory=list)
    orphans: list[int] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)


def depths_of(parents: Sequence[int]) -> list[int]:
    """Depth of every node, 0 for a child of the last token."""
    depths: list[int] = []
    for parent in parents:
        depths.append(depths[parent] + 1 if parent >= 0 else 0)
    return depths


def first_run(parents: Sequence[int]) -> int:
    """How many nodes the chain has that a depth-first tree begins with."""
    stop = 0
    while stop < len(parents) and parents[stop] == stop - 1:
        stop += 1
    return stop


def private_blocks(parents: Sequence[int], computed: int, block_size: int) -> int:
    """How many private blocks a tree needs that starts after `computed` tokens."""
    depths = depths_of(parents)
    needed = 0
    for node in range(first_run(parents), len(parents)):
        if node + 1 == len(parents) or parents[node + 1] != node:  # the last of its run
            needed += (computed + 1 + depths[node]) // block_size - computed // block_size + 1
    return needed


def add_request(
    plan: BranchPlan,
    request: int,
    start: int,
    stop: int,
    parents: Sequence[int] | None,
    computed: int,
    own_blocks: np.ndarray,
    free: list[int],
    block_size: int,
) -> None:
    """Add one request of the batch, in the batch's order.

    Args:
        start, stop: its tokens; for a tree, its last token and then the nodes.
        parents: [stop - start - 1] in depth-first order; None if its tokens are a plain sequence.
        computed: tokens of it that are in the cache.
        own_blocks: its block table.
        free: private blocks, taken from its end.
    """
    if parents is None:
        plan.rows.append((request, start, stop))
        plan.lengths.append(computed + stop - start)
        return
    depths = depths_of(parents)
    count = len(parents)
    first_stop = first_run(parents)
    plan.rows.append((request, start, start + 1 + first_stop))
    plan.lengths.append(computed + 1 + first_stop)
    first_block = computed // block_size
    node = first_stop
    while node < count:
        end = node + 1
        while end < count and parents[end] == end - 1:
            end += 1
        last_position = computed + 1 + depths[end - 1]
        needed = last_position // block_size - first_block + 1
        row = len(plan.rows)
        plan.rows.append((request, start + 1 + node, start + 1 + end))
        plan.lengths.append(last_position + 1)
        if needed > len(free):
            # Cannot happen with drafts that were planned together; the nodes then only must not do harm.
            plan.orphans += range(start + 1 + node, start + 1 + end)
            plan.slots += [(start + 1 + index, -1) for index in range(node, end)]
        else:
            blocks = [free.pop() for _ in range(needed)]
            if computed % block_size:
                plan.copies.append((int(own_blocks[first_block]), blocks[0]))
            plan.tables += [(row, first_block + index, block) for index, block in enumerate(blocks)]
            plan.runs.append(Run(request, node, end, first_block, blocks))

            def slot(position: int, blocks: list[int] = blocks) -> int:
                return blocks[position // block_size - first_block] * block_size + position % block_size

            for index in range(node, end):
                plan.slots.append((start + 1 + index, slot(computed + 1 + depths[index])))
            ancestor = parents[node]
            while True:
                plan.extra_tokens.append(start + 1 + ancestor)
                plan.extra_slots.append(slot(computed + 1 + depths[ancestor] if ancestor >= 0 else computed))
                if ancestor < 0:
                    break
                ancestor = parents[ancestor]
        plan.positions += [(start + 1 + index, computed + 1 + depths[index]) for index in range(node, end)]
        node = end


def copies_back(
    plan: BranchPlan,
    request: int,
    node: int,
    accepted: int,
    computed: int,
    own_blocks: np.ndarray,
    block_size: int,
) -> list[tuple[int, int]]:
    """(private block, own block) to copy once `node`, depth first, is the last of `accepted` ones."""
    for run in plan.runs:
        if run.request == request and run.start <= node < run.stop:
            last = (computed + accepted) // block_size
            return [
                (run.blocks[index - run.first_block], int(own_blocks[index]))
                for index in range(run.first_block, last + 1)
            ]
    return []
