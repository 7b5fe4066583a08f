"""Triton kernels for a GPU: weights become numbers in registers, and every code is read once.

A 4-bit code's bits are put where they are the lowest bits of a float that holds them exactly: 16 + u, u being the
unsigned code. That is a shift and one three-way logical operation, where a conversion from integers has a quarter
of their speed. What that adds to each product, 16 + 8 times the sum of the activations, is taken off again after
each group, before its scale.

- One row, 4 bits: vector sums in float32.
- More rows: tiles on the matrix units. Weights are the left operand, which Hopper's take from registers.
  Codes lie in planes (`packed.Order`), so that a plane's activations are neighbours.
- Many rows: arithmetic takes the time. Weights are written out once and cuBLAS multiplies.

Where tiles are too few to fill the GPU, the input dimension is split among them; a last kernel adds the parts,
and the weights kept apart.
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

DENSE_ROWS = 96
"""From so many rows on, weights are written out and multiplied by cuBLAS."""


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
    stages: int = 4


def default_tiles(rows: int, outputs: int, inputs: int, bits: int) -> Tiles:
    if rows == 1 and bits == 4:
        return Tiles(1, 8, 1024)
    high = 16 if rows <= 16 else 32 if rows <= 32 else 64
    return Tiles(high, 128, 128) if outputs * inputs > 1 << 24 else Tiles(high, 64, 64)


def fits(matrix: PackedMatrix) -> bool:
    """Whether the kernels below take the matrix as it lies."""
    even = matrix.inputs % 64 == 0 and matrix.group_size % 32 == 0
    return even and (matrix.bits == 8 or matrix.order == "planes")


def gemm(x: torch.Tensor, matrix: PackedMatrix, tiles: Tiles | None = None) -> torch.Tensor:
    """[rows, output] in the activations' type."""
    rows, (outputs, inputs) = len(x), matrix.shape
    if not rows:
        return x.new_empty(rows, outputs)
    if not fits(matrix):
        return x @ matrix.dequantize(x.dtype).T
    if tiles is None and rows >= DENSE_ROWS:
        return x @ dense(matrix, x.dtype).T
    x = x.contiguous()
    tiles = tiles or default_tiles(rows, outputs, inputs, matrix.bits)
    group = matrix.group_size
    turn = min(tiles.inputs, group & -group if group % tiles.inputs else tiles.inputs)
    if matrix.bits == 4:
        turn = max(turn, 64)  # a block of the planes
    if tiles.rows == 1:
        turn = min(tiles.inputs, triton.next_power_of_2(inputs))
    turns = triton.cdiv(inputs, turn)
    blocks = triton.cdiv(outputs, tiles.outputs) * triton.cdiv(rows, tiles.rows)
    splits = tiles.splits or max(1, min(16, turns // 4, (3 * _processors(x.device)) // blocks))
    each = triton.cdiv(turns, min(splits, turns))
    splits = triton.cdiv(turns, each)
    apart = matrix.outliers if matrix.outliers is not None and matrix.outliers.most else None
    out = x.new_empty(rows, outputs)
    finishes = splits > 1 or apart is not None
    parts = x.new_empty(splits, rows, outputs, dtype=torch.float32) if finishes else out
    groups = matrix.scales.shape[1]
    options: dict[str, Any] = {
        "HALVES": matrix.bits == 4 and group % 64 != 0,
        "BLOCK_N": tiles.outputs,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }
    sizes = (rows, outputs, inputs, groups, group, each)
    blocks_n = triton.cdiv(outputs, tiles.outputs)
    if tiles.rows == 1:
        _vector_kernel[(blocks_n, rows, splits)](
            x, matrix.words.view(torch.int16), matrix.scales, parts, *sizes, BLOCK_W=turn // 4, **options
        )
    else:
        exact = x.dtype == torch.float32 or interpreted()  # which has no products of bfloat16
        codes = matrix.words.view(torch.int16 if matrix.bits == 4 else torch.uint8)
        _tile_kernel[(blocks_n, triton.cdiv(rows, tiles.rows), splits)](
            x, codes, matrix.scales, parts, *sizes, BITS=matrix.bits, BLOCK_M=tiles.rows, BLOCK_K=turn,
            HALF=exact or x.dtype == torch.float16, EXACT=exact, **options,
        )  # fmt: skip
    if finishes:
        _finish(parts, out, x, apart)
    return out


def dense(matrix: PackedMatrix, dtype: torch.dtype) -> torch.Tensor:
    """[output, input]: the matrix's weights, of one that `fits`."""
    (outputs, inputs), block = matrix.shape, 64
    weights = torch.empty(outputs, inputs, dtype=dtype, device=matrix.words.device)
    codes = matrix.words.view(torch.int16 if matrix.bits == 4 else torch.uint8)
    grid = (triton.cdiv(outputs, block), triton.cdiv(codes.shape[1], block))
    _dense_kernel[grid](
        codes, matrix.scales, weights, outputs, inputs, codes.shape[1], matrix.scales.shape[1],
        matrix.group_size, BITS=matrix.bits, BLOCK_N=block, BLOCK_W=block,
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
    x_ptr, codes_ptr, scales_ptr, out_ptr, rows, outputs, inputs, groups, group, turns,
    HALVES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    ONE: tl.constexpr = 19  # the bit that is worth 1 beside 16 in float32
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row, split = tl.program_id(1), tl.program_id(2)
    inside = n < outputs
    x_ptr += row.to(tl.int64) * inputs
    row_codes = inputs // 4
    lines = codes_ptr + n.to(tl.int64)[:, None] * row_codes
    sums = tl.zeros([BLOCK_N, BLOCK_W], tl.float32)
    for turn in range(turns):
        number = (split * turns + turn) * BLOCK_W + tl.arange(0, BLOCK_W)
        here = number < row_codes
        mask = inside[:, None] & here[None, :]
        codes = tl.load(lines + number[None, :], mask=mask, other=0).to(tl.int32)
        column = number // 16 * 64 + number % 16
        scale_ptr = scales_ptr + n[:, None] * groups + (column // group)[None, :]
        for half in tl.static_range(2):
            product = tl.zeros([BLOCK_N, BLOCK_W], tl.float32)
            total = tl.zeros([BLOCK_W], tl.float32)
            for plane in tl.static_range(2):
                bits = codes << (ONE - 8 * half - 4 * plane)
                weights = ((bits & (15 << ONE)) | 0x41800000).to(tl.float32, bitcast=True)
                values = tl.load(x_ptr + column + 32 * half + 16 * plane, mask=here, other=0.0).to(tl.float32)
                product += weights * values[None, :]
                total += values
            product -= 24.0 * total[None, :]
            if HALVES:
                scales = tl.load(scale_ptr + half, mask=mask, other=0.0)
            else:
                scales = tl.load(scale_ptr, mask=mask, other=0.0)
            sums += product * scales.to(tl.float32)
    place = (split * rows + row).to(tl.int64) * outputs + n
    tl.store(out_ptr + place, tl.sum(sums, 1).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _plane(codes, PLANE: tl.constexpr, HALF: tl.constexpr):
    """int16 codes to 16 + u of one plane, in float16 or bfloat16."""
    ONE: tl.constexpr = 6 if HALF else 3  # the bit that is worth 1 beside 16
    DOWN: tl.constexpr = 4 * PLANE - ONE
    if DOWN > 0:
        bits = codes >> DOWN
    else:
        bits = codes << -DOWN
    bits = (bits & (15 << ONE)) | (0x4C00 if HALF else 0x4180)
    return bits.to(tl.int16).to(tl.float16 if HALF else tl.bfloat16, bitcast=True)


@triton.jit
def _dot(weights, x, sums, EXACT: tl.constexpr):
    if EXACT:
        product = tl.dot(weights.to(tl.float32), x.to(tl.float32), sums, input_precision="ieee")
    else:
        product = tl.dot(weights, x, sums)
    return product


@triton.jit
def _tile_kernel(
    x_ptr, codes_ptr, scales_ptr, out_ptr, rows, outputs, inputs, groups, group, turns,
    BITS: tl.constexpr, HALVES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, HALF: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    EACH: tl.constexpr = 4 if BITS == 4 else 1  # codes of a loaded number
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(2)
    real, inside = m < rows, n < outputs
    row_codes = inputs // EACH
    x_lines = x_ptr + m.to(tl.int64)[None, :] * inputs
    lines = codes_ptr + n.to(tl.int64)[:, None] * row_codes
    nothing = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    sums = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for turn in range(turns):
        first = (split * turns + turn) * BLOCK_K
        number = first // EACH + tl.arange(0, BLOCK_K // EACH)
        here = number < row_codes
        codes = tl.load(lines + number[None, :], mask=inside[:, None] & here[None, :], other=0)
        mask = here[:, None] & real[None, :]
        past = first >= inputs  # a last split's turn with nothing to do
        scale_ptr = scales_ptr + n * groups + tl.where(past, 0, first // group)
        scales = tl.load(scale_ptr, mask=inside, other=0.0).to(tl.float32)
        if BITS == 8:
            x = tl.load(x_lines + number[:, None], mask=mask, other=0.0)
            weights = (codes ^ 0x80).to(tl.int8, bitcast=True).to(tl.float16 if HALF else tl.bfloat16)
            sums += _dot(weights, x, nothing, EXACT) * scales[:, None]
        else:
            at = x_lines + (number // 16 * 64 + number % 16)[:, None]
            x0 = tl.load(at, mask=mask, other=0.0)
            x1 = tl.load(at + 16, mask=mask, other=0.0)
            x2 = tl.load(at + 32, mask=mask, other=0.0)
            x3 = tl.load(at + 48, mask=mask, other=0.0)
            product = _dot(_plane(codes, 0, HALF), x0, nothing, EXACT)
            product = _dot(_plane(codes, 1, HALF), x1, product, EXACT)
            total = tl.sum(x0.to(tl.float32) + x1.to(tl.float32), 0)
            if HALVES:
                sums += (product - 24.0 * total[None, :]) * scales[:, None]
                scales = tl.load(scale_ptr + 1, mask=inside, other=0.0).to(tl.float32)
                product = nothing
                total = tl.zeros([BLOCK_M], tl.float32)
            product = _dot(_plane(codes, 2, HALF), x2, product, EXACT)
            product = _dot(_plane(codes, 3, HALF), x3, product, EXACT)
            total += tl.sum(x2.to(tl.float32) + x3.to(tl.float32), 0)
            sums += (product - 24.0 * total[None, :]) * scales[:, None]
    place = split.to(tl.int64) * rows * outputs + m.to(tl.int64)[None, :] * outputs + n[:, None]
    tl.store(out_ptr + place, sums.to(out_ptr.dtype.element_ty), mask=real[None, :] & inside[:, None])


@triton.jit
def _dense_kernel(
    codes_ptr, scales_ptr, out_ptr, outputs, inputs, row_codes, groups, group,
    BITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    number = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    mask = (n < outputs)[:, None] & (number < row_codes)[None, :]
    codes = tl.load(codes_ptr + n.to(tl.int64)[:, None] * row_codes + number[None, :], mask=mask, other=0)
    lines = out_ptr + n.to(tl.int64)[:, None] * inputs
    scale_ptr = scales_ptr + n[:, None] * groups
    if BITS == 8:
        scales = tl.load(scale_ptr + (number // group)[None, :], mask=mask, other=0.0).to(tl.float32)
        weights = (codes ^ 0x80).to(tl.int8, bitcast=True).to(tl.float32) * scales
        tl.store(lines + number[None, :], weights.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        for plane in tl.static_range(4):
            column = number // 16 * 64 + 16 * plane + number % 16
            scales = tl.load(scale_ptr + (column // group)[None, :], mask=mask, other=0.0).to(tl.float32)
            bits = (codes.to(tl.int32) << (19 - 4 * plane)) & (15 << 19)
            weights = ((bits | 0x41800000).to(tl.float32, bitcast=True) - 24.0) * scales
            tl.store(lines + column[None, :], weights.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _finish_kernel(
    parts_ptr, out_ptr, x_ptr, starts_ptr, columns_ptr, values_ptr, rows, outputs, inputs,
    SPLITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr, APART: tl.constexpr,
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
