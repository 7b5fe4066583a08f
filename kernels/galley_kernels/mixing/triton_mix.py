"""Triton kernels of the mix: each row is cut into blocks, so that a few rows fill a GPU.

The first kernel leaves the largest logit and the sum of exponentials of each block, the second joins those of
a row and writes its block. No softmax is stored; the second reading comes from the GPU's cache for all but
large batches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 4096


def mix(logits: torch.Tensor, other: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """float32 [rows, vocabulary]."""
    rows, vocabulary = logits.shape
    logits, other = _dense(logits), _dense(other)
    out = torch.empty(rows, vocabulary, dtype=torch.float32, device=logits.device)
    if not out.numel():
        return out
    blocks = triton.cdiv(vocabulary, BLOCK)
    partial = torch.empty(rows, 4, blocks, dtype=torch.float32, device=logits.device)
    grid = (blocks, rows)
    strides = (logits.stride(0), other.stride(0))
    _sums_kernel[grid](logits, other, partial, *strides, vocabulary, blocks, BLOCK=BLOCK, num_warps=8)
    _mix_kernel[grid](
        logits, other, weight.contiguous(), partial, out, *strides, vocabulary, blocks,
        BLOCK=BLOCK, BLOCKS=triton.next_power_of_2(blocks), num_warps=8,
    )  # fmt: skip
    return out


def _dense(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.stride(1) == 1 else logits.contiguous()


@triton.jit
def _block_sum(values):
    """Largest value and the sum of exponentials over it; 0 where all are minus infinity."""
    most = tl.max(values, 0)
    base = tl.where(most == float("-inf"), 0.0, most)
    return most, tl.sum(tl.exp(values - base), 0)


@triton.jit
def _sums_kernel(
    logits_ptr, other_ptr, partial_ptr, logits_stride, other_stride, vocabulary, blocks, BLOCK: tl.constexpr
):
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    column = block * BLOCK + tl.arange(0, BLOCK)
    inside = column < vocabulary
    first = tl.load(logits_ptr + row * logits_stride + column, mask=inside, other=float("-inf")).to(
        tl.float32
    )
    second = tl.load(other_ptr + row * other_stride + column, mask=inside, other=float("-inf")).to(tl.float32)
    first_most, first_sum = _block_sum(first)
    second_most, second_sum = _block_sum(second)
    place = partial_ptr + row * 4 * blocks + block
    tl.store(place, first_most)
    tl.store(place + blocks, first_sum)
    tl.store(place + 2 * blocks, second_most)
    tl.store(place + 3 * blocks, second_sum)


@triton.jit
def _log_sum(place, blocks, index, inside):
    most = tl.load(place + index, mask=inside, other=float("-inf"))
    sums = tl.load(place + blocks + index, mask=inside, other=0.0)
    over = tl.max(most, 0)
    base = tl.where(over == float("-inf"), 0.0, over)
    return over + tl.log(tl.sum(sums * tl.exp(most - base), 0))


@triton.jit
def _mix_kernel(
    logits_ptr, other_ptr, weight_ptr, partial_ptr, out_ptr, logits_stride, other_stride, vocabulary, blocks,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    index = tl.arange(0, BLOCKS)
    place = partial_ptr + row * 4 * blocks
    first_sum = _log_sum(place, blocks, index, index < blocks)
    second_sum = _log_sum(place + 2 * blocks, blocks, index, index < blocks)
    weight = tl.load(weight_ptr + row).to(tl.float32)
    column = block * BLOCK + tl.arange(0, BLOCK)
    inside = column < vocabulary
    first = tl.load(logits_ptr + row * logits_stride + column, mask=inside, other=float("-inf")).to(
        tl.float32
    )
    second = tl.load(other_ptr + row * other_stride + column, mask=inside, other=float("-inf")).to(tl.float32)
    first = (first - first_sum) + tl.log(1.0 - weight)
    second = (second - second_sum) + tl.log(weight)
    most = tl.maximum(first, second)
    least = tl.minimum(first, second)
    mixed = most + tl.log(1.0 + tl.exp(tl.where(most == float("-inf"), 0.0, least - most)))
    mixed = tl.where(most == float("-inf"), float("-inf"), mixed)
    tl.store(out_ptr + row * vocabulary + column, mixed, mask=inside)
