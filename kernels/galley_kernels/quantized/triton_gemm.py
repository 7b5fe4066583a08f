"""Triton kernels for a GPU: weights become numbers in registers, and every word is read once.

A 4-bit code's bits are put where they are the lowest bits of a float that holds them exactly: 16 + u, u being
the unsigned code (256 + u for 8 bits, in float32). That is a shift and one three-way logical operation for a
weight, where a conversion from integers has a quarter of their speed. What that adds to each product, 16 + 8
times the sum of the activations, is taken off again after each group, before its scale.

- One row: vector sums in float32.
- More rows: tiles on the matrix units.
- Many rows: arithmetic takes the time. Weights are written out once and cuBLAS multiplies.

Where tiles are too few to fill the GPU, the input dimension is split among them; a last kernel adds the
parts, and the weights kept apart.
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
    from galley_kernels.quantized.packed import PackedMatrix, SparseRows

DENSE_ROWS = {4: 128, 8: 192}
"""By bits: from so many rows on, weights are written out and multiplied by cuBLAS."""


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
    """What was fastest on an H200 (kernels/results)."""
    small = outputs * inputs < 1 << 24
    if rows == 1 and (bits == 4 or small):
        if small:
            return Tiles(1, 8, 1024)
        return Tiles(1, 4, 2048) if inputs > 8192 else Tiles(1, 8, 512, warps=2)
    if rows <= 16:
        return Tiles(16, 32, 128, stages=4) if small else Tiles(16, 128, 128)
    if small:
        return Tiles(32 if rows <= 32 else 64, 32, 128, stages=4)
    return Tiles(32 if rows <= 32 else 64, 128, 128)


def gemm(
    x: torch.Tensor, matrix: PackedMatrix, tiles: Tiles | None = None, *, dense_rows: int | None = None
) -> torch.Tensor:
    """[rows, output] in the activations' type."""
    rows, (outputs, inputs) = len(x), matrix.shape
    out = x.new_empty(rows, outputs)
    if not out.numel():
        return out
    if tiles is None and rows >= (DENSE_ROWS[matrix.bits] if dense_rows is None else dense_rows):
        return x @ dense(matrix, x.dtype).T
    x = x.contiguous()
    tiles = tiles or default_tiles(rows, outputs, inputs, matrix.bits)
    turn = min(tiles.inputs, max(16, triton.next_power_of_2(inputs)))
    group = matrix.group_size
    if tiles.rows > 1 and group != inputs:
        turn = min(turn, max(16, group & -group))  # a turn of its loop stays within a group
    per_code = tiles.rows > 1 and group != inputs and bool(group % turn)
    blocks = triton.cdiv(outputs, tiles.outputs) * triton.cdiv(rows, tiles.rows)
    turns = triton.cdiv(inputs, turn)
    splits = tiles.splits or max(1, min(16, turns // 2, (3 * _processors(x.device)) // blocks))
    splits = min(splits, turns)
    each = triton.cdiv(turns, splits)
    splits = triton.cdiv(turns, each)
    apart = matrix.outliers if matrix.outliers is not None and matrix.outliers.most else None
    finishes = splits > 1 or apart is not None
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
        _finish(parts, out, x, apart)
    return out


def dense(matrix: PackedMatrix, dtype: torch.dtype) -> torch.Tensor:
    """[output, input]: the matrix's weights."""
    outputs, inputs = matrix.shape
    weights = torch.empty(outputs, inputs, dtype=dtype, device=matrix.words.device)
    block_n, block_k = 16, 512
    group = matrix.group_size
    narrow = matrix.words.view(torch.int16 if matrix.bits == 4 else torch.uint8)
    _dense_kernel[(triton.cdiv(outputs, block_n), triton.cdiv(inputs, block_k))](
        narrow, matrix.scales, weights, outputs, inputs, narrow.shape[1], matrix.scales.shape[1], group,
        BITS=matrix.bits, BLOCK_N=block_n, BLOCK_K=block_k,
        GROUP=group if group & (group - 1) == 0 and group <= block_k else 0,
    )  # fmt: skip
    if matrix.outliers is not None:
        apart = matrix.outliers
        places = apart.rows() * inputs + apart.columns
        weights.view(-1).index_add_(0, places, apart.values.to(dtype))
    return weights


def _finish(parts: torch.Tensor, out: torch.Tensor, x: torch.Tensor, apart: SparseRows | None) -> None:
    (splits, rows, outputs), block = parts.shape, 32 if apart else 256
    lists = (apart.starts, apart.columns, apart.values) if apart else (x, x, x)
    _finish_kernel[(triton.cdiv(outputs, block), triton.cdiv(rows, 4) if apart else rows)](
        parts, out, x, *lists, rows, outputs, x.shape[1],
        SPLITS=splits, BLOCK_N=block, BLOCK_C=16, ROWS=4 if apart else 1, APART=apart is not None,
    )  # fmt: skip


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
        scales = tl.load(
            scales_ptr + n[:, None] * groups + (word // group_words)[None, :], mask=mask, other=0.0
        )
        product = tl.zeros([BLOCK_N, BLOCK_W], tl.float32)
        total = tl.zeros([BLOCK_W], tl.float32)
        for place in tl.static_range(EACH):
            if place * BITS >= ONE:  # noqa: SIM108 - a compiled branch, not two shifts
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
    OFFSET: tl.constexpr = 24.0 if BITS == 4 else 0.0
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
        codes = tl.load(
            lines + number[None, :], mask=inside[:, None] & (number < row_codes)[None, :], other=0
        )
        if BITS == 4:
            weights = _expand(codes, BLOCK_N, BLOCK_K, HALF)
        else:
            weights = (codes ^ 0x80).to(tl.int8, bitcast=True).to(tl.float16 if HALF else tl.bfloat16)
        if PER_CODE:
            places = n[:, None] * groups + (k // group)[None, :]
            each = tl.load(scales_ptr + places, mask=inside[:, None] & (k < inputs)[None, :], other=0.0)
            scaled = (weights.to(tl.float32) - OFFSET) * each.to(tl.float32)
            if EXACT:
                sums += tl.dot(x.to(tl.float32), tl.trans(scaled), input_precision="ieee")
            else:
                sums += tl.dot(x, tl.trans(scaled.to(x.dtype)))
        else:
            past = first >= inputs  # a last split's turn with nothing to do
            scale_ptr = scales_ptr + n * groups + tl.where(past, 0, first // group)
            scales = tl.load(scale_ptr, mask=inside, other=0.0).to(tl.float32)
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
    if HALF:  # noqa: SIM108 - likewise
        second = ((codes << (ONE - 4)) & MASK) | BASE
    else:
        second = ((codes >> (4 - ONE)) & MASK) | BASE
    third = ((codes >> (8 - ONE)) & MASK) | BASE
    fourth = ((codes >> (12 - ONE)) & MASK) | BASE
    joined = tl.join(tl.join(first, third), tl.join(second, fourth)).reshape(BLOCK_N, BLOCK_K)
    return joined.to(tl.int16).to(tl.float16 if HALF else tl.bfloat16, bitcast=True)


@triton.jit
def _dense_kernel(
    codes_ptr, scales_ptr, out_ptr, outputs, inputs, row_codes, groups, group,
    BITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    EACH: tl.constexpr = 4 if BITS == 4 else 1  # codes of a loaded number
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(1) * BLOCK_K
    inside = n < outputs
    number = first // EACH + tl.arange(0, BLOCK_K // EACH)
    lines = codes_ptr + n.to(tl.int64)[:, None] * row_codes
    codes = tl.load(lines + number[None, :], mask=inside[:, None] & (number < row_codes)[None, :], other=0)
    if BITS == 4:
        weights = _expand(codes, BLOCK_N, BLOCK_K, True).to(tl.float32) - 24.0
    else:
        weights = (codes ^ 0x80).to(tl.int8, bitcast=True).to(tl.float32)
    k = first + tl.arange(0, BLOCK_K)
    if GROUP > 0:
        span = first // GROUP + tl.arange(0, BLOCK_K // GROUP)
        mask = inside[:, None] & (span < groups)[None, :]
        scales = tl.load(scales_ptr + n[:, None] * groups + span[None, :], mask=mask, other=0.0).to(
            tl.float32
        )
        grouped = weights.reshape(BLOCK_N, BLOCK_K // GROUP, GROUP) * scales[:, :, None]
        weights = grouped.reshape(BLOCK_N, BLOCK_K)
    else:
        mask = inside[:, None] & (k < inputs)[None, :]
        places = n[:, None] * groups + (k // group)[None, :]
        weights *= tl.load(scales_ptr + places, mask=mask, other=0.0).to(tl.float32)
    place = n.to(tl.int64)[:, None] * inputs + k[None, :]
    tl.store(
        out_ptr + place, weights.to(out_ptr.dtype.element_ty), mask=inside[:, None] & (k < inputs)[None, :]
    )


@triton.jit
def _finish_kernel(
    parts_ptr, out_ptr, x_ptr, starts_ptr, columns_ptr, values_ptr, rows, outputs, inputs,
    SPLITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr,
    APART: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mask = (row < rows)[:, None] & (n < outputs)[None, :]
    place = row[:, None] * outputs + n[None, :]
    sums = tl.zeros([ROWS, BLOCK_N], tl.float32)
    for split in tl.static_range(SPLITS):
        sums += tl.load(parts_ptr + split * rows * outputs + place, mask=mask, other=0.0)
    if APART:
        start = tl.load(starts_ptr + n, mask=n < outputs, other=0)
        count = tl.load(starts_ptr + n + 1, mask=n < outputs, other=0) - start
        for first in range(0, tl.max(count, 0), BLOCK_C):
            index = first + tl.arange(0, BLOCK_C)
            some = index[None, :] < count[:, None]
            at = start[:, None] + index[None, :]
            column = tl.load(columns_ptr + at, mask=some, other=0)
            value = tl.load(values_ptr + at, mask=some, other=0.0).to(tl.float32)
            x = tl.load(
                x_ptr + row[:, None, None] * inputs + column[None, :, :],
                mask=(row < rows)[:, None, None] & some[None, :, :],
                other=0.0,
            )
            sums += tl.sum(x.to(tl.float32) * value[None, :, :], 2)
    tl.store(out_ptr + place, sums.to(out_ptr.dtype.element_ty), mask=mask)
