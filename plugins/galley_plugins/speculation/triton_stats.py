"""`DeviceStats.verified` in one launch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from galley_plugins.speculation.stats import (
    LENGTH_START,
    LENGTH_SUM,
    LENGTHS,
    PLACES,
    POSITION_START,
    POSITIONS,
)

if TYPE_CHECKING:
    import torch

BLOCK = 128


@triton.jit(do_not_specialize=["requests"])
def verified_kernel(
    values_ptr, bounds_ptr, nodes_ptr, accepted_ptr, counted_ptr, requests,
    STEPS: tl.constexpr, REQUEST_STEPS: tl.constexpr, DRAFTED: tl.constexpr, ACCEPTED: tl.constexpr,
    POSITION_START: tl.constexpr, POSITIONS: tl.constexpr, LENGTH_START: tl.constexpr, LENGTHS: tl.constexpr,
    LENGTH_SUM: tl.constexpr, BUCKETS: tl.constexpr, PLACES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    bucket, position = tl.arange(0, BUCKETS), tl.arange(0, PLACES)
    bounds = tl.load(bounds_ptr + bucket, mask=bucket < LENGTHS, other=2147483647)
    lengths, reached = tl.zeros([BUCKETS], tl.int64), tl.zeros([PLACES], tl.int64)
    steps = tl.full([], 0, tl.int64)
    drafted, right = steps, steps
    for begin in range(0, requests, BLOCK):
        request = begin + tl.arange(0, BLOCK)
        inside = request < requests
        counted = tl.load(counted_ptr + request, mask=inside, other=0).to(tl.int64)
        nodes = tl.load(nodes_ptr + request, mask=inside, other=0) * counted
        accepted = tl.load(accepted_ptr + request, mask=inside, other=0) * counted
        place = tl.sum((bounds[None, :] < nodes[:, None]).to(tl.int64), 1)
        lengths += tl.sum((place[:, None] == bucket[None, :]).to(tl.int64) * counted[:, None], 0)
        each = (accepted[:, None] > position[None, :]).to(tl.int64)
        beyond = tl.maximum(accepted - (POSITIONS - 1), 0)[:, None]  # the last place holds all from there on
        reached += tl.sum(tl.where(position[None, :] == POSITIONS - 1, beyond, each), 0)
        steps += tl.sum(counted, 0)
        drafted += tl.sum(nodes, 0)
        right += tl.sum(accepted, 0)
    _add(values_ptr + STEPS, tl.minimum(steps, 1))
    _add(values_ptr + REQUEST_STEPS, steps)
    _add(values_ptr + DRAFTED, drafted)
    _add(values_ptr + LENGTH_SUM, drafted)
    _add(values_ptr + ACCEPTED, right)
    there = values_ptr + LENGTH_START + bucket
    tl.store(there, tl.load(there, mask=bucket <= LENGTHS) + lengths.to(tl.float64), mask=bucket <= LENGTHS)
    there = values_ptr + POSITION_START + position
    tl.store(
        there, tl.load(there, mask=position < POSITIONS) + reached.to(tl.float64), mask=position < POSITIONS
    )


@triton.jit
def _add(place, amount):
    tl.store(place, tl.load(place) + amount.to(tl.float64))


def add_verified(
    values: torch.Tensor,
    bounds: torch.Tensor,
    nodes: torch.Tensor,
    accepted: torch.Tensor,
    counted: torch.Tensor,
) -> None:
    """Add a step to float64 `values`; `bounds` of lengths' bins, the rest as in `DeviceStats.verified`."""
    verified_kernel[1,](
        values, bounds, nodes, accepted, counted, nodes.shape[0],
        STEPS=PLACES["steps"], REQUEST_STEPS=PLACES["request_steps"], DRAFTED=PLACES["draft_tokens"],
        ACCEPTED=PLACES["accepted_tokens"], POSITION_START=POSITION_START, POSITIONS=POSITIONS,
        LENGTH_START=LENGTH_START, LENGTHS=len(LENGTHS), LENGTH_SUM=LENGTH_SUM,
        BUCKETS=triton.next_power_of_2(len(LENGTHS) + 1), PLACES=triton.next_power_of_2(POSITIONS),
        BLOCK=BLOCK,
    )  # fmt: skip
