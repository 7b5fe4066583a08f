"""A block of an MLP memory (MLP Memory, arXiv 2508.01832): x + down(silu(gate(norm x)) * up(norm x)).

RMSNorm and SwiGLU in the shapes of the Llama family's MLP; positions do not mix.
"""

from __future__ import annotations

import torch

from galley_kernels.choice import AUTO, choose

IMPLEMENTATIONS = ("reference", "torch", "triton")
TRITON_ROWS = 64
"""Up to so many rows, reading the weights takes the time, and fewer kernels less of it."""


def memory_block(
    x: torch.Tensor,
    norm: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    *,
    epsilon: float = 1e-5,
    implementation: str = AUTO,
) -> torch.Tensor:
    """[rows, width] in the type of `x`.

    Args:
        x: floating [rows, width].
        norm: [width], the RMSNorm's weights.
        gate, up: [hidden, width].
        down: [width, hidden].

    Raises:
        ValueError: shapes do not fit.
    """
    hidden, width = gate.shape
    if (
        x.dim() != 2
        or x.shape[1] != width
        or norm.shape != (width,)
        or up.shape != gate.shape
        or down.shape != (width, hidden)
    ):
        raise ValueError(
            f"found x {list(x.shape)}, norm {list(norm.shape)}, gate {list(gate.shape)}, up "
            f"{list(up.shape)} and down {list(down.shape)}, expected [rows, width], [width], "
            "[hidden, width] twice and [width, hidden]"
        )
    chosen = choose(implementation, IMPLEMENTATIONS, x.device)
    if chosen == "triton" and (implementation != AUTO or len(x) <= TRITON_ROWS):
        from galley_kernels.memory_block import triton_block

        return triton_block.block(x, norm, gate, up, down, epsilon)
    dtype = torch.float64 if chosen == "reference" else x.dtype
    wide, norm, gate, up, down = (tensor.to(dtype) for tensor in (x, norm, gate, up, down))
    normed = torch.nn.functional.rms_norm(wide, norm.shape, norm, epsilon)
    inner = torch.nn.functional.silu(normed @ gate.T) * (normed @ up.T)
    return torch.addmm(wide, inner, down.T).to(x.dtype)
