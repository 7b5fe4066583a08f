"""A memory's matrices as vLLM multiplies its own on a CPU: packed once, read once for all rows of a step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from galley_plugins import vllm_compat

if TYPE_CHECKING:
    from collections.abc import Sequence

    from galley_plugins.memory.network import MemoryNetwork


class PackedLinear(nn.Module):
    """Takes over weights [outputs, inputs], side by side where there are several; no bias."""

    cpu_linear: Any

    def __init__(self, weights: Sequence[torch.Tensor]) -> None:
        from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

        super().__init__()
        self.weight = nn.Parameter(torch.cat(list(weights)), requires_grad=False)
        dispatch_cpu_unquantized_gemm(self, remove_weight=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.cpu_linear(x, self.weight, None)
        return found


class PackedBlock(nn.Module):
    """A block of `MemoryNetwork`: x + down(silu(gate(norm x)) * up(norm x))."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.norm, self._epsilon = block.input_layernorm.weight, block._epsilon
        self.gate_up = PackedLinear([block.mlp["gate_proj"].weight, block.mlp["up_proj"].weight])
        self.down = PackedLinear([block.mlp["down_proj"].weight])

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        normed = functional.rms_norm(states, self.norm.shape, self.norm, self._epsilon)
        gate, up = self.gate_up(normed).chunk(2, -1)
        return states + self.down(functional.silu(gate) * up)


def pack(network: MemoryNetwork) -> None:
    """Pack a network on a CPU in place; its blocks where they are Llama's, and its output layer."""
    vllm_compat.check("memory-cpu")
    if network.sizes.family == "llama":
        network.layers = nn.ModuleList(PackedBlock(block) for block in network.layers)
    network.lm_head = PackedLinear([network.lm_head.weight])
