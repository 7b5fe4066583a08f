"""The network of a memory: blocks of a model's own MLP, each position by itself, and an output layer.

MLP Memory (arXiv 2508.01832, section 3; sizes and names of tensors as in the authors' code): pre-norm
residual blocks, a last norm, and logits over the next token. Two families: Llama's (RMSNorm, SwiGLU) and
GPT-2's (LayerNorm, GELU, biases). States of another width than the blocks' go through a linear layer first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn
from torch.nn import functional

from galley_kernels import memory_block

Family = Literal["llama", "gpt2"]
FAMILIES = get_args(Family)


@dataclass(frozen=True)
class Sizes:
    """Of a network.

    Attributes:
        inputs: width of the states that it reads.
        width, hidden: of the blocks, and inside of them.
        outputs: tokens that it has logits for.
        epsilon: of the norms.
    """

    family: Family
    inputs: int
    width: int
    hidden: int
    blocks: int
    outputs: int
    epsilon: float = 1e-5

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"family: found {self.family!r}, expected {', '.join(FAMILIES)}")
        for name in ("inputs", "width", "hidden", "blocks", "outputs"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < (0 if name == "blocks" else 1):
                raise ValueError(f"{name}: found {value!r}, expected a number of 1 or more")
        if not self.epsilon > 0:
            raise ValueError(f"epsilon: found {self.epsilon!r}, expected a number above 0")


class _Llama(nn.Module):
    """x + down(silu(gate(norm x)) * up(norm x))."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self._epsilon = sizes.epsilon
        self.input_layernorm = nn.RMSNorm(sizes.width)
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": nn.Linear(sizes.width, sizes.hidden, bias=False),
                "up_proj": nn.Linear(sizes.width, sizes.hidden, bias=False),
                "down_proj": nn.Linear(sizes.hidden, sizes.width, bias=False),
            }
        )

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return memory_block(
            states,
            self.input_layernorm.weight,
            self.mlp["gate_proj"].weight,
            self.mlp["up_proj"].weight,
            self.mlp["down_proj"].weight,
            epsilon=self._epsilon,
            implementation="torch" if torch.is_grad_enabled() else "auto",
        )


class _Transposed(nn.Module):
    """A linear layer whose weight is [inputs, outputs], as GPT-2 stores them."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return functional.linear(states, self.weight.T, self.bias)


class _GPT2(nn.Module):
    """x + project(gelu(expand(norm x)))."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(sizes.width, eps=sizes.epsilon)
        self.mlp = nn.ModuleDict(
            {
                "c_fc": _Transposed(sizes.width, sizes.hidden),
                "c_proj": _Transposed(sizes.hidden, sizes.width),
            }
        )

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        inner = functional.gelu(self.mlp["c_fc"](self.ln_1(states)), approximate="tanh")
        return states + self.mlp["c_proj"](inner)


class MemoryNetwork(nn.Module):
    """Logits over the next token from the states of one layer.

    Parameters have the names of the authors' code: `layers.{i}.mlp.gate_proj.weight` and so on.
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.embedding_transform = (
            nn.Linear(sizes.inputs, sizes.width) if sizes.inputs != sizes.width else nn.Identity()
        )
        if sizes.family == "llama":
            self.layers = nn.ModuleList(_Llama(sizes) for _ in range(sizes.blocks))
            self.norm = nn.RMSNorm(sizes.width, eps=sizes.epsilon)
        else:
            self.h = nn.ModuleList(_GPT2(sizes) for _ in range(sizes.blocks))
            self.ln_f = nn.LayerNorm(sizes.width, eps=sizes.epsilon)
        self.lm_head = nn.Linear(sizes.width, sizes.outputs, bias=False)

    def hidden(self, states: torch.Tensor) -> torch.Tensor:
        """[rows, width], normed: what the output layer reads.

        Args:
            states: [rows, inputs] in the parameters' type.
        """
        states = self.embedding_transform(states)
        for block in self.layers if self.sizes.family == "llama" else self.h:
            states = block(states)
        last = self.norm if self.sizes.family == "llama" else self.ln_f
        normed: torch.Tensor = last(states)
        return normed

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """[rows, outputs]"""
        logits: torch.Tensor = self.lm_head(self.hidden(states))
        return logits

    @torch.no_grad()
    def initialize(self, seed: int, head: torch.Tensor | None = None) -> MemoryNetwork:
        """Random values by a seed; blocks begin as the identity, since what they add is 0.

        Args:
            head: [outputs, width], what the output layer begins with.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, value in sorted(self.named_parameters()):
            if name.endswith(("down_proj.weight", "c_proj.weight", "bias")):
                value.zero_()
            elif value.dim() == 1:
                value.fill_(1.0)
            else:
                value.copy_(torch.randn(value.shape, generator=generator) * 0.02)
        if head is not None:
            self.lm_head.weight.copy_(head)
        return self
