"""Block tables of runner V1 on a CPU, where the device's copy of a table is the table itself.

vLLM copies each table to the device and finds the slots of a step's tokens there, through what launches its
kernels, which short steps feel. Here nothing is copied, and slots are found in compiled code.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from numba import njit

from galley_plugins import vllm_compat

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

_PADDING = -1  # of slots that no token has, as in vLLM


class HostBlockTables:
    """Mixed in before vLLM's V1 CPU runner."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        vllm_compat.check("block-tables")
        super().__init__(*args, **kwargs)
        self._tables_seen: Any = None

    def _prepare_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        tables = self.input_batch.block_table
        if tables is not self._tables_seen:  # vLLM makes new ones when it knows its cache
            self._tables_seen = tables
            for table in tables.block_tables:
                keep_on_host(table)
        return super()._prepare_inputs(*args, **kwargs)  # type: ignore[misc]


def with_host_tables(base: type[Any]) -> type[Any]:
    """`base`, a V1 CPU runner, with the mixin and its own name."""
    return type(base.__name__, (HostBlockTables, base), {})


def keep_on_host(table: Any) -> None:
    """Have vLLM's `BlockTable` compute slots here, if it lies on the host alone and in one piece."""
    from vllm.v1.worker.block_table import SlotMappingMode

    ours = (
        table.slot_mapping_mode == SlotMappingMode.TOKEN_TO_KV_SLOT
        and table.dcp_world_size == 1
        and table.block_table.gpu.data_ptr() == table.block_table.cpu.data_ptr()
        and table.slot_mapping.gpu.data_ptr() == table.slot_mapping.cpu.data_ptr()
    )
    if ours:
        table.commit_block_table = _commit
        table.compute_slot_mapping = functools.partial(_compute, table)


def _commit(num_reqs: int) -> None:
    pass


def _compute(table: Any, num_reqs: int, query_start_loc: torch.Tensor, positions: torch.Tensor) -> None:
    fill_slots(
        query_start_loc.numpy()[: num_reqs + 1], positions.numpy(), table.block_table.np, table.block_size,
        table.slot_mapping.np,
    )  # fmt: skip


@njit(cache=True)
def fill_slots(
    starts: NDArray[np.int32],
    positions: NDArray[np.int64],
    blocks: NDArray[np.int32],
    size: int,
    slots: NDArray[np.int64],
) -> None:
    """Where the tokens of a step are stored.

    Args:
        starts: int32 [requests + 1], first token of each request, and the end.
        positions: int64 [tokens], in each token's request.
        blocks: int32 [>= requests, most], the blocks of each request.
        size: tokens of a block.
        slots: output int64 [>= tokens]; -1 beyond the tokens.
    """
    for request in range(len(starts) - 1):
        for token in range(starts[request], starts[request + 1]):
            block = positions[token] // size
            slots[token] = blocks[request, block] * size + positions[token] - block * size
    slots[starts[-1] :] = _PADDING
