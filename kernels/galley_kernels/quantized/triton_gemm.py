"""Triton kernels for a GPU: weights become numbers in registers, and every word is read once.

A code's bits are put where they are the lowest bits of a float that holds them exactly: 16 + u for 4 bits,
256 + u for 8 bits, u being the unsigned code. That is a shift and one three-way logical operation for a weight,
where a conversion from integers has a quarter of their speed. What that adds to each product, (16 + 8) or
(256 + 128) times the sum of the activations, is taken off again after each group, before its scale.

Two kernels: products of one or two rows are vector sums in float32, more rows go to the matrix units in tiles.
Where the tiles are too few to fill the GPU, the input dimension is split among them; a last kernel then adds
the parts, and the weights kept apart.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from galley_kernels.choice import interpreted

if TYPE_CHECKING:
    from galley_kernels.quantized.packed import PackedMatrix


@dataclass(frozen=True)
class Tiles:
    """How a product is cut.

    Attributes:
        rows: of activations in a tile; 1 is the kernel of vector sums.
        outputs: of a tile.
        inputs: of one turn of its loop.
        splits: of the input dimension; 0 is as many as fill the GPU.
    """

    rows: int
    outputs: int
    inputs: int
    splits: int = 0
    warps: int = 4
    stages: int = 3


def default_tiles(rows: int, outputs: int, inputs: int, bits: int) -> Tiles:
    if rows <= 2:
        return Tiles(1, 8, 1024, warps=4, stages=3)
    if rows <= 16:
        return Tiles(16, 32, 128, warps=4, stages=4)
    if rows <= 32:
        return Tiles(32, 64, 128, warps=4, stages=3)
    return Tiles(64, 128, 64, warps=4, stages=3)


def gemm(x: torch.Tensor, matrix: PackedMatrix, tiles: Tiles | None = None) -> torch.Tensor:
    """[rows, output] in the activations' type."""
    rows, (outputs, inputs) = len(x), matrix.shape
    out = x.new_empty(rows, outputs)
    if not out.numel():
        return out
    x = x.contiguous()
    tiles = tiles or default_tiles(rows, outputs, inputs, matrix.bits)
    turn = min(tiles.inputs, max(16, triton.next_power_of_2(inputs)))
    group = matrix.group_size
    if tiles.rows > 1 and group != inputs:
        turn = min(turn, max(16, group & -group))  # a turn of its loop stays within a group
    per_code = tiles.rows > 1 and bool(group % turn)
    blocks = triton.cdiv(outputs, tiles.outputs) * triton.cdiv(rows, tiles.rows)
    turns = triton.cdiv(inputs, turn)
    splits = tiles.splits or max(1, min(16, turns // 2, (3 * _processors(x.device)) // blocks))
    splits = min(splits, turns)
    each = triton.cdiv(turns, splits)
    splits = triton.cdiv(turns, each)
    outliers = matrix.outliers
    finishes = splits > 1 or (outliers is not None and outliers.most > 0)
    parts = x.new_empty(splits, rows, outputs, dtype=torch.float32) if finishes else out
    arguments: dict[str, Any] = {
        "BITS": matrix.bits,
        "BLOCK_N": tiles.outputs,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }
    groups = matrix.scales.shape[1]
    if tiles.rows == 1:
        grid = (triton.cdiv(outputs, tiles.outputs), rows, splits)
        words = turn * matrix.bits // 32
        _vector_kernel[grid](
            x, matrix.words, matrix.scales, parts, rows, outputs, inputs, matrix.words.shape[1], groups,
            group * matrix.bits // 32, each, BLOCK_W=words, **arguments,
        )  # fmt: skip
    else:
        grid = (triton.cdiv(outputs, tiles.outputs), triton.cdiv(rows, tiles.rows), splits)
        narrow = matrix.words.view(torch.int16 if matrix.bits == 4 else torch.uint8)
        exact = x.dtype == torch.float32 or interpreted()  # which has no products of bfloat16
        _tile_kernel[grid](
            x, narrow, matrix.scales, parts, rows, outputs, inputs, narrow.shape[1], groups, group, each,
            BLOCK_M=tiles.rows, BLOCK_K=turn, PER_CODE=per_code, HALF=exact or x.dtype == torch.float16,
            EXACT=exact, **arguments,
        )  # fmt: skip
    if finishes:
        block = 64
        some = outliers if outliers is not None and outliers.most else None
        _finish_kernel[(triton.cdiv(outputs, block), rows)](
            parts, out, x, *((some.starts, some.columns, some.values, some.most) if some else (x, x, x, 0)),
            rows, outputs, inputs, SPLITS=splits, BLOCK_N=block, OUTLIERS=some is not None, num_warps=2,
        )  # fmt: skip
    return out


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4  # the interpreter's: enough to split
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@triton.jit
def _vector_kernel(
    x_ptr, words_ptr, scales_ptr, out_ptr, rows, outputs, inputs, row_words, groups, group_words, turns,
    BITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    EACH: tl.constexpr = 32 // BITS
    ONE: tl.constexpr = 19 if BITS == 4 else 15  # the bit that is worth 1 beside BASE
    BASE: tl.constexpr = 0x41800000 if BITS == 4 else 0x43800000  # 16 or 256 in float32
    OFFSET: tl.constexpr = 24.0 if BITS == 4 else 384.0
    MASK: tl.constexpr = ((1 << BITS) - 1) << ONE
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row, split = tl.program_id(1), tl.program_id(2)
    inside = n < outputs
    x_ptr += row.to(tl.int64) * inputs
    lines = words_ptr + n.to(tl.int64)[:, None] * row_words
    sums = tl.zeros([BLOCK_N, BLOCK_W], tl.float32)
    for turn in range(turns):
        word = (split * turns + turn) * BLOCK_W + tl.arange(0, BLOCK_W)
        here = word < row_words
        mask = inside[:, None] & here[None, :]
        words = tl.load(lines + word[None, :], mask=mask, other=0)
        scales = tl.load(scales_ptr + n[:, None] * groups + (word // group_words)[None, :], mask=mask, other=0.0)
        product = tl.zeros([BLOCK_N, BLOCK_W], tl.float32)
        total = tl.zeros([BLOCK_W], tl.float32)
        for place in tl.static_range(EACH):
            if place * BITS >= ONE:
                bits = words >> (place * BITS - ONE)
            else:
                bits = words << (ONE - place * BITS)
            weights = ((bits & MASK) | BASE).to(tl.float32, bitcast=True)
            values = tl.load(x_ptr + word * EACH + place, mask=here, other=0.0).to(tl.float32)
            product += weights * values[None, :]
            total += values
        sums += (product - OFFSET * total[None, :]) * scales.to(tl.float32)
    place = (split * rows + row).to(tl.int64) * outputs + n
    tl.store(out_ptr + place, tl.sum(sums, 1).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _tile_kernel(
    x_ptr, codes_ptr, scales_ptr, out_ptr, rows, outputs, inputs, row_codes, groups, group, turns,
    BITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, PER_CODE: tl.constexpr, HALF: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    EACH: tl.constexpr = 4 if BITS == 4 else 1  # codes of a loaded number
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(2)
    outside, inside = m < rows, n < outputs
    x_lines = x_ptr + m.to(tl.int64)[:, None] * inputs
    lines = codes_ptr + n.to(tl.int64)[:, None] * row_codes
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for turn in range(turns):
        first = (split * turns + turn) * BLOCK_K
        k = first + tl.arange(0, BLOCK_K)
        x = tl.load(x_lines + k[None, :], mask=outside[:, None] & (k < inputs)[None, :], other=0.0)
        number = first // EACH + tl.arange(0, BLOCK_K // EACH)
        codes = tl.load(lines + number[None, :], mask=inside[:, None] & (number < row_codes)[None, :], other=0)
        if BITS == 4:
            weights = _expand(codes, BLOCK_N, BLOCK_K, HALF)
            OFFSET: tl.constexpr = 24.0
        else:
            weights = (codes ^ 0x80).to(tl.int8, bitcast=True).to(tl.float16 if HALF else tl.bfloat16)
            OFFSET: tl.constexpr = 0.0
        if PER_CODE:
            places = n[:, None] * groups + (k // group)[None, :]
            each = tl.load(scales_ptr + places, mask=inside[:, None] & (k < inputs)[None, :], other=0.0)
            scaled = (weights.to(tl.float32) - OFFSET) * each.to(tl.float32)
            if EXACT:
                sums += tl.dot(x.to(tl.float32), tl.trans(scaled), input_precision="ieee")
            else:
                sums += tl.dot(x, tl.trans(scaled.to(x.dtype)))
        else:
            scales = tl.load(scales_ptr + n * groups + first // group, mask=inside, other=0.0).to(tl.float32)
            if EXACT:
                product = tl.dot(x.to(tl.float32), tl.trans(weights.to(tl.float32)), input_precision="ieee")
            else:
                product = tl.dot(x, tl.trans(weights))
            if BITS == 4:
                product -= OFFSET * tl.sum(x.to(tl.float32), 1)[:, None]
            sums += product * scales[None, :]
    place = split.to(tl.int64) * rows * outputs + m.to(tl.int64)[:, None] * outputs + n[None, :]
    tl.store(out_ptr + place, sums.to(out_ptr.dtype.element_ty), mask=outside[:, None] & inside[None, :])


@triton.jit
def _expand(codes, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, HALF: tl.constexpr):
    """int16 [output, input / 4] to 16 + u in 16-bit floats [output, input]."""
    ONE: tl.constexpr = 6 if HALF else 3  # the bit that is worth 1 beside 16
    MASK: tl.constexpr = 15 << ONE
    BASE: tl.constexpr = 0x4C00 if HALF else 0x4180
    first = ((codes << ONE) & MASK) | BASE
    if HALF:
        second = ((codes << (ONE - 4)) & MASK) | BASE
    else:
        second = ((codes >> (4 - ONE)) & MASK) | BASE
    third = ((codes >> (8 - ONE)) & MASK) | BASE
    fourth = ((codes >> (12 - ONE)) & MASK) | BASE
    joined = tl.join(tl.join(first, third), tl.join(second, fourth)).reshape(BLOCK_N, BLOCK_K)
    return joined.to(tl.int16).to(tl.float16 if HALF else tl.bfloat16, bitcast=True)


@triton.jit
def _finish_kernel(
    parts_ptr, out_ptr, x_ptr, starts_ptr, columns_ptr, values_ptr, most, rows, outputs, inputs,
    SPLITS: tl.constexpr, BLOCK_N: tl.constexpr, OUTLIERS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.program_id(1).to(tl.int64)
    inside = n < outputs
    sums = tl.zeros([BLOCK_N], tl.float32)
    for split in tl.static_range(SPLITS):
        sums += tl.load(parts_ptr + (split * rows + row) * outputs + n, mask=inside, other=0.0)
    if OUTLIERS:
        start = tl.load(starts_ptr + n, mask=inside, other=0)
        count = tl.load(starts_ptr + n + 1, mask=inside, other=0) - start
        for index in range(most):
            some = index < count
            column = tl.load(columns_ptr + start + index, mask=some, other=0)
            value = tl.load(values_ptr + start + index, mask=some, other=0.0).to(tl.float32)
            sums += value * tl.load(x_ptr + row * inputs + column, mask=some, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * outputs + n, sums.to(out_ptr.dtype.element_ty), mask=inside)
