"""A memory's block is the Llama family's norm and MLP with the residual, as transformers computes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from galley_kernels import memory_block
from galley_kernels.bench import random_block, relative_error

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.mark.parametrize("implementation", ["reference", "torch", "triton"])
@pytest.mark.parametrize(("rows", "width", "hidden"), [(1, 64, 160), (19, 100, 70), (40, 96, 256)])
def test_a_block_is_transformers(call: Callable[..., Any], rows: int, width: int, hidden: int) -> None:
    torch.manual_seed(rows)
    config = LlamaConfig(
        hidden_size=width, intermediate_size=hidden, num_attention_heads=1, hidden_act="silu"
    )
    norm, mlp = LlamaRMSNorm(width, eps=1e-3), LlamaMLP(config)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(rows, width)
    with torch.no_grad():
        expected = x + mlp(norm(x))
        weights = [norm.weight, mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight]
        found = call(memory_block, x, *(weight.detach() for weight in weights), epsilon=1e-3)
    assert torch.allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_shorter_types_round_a_few_times(call: Callable[..., Any], dtype: torch.dtype) -> None:
    tensors = random_block(9, 96, 256, dtype, "cpu")
    expected = memory_block(*tensors, implementation="reference")
    assert relative_error(call(memory_block, *tensors), expected) < (1e-3 if dtype == torch.float16 else 7e-3)


def test_shapes_that_do_not_fit_are_refused() -> None:
    x, norm, gate, up, down = random_block(2, 8, 16, torch.float32, "cpu")
    with pytest.raises(ValueError, match=r"down \[8, 8\], expected"):
        memory_block(x, norm, gate, up, down[:, :8])
