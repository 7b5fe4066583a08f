"""Linear maps of plain weights on a CPU, where a step has few rows: chats for their next token.

What a library does for products of many rows costs those of few as much again, and vLLM calls a layer's
operations one by one. Here float32 maps run in compiled code (`galley_kernels.compiled`), from weights in
16 bits where float32 adds nothing to them, as checkpoints in bfloat16 have them: half the bytes to read. A
row's result does not depend on the rows beside it. Steps of more rows run as in vLLM.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from typing import TYPE_CHECKING, Any

import torch

from galley_kernels import compiled
from galley_kernels.compiled import FloatLinear
from galley_plugins import vllm_compat
from galley_plugins.worker.memory import available_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

MOST = 64  # rows
VARIABLE = "GALLEY_FEW_ROWS"
"""0 leaves all rows to vLLM."""

_NAME = "galley_few_rows"
_SHARE = 4  # of the free memory, the part that another copy of the weights may take
_LEAST_OUTPUTS = 8


def wanted(vllm_config: Any) -> bool:
    """Whether this engine may: float32, no graph that calls would leave, no adapters on its layers."""
    from vllm.config import CompilationMode

    return (
        os.environ.get(VARIABLE) != "0"
        and vllm_config.model_config.dtype == torch.float32
        and vllm_config.compilation_config.mode == CompilationMode.NONE
        and vllm_config.lora_config is None
        and compiled.available()
    )


@contextlib.contextmanager
def loading() -> Iterator[None]:
    """Inside, linear layers of a model that is loaded get these maps, before vLLM packs their weights."""
    vllm_compat.check("few-rows")
    module: Any = importlib.import_module("vllm.model_executor.layers.utils")
    original = module.dispatch_cpu_unquantized_gemm
    left = available_bytes() // _SHARE

    def dispatch(layer: Any, remove_weight: bool) -> None:
        nonlocal left
        linear = _linear(layer, left)
        original(layer, remove_weight)
        if linear is not None:
            left -= sum(part.codes.nbytes for part in linear.parts)
            setattr(layer, _NAME, linear)
            layer.cpu_linear = _FewRows(linear, layer.cpu_linear)

    module.dispatch_cpu_unquantized_gemm = dispatch
    try:
        yield
    finally:
        module.dispatch_cpu_unquantized_gemm = original


def linear_of(layer: Any) -> FloatLinear | None:
    """The map that a layer has got, with its bias."""
    found: FloatLinear | None = getattr(layer, _NAME, None)
    return found


def _linear(layer: Any, most_bytes: int) -> FloatLinear | None:
    weight = layer.weight
    if (
        weight.is_meta
        or weight.dim() != 2
        or weight.dtype != torch.float32
        or weight.shape[0] < _LEAST_OUTPUTS
        or weight.nbytes > most_bytes
        or getattr(layer, "tp_size", 1) > 1
    ):
        return None
    linear = FloatLinear(weight.data)
    if getattr(layer, "bias", None) is not None and not getattr(layer, "skip_bias_add", False):
        linear.add_bias(layer.bias)
    return linear


class _FewRows:
    """Stands for a layer's `cpu_linear`."""

    def __init__(self, linear: FloatLinear, others: Any) -> None:
        self._linear = linear
        self._others = others

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        own = self._linear.bias is not None
        if x.dtype != torch.float32 or x.numel() > MOST * self._linear.inputs or own != (bias is not None):
            out: torch.Tensor = self._others(x, weight, bias)
            return out
        return self._linear(x)
