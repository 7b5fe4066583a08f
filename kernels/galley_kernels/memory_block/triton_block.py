"""Triton kernels for a block of an MLP memory: one for norm, gate, up and their product, one for the rest.

A row's norm is a factor of its products with the gate's and up's weights, so the sum of squares is taken in
the loop that multiplies, and the normed row is never stored. Weights are the left operand: their many rows
fill the matrix units where a few positions would not.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from galley_kernels.choice import interpreted

OWN_DOWN_WIDTH = 1024
"""Up to so wide, one kernel multiplies by down and adds the residual sooner than cuBLAS does."""


def block(
    x: torch.Tensor,
    norm: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    epsilon: float,
    *,
    outputs: int = 64,
    inputs: int = 64,
    warps: int = 4,
    stages: int = 4,
) -> torch.Tensor:
    """[rows, width]; `outputs` and `inputs` are a tile's."""
    (rows, width), hidden = x.shape, len(gate)
    x, gate, up, down = x.contiguous(), gate.contiguous(), up.contiguous(), down.contiguous()
    out = torch.empty_like(x)
    if not rows:
        return out
    inner = x.new_empty(rows, hidden)
    high = 16 if rows <= 16 else 32 if rows <= 32 else 64
    blocks = triton.cdiv(rows, high)
    options: dict[str, Any] = {"BLOCK_M": high, "num_warps": warps, "num_stages": stages}
    options["EXACT"] = x.dtype == torch.float32 or interpreted()  # which has no products of bfloat16
    _gate_up_kernel[(triton.cdiv(hidden, outputs), blocks)](
        x, norm.contiguous(), gate, up, inner, rows, width, hidden, epsilon,
        BLOCK_N=outputs, BLOCK_K=inputs, **options,
    )  # fmt: skip
    if width > OWN_DOWN_WIDTH and not options["EXACT"]:
        return torch.addmm(x, inner, down.T)
    _down_kernel[(triton.cdiv(width, 16), blocks)](
        inner, down, x, out, rows, hidden, width,
        BLOCK_N=16, BLOCK_K=64 if options["EXACT"] else 256, **options,
    )  # fmt: skip
    return out


@triton.jit
def _gate_up_kernel(
    x_ptr, norm_ptr, gate_ptr, up_ptr, out_ptr, rows, width, hidden, epsilon,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    real, inside = m < rows, n < hidden
    gates = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    ups = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    squares = tl.zeros([BLOCK_M], tl.float32)
    for first in range(0, width, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        here = k < width
        x = tl.load(x_ptr + m[None, :] * width + k[:, None], mask=here[:, None] & real[None, :], other=0.0)
        norm = tl.load(norm_ptr + k, mask=here, other=0.0).to(tl.float32)
        mask = inside[:, None] & here[None, :]
        places = n.to(tl.int64)[:, None] * width + k[None, :]
        gate = tl.load(gate_ptr + places, mask=mask, other=0.0)
        up = tl.load(up_ptr + places, mask=mask, other=0.0)
        wide = x.to(tl.float32)
        squares += tl.sum(wide * wide, 0)
        scaled = wide * norm[:, None]
        if EXACT:
            gates += tl.dot(gate.to(tl.float32), scaled, input_precision="ieee")
            ups += tl.dot(up.to(tl.float32), scaled, input_precision="ieee")
        else:
            gates = tl.dot(gate, scaled.to(gate.dtype), gates)
            ups = tl.dot(up, scaled.to(gate.dtype), ups)
    factor = tl.rsqrt(squares / width + epsilon)[None, :]
    gates *= factor
    product = gates / (1.0 + tl.exp(-gates)) * (ups * factor)
    places = m.to(tl.int64)[None, :] * hidden + n[:, None]
    tl.store(out_ptr + places, product.to(out_ptr.dtype.element_ty), mask=real[None, :] & inside[:, None])


@triton.jit
def _down_kernel(
    inner_ptr, down_ptr, x_ptr, out_ptr, rows, hidden, width,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    real, inside = m < rows, n < width
    sums = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for first in range(0, hidden, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        here = k < hidden
        inner = tl.load(
            inner_ptr + m[None, :] * hidden + k[:, None], mask=here[:, None] & real[None, :], other=0.0
        )
        places = n.to(tl.int64)[:, None] * hidden + k[None, :]
        down = tl.load(down_ptr + places, mask=inside[:, None] & here[None, :], other=0.0)
        if EXACT:
            sums += tl.dot(down.to(tl.float32), inner.to(tl.float32), input_precision="ieee")
        else:
            sums = tl.dot(down, inner, sums)
    places = m.to(tl.int64)[None, :] * width + n[:, None]
    mask = real[None, :] & inside[:, None]
    sums += tl.load(x_ptr + places, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + places, sums.to(out_ptr.dtype.element_ty), mask=mask)
