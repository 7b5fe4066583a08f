"""Slots of a step's tokens, against the kernel of vLLM's that they stand for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.utils import cpu_triton_utils
from vllm.v1.worker.block_table import BlockTable, SlotMappingMode

from galley_plugins.runners.block_tables import keep_on_host, with_host_tables

ROWS, MOST_BLOCKS, MOST_TOKENS = 6, 24, 96


def table_of(size: int, mode: SlotMappingMode = SlotMappingMode.TOKEN_TO_KV_SLOT) -> BlockTable:
    """On a CPU, as its runner leaves it: the device's buffers are the host's."""
    table = BlockTable(
        size, ROWS, MOST_BLOCKS, MOST_TOKENS, False, torch.device("cpu"), 1, slot_mapping_mode=mode
    )
    for buffer in (table.block_table, table.slot_mapping):
        buffer.gpu = buffer.cpu
    return table


def on_host(table: BlockTable) -> bool:
    return "compute_slot_mapping" in vars(table)


@pytest.mark.parametrize("size", [16, 32, 128])
@pytest.mark.parametrize("seed", range(4))
def test_slots_are_those_of_vllm(size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = int(rng.integers(1, ROWS + 1))
    counts = rng.integers(0, 12, rows)  # a request may have no token in a step
    firsts = rng.integers(0, size * (MOST_BLOCKS - 1), rows)
    starts = torch.from_numpy(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32))
    positions = [first + np.arange(count) for first, count in zip(firsts, counts, strict=True)]
    at = torch.from_numpy(np.concatenate(positions).astype(np.int64))
    table = table_of(size)
    table.block_table.np[:] = rng.permutation(ROWS * MOST_BLOCKS).reshape(ROWS, -1)
    table.slot_mapping.np[:] = 7  # of an earlier step
    keep_on_host(table)
    table.commit_block_table(rows)
    table.compute_slot_mapping(rows, starts, at)
    slots = torch.full((MOST_TOKENS,), -1, dtype=torch.int64)
    cpu_triton_utils._compute_slot_mapping_kernel_impl(
        len(at), MOST_TOKENS, starts, at, table.block_table.cpu, MOST_BLOCKS, slots, size
    )
    assert table.slot_mapping.np.tolist() == slots.tolist()


def test_a_table_that_vllm_must_copy_or_leave_is_left() -> None:
    apart = table_of(16)
    apart.block_table.gpu = apart.block_table.cpu.clone()
    shared = table_of(16)
    shared.dcp_world_size = 2
    for table in (apart, shared, table_of(16, SlotMappingMode.NONE)):
        keep_on_host(table)
        assert not on_host(table)


class Runner:
    def __init__(self, table: BlockTable) -> None:
        self.input_batch = SimpleNamespace(block_table=SimpleNamespace(block_tables=[table]))

    def _prepare_inputs(self, scheduled: Any) -> tuple[Any, bool]:
        return scheduled, on_host(self.input_batch.block_table.block_tables[0])


def test_tables_are_taken_before_a_step_and_so_are_new_ones() -> None:
    hosted = with_host_tables(Runner)
    assert hosted.__name__ == "Runner"
    runner = hosted(table_of(16))
    assert runner._prepare_inputs("a step") == ("a step", True)
    runner.input_batch = Runner(table_of(32)).input_batch
    assert runner._prepare_inputs("another") == ("another", True)
