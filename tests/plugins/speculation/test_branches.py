from __future__ import annotations

import numpy as np
import pytest

from galley_plugins.speculation.branches import (
    BranchPlan,
    add_request,
    copies_back,
    depths_of,
    private_blocks,
)

BLOCK = 4
PARENTS = [-1, 0, 1, 0, -1, 4]  # depth first: 0 1 2 | 3 under 0 | 4 5 under the last token


def plan_of(computed: int, parents: list[int] = PARENTS, free: int = 20) -> BranchPlan:
    plan = BranchPlan()
    blocks = np.arange(50, 70)
    add_request(plan, 0, 0, len(parents) + 1, parents, computed, blocks, list(range(100, 100 + free)), BLOCK)
    return plan


def test_runs_become_rows_that_share_nothing_computed_twice() -> None:
    plan = plan_of(computed=9)
    assert plan.rows == [(0, 0, 4), (0, 4, 5), (0, 5, 7)]
    assert plan.lengths == [9 + 4, 9 + 3, 9 + 3]  # last token at 9; nodes 2, 3 and 5 at 12, 11 and 11
    assert sum(stop - start for _, start, stop in plan.rows) == 7  # every token in one row


@pytest.mark.parametrize("computed", range(5, 14))
def test_every_row_sees_its_prefix_and_its_ancestors_and_nothing_else(computed: int) -> None:
    """Simulate the cache: what lies in the slots that a row attends to is exactly its path."""
    plan = plan_of(computed)
    cache = {}
    blocks = np.arange(50, 70)

    def slot(table: np.ndarray, position: int) -> int:
        return int(table[position // BLOCK]) * BLOCK + position % BLOCK

    for position in range(computed):
        cache[slot(blocks, position)] = ("text", position)
    for source, target in plan.copies:
        for offset in range(BLOCK):
            if source * BLOCK + offset in cache:
                cache[target * BLOCK + offset] = cache[source * BLOCK + offset]
    slots = {index: slot(blocks, computed + index) for index in range(len(PARENTS) + 1)}
    slots.update(dict(plan.slots))
    for index in range(len(PARENTS) + 1):
        cache[slots[index]] = ("node", index - 1)
    for index, extra in zip(plan.extra_tokens, plan.extra_slots, strict=True):
        cache[extra] = ("node", index - 1)
    positions = {index: computed + index for index in range(len(PARENTS) + 1)} | dict(plan.positions)
    depths = depths_of(PARENTS)
    for number, ((_, start, stop), length) in enumerate(zip(plan.rows, plan.lengths, strict=True)):
        table = blocks.copy()
        for row, index, block in plan.tables:
            if row == number:
                table[index] = block
        for place, index in enumerate(range(start, stop)):
            position = length - (stop - start) + place  # causal attention: the last queries of the row
            assert positions[index] == position
            path, node = [], index - 1
            while node >= 0:
                path.append(("node", node))
                node = PARENTS[node]
            expected = [("text", at) for at in range(computed)] + [("node", -1)] + path[::-1]
            assert [cache[slot(table, at)] for at in range(position + 1)] == expected
            if index > 0:
                assert position == computed + 1 + depths[index - 1]


def test_the_winning_branch_is_copied_back_and_another_is_not() -> None:
    plan = plan_of(computed=9)
    blocks = np.arange(50, 70)
    assert copies_back(plan, 0, 2, 3, 9, blocks, BLOCK) == []  # the request's own row
    run = plan.runs[1]
    assert copies_back(plan, 0, 5, 2, 9, blocks, BLOCK) == [(run.blocks[0], 52)]
    assert copies_back(plan, 1, 5, 2, 9, blocks, BLOCK) == []


def test_a_branch_that_crosses_a_block_brings_both_back() -> None:
    plan = plan_of(computed=10)  # node 5 lies at 12, in the next block
    run = plan.runs[1]
    blocks = np.arange(50, 70)
    assert copies_back(plan, 0, 5, 2, 10, blocks, BLOCK) == [(run.blocks[0], 52), (run.blocks[1], 53)]
    assert copies_back(plan, 0, 4, 1, 10, blocks, BLOCK) == [(run.blocks[0], 52)]


@pytest.mark.parametrize("computed", range(4, 13))
def test_the_need_for_private_blocks_is_known_beforehand(computed: int) -> None:
    plan = plan_of(computed)
    assert private_blocks(PARENTS, computed, BLOCK) == sum(len(run.blocks) for run in plan.runs)
    assert private_blocks([-1, 0, 1], computed, BLOCK) == 0


def test_no_block_is_copied_where_a_branch_starts_a_block() -> None:
    assert plan_of(computed=8).copies == []


def test_without_private_blocks_nodes_become_orphans() -> None:
    plan = plan_of(computed=9, free=1)
    assert plan.orphans == [5, 6]  # tokens of nodes 4 and 5
    assert dict(plan.slots)[5] == dict(plan.slots)[6] == -1
    assert len(plan.rows) == len(plan.lengths) == 3


def test_requests_without_a_tree_stay_one_row() -> None:
    plan = BranchPlan()
    blocks = np.arange(50, 70)
    add_request(plan, 0, 0, 5, None, 20, blocks, [], BLOCK)
    add_request(plan, 1, 5, 6, None, 3, blocks, [], BLOCK)
    assert (plan.rows, plan.lengths) == ([(0, 0, 5), (1, 5, 6)], [25, 4])
    assert not plan.copies
    assert not plan.extra_slots
