"""Compiled kernels for the operations that vLLM runs on a CPU as a chain of small eager ones.

vLLM's CPU build carries a compiled root-mean-square norm, with and without the addition of the residual, but
registers it for GPUs alone: on a CPU each norm is about ten operations, two in each layer. Here they are
providers of vLLM's registry of such operations (`vllm.ir`), which its option `ir-op-priority` chooses; what
they cannot compute falls back to vLLM's own. They take float32 alone: to bfloat16 the kernel cuts off instead
of rounding where the processor has no instruction for it.
"""

from __future__ import annotations

import torch

from galley_plugins import vllm_compat

PROVIDER = "galley_cpu"
_VECTOR = 16  # elements; the kernels take whole vectors


def register() -> None:
    """Add the providers to vLLM's registry; further calls do nothing.

    Raises:
        IncompatibleVllmError: this vLLM has no such registry.
    """
    vllm_compat.check("cpu-kernels")
    from vllm import ir

    if PROVIDER in ir.ops.rms_norm.impls:
        return
    ir.ops.rms_norm.register_impl(PROVIDER, supports_args=_norm_suits)(_rms_norm)
    ir.ops.fused_add_rms_norm.register_impl(PROVIDER, supports_args=_add_suits, inplace=True)(
        _fused_add_rms_norm
    )


def _suits(x: torch.Tensor, weight: torch.Tensor | None, variance_size: int | None) -> bool:
    return (
        variance_size is None
        and weight is not None
        and weight.dtype == x.dtype == torch.float32
        and x.shape[-1] % _VECTOR == 0
        and x.is_contiguous()
        and x.device.type == "cpu"
    )


# vLLM compares these signatures with those of its own implementations, names and annotations included.


def _norm_suits(
    x: torch.Tensor, weight: torch.Tensor | None, epsilon: float, variance_size: int | None = None
) -> bool:
    return _suits(x, weight, variance_size)


def _add_suits(
    x: torch.Tensor,
    x_residual: torch.Tensor,
    weight: torch.Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
) -> bool:
    return _suits(x, weight, variance_size) and x_residual.dtype == x.dtype and x_residual.is_contiguous()


def _rms_norm(
    x: torch.Tensor, weight: torch.Tensor | None, epsilon: float, variance_size: int | None = None
) -> torch.Tensor:
    output = torch.empty_like(x)
    torch.ops._C.rms_norm(output, x, weight, epsilon)
    return output


def _fused_add_rms_norm(
    x: torch.Tensor,
    x_residual: torch.Tensor,
    weight: torch.Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    torch.ops._C.fused_add_rms_norm(x, x_residual, weight, epsilon)
    return x, x_residual
