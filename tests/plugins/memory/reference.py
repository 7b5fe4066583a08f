"""A memory's forward written out from its description, in float64, and tensors for it."""

from __future__ import annotations

import math

import torch


def random_tensors(
    family: str, inputs: int, width: int, hidden: int, blocks: int, outputs: int
) -> dict[str, torch.Tensor]:
    """Under the names of the authors' code; GPT-2's weights are [inputs, outputs]."""
    generator = torch.Generator().manual_seed(blocks)

    def drawn(*shape: int) -> torch.Tensor:
        return 0.3 * torch.randn(shape, generator=generator)

    tensors = {"lm_head.weight": drawn(outputs, width)}
    if inputs != width:
        tensors["embedding_transform.weight"] = drawn(width, inputs)
        tensors["embedding_transform.bias"] = drawn(width)
    for block in range(blocks):
        if family == "llama":
            prefix = f"layers.{block}"
            tensors[f"{prefix}.input_layernorm.weight"] = 1 + drawn(width)
            tensors[f"{prefix}.mlp.gate_proj.weight"] = drawn(hidden, width)
            tensors[f"{prefix}.mlp.up_proj.weight"] = drawn(hidden, width)
            tensors[f"{prefix}.mlp.down_proj.weight"] = drawn(width, hidden)
        else:
            prefix = f"h.{block}"
            tensors[f"{prefix}.ln_1.weight"], tensors[f"{prefix}.ln_1.bias"] = 1 + drawn(width), drawn(width)
            tensors[f"{prefix}.mlp.c_fc.weight"] = drawn(width, hidden)
            tensors[f"{prefix}.mlp.c_fc.bias"] = drawn(hidden)
            tensors[f"{prefix}.mlp.c_proj.weight"] = drawn(hidden, width)
            tensors[f"{prefix}.mlp.c_proj.bias"] = drawn(width)
    last = "norm" if family == "llama" else "ln_f"
    tensors[f"{last}.weight"] = 1 + drawn(width)
    if family == "gpt2":
        tensors[f"{last}.bias"] = drawn(width)
    return tensors


def plain_forward(
    family: str, tensors: dict[str, torch.Tensor], states: torch.Tensor, epsilon: float
) -> torch.Tensor:
    """float64 [rows, outputs]"""
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    x = states.double()
    if "embedding_transform.weight" in wide:
        x = x @ wide["embedding_transform.weight"].T + wide["embedding_transform.bias"]

    def normed(name: str) -> torch.Tensor:
        if family == "llama":
            return x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() * wide[f"{name}.weight"]
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + epsilon).sqrt()
        return scaled * wide[f"{name}.weight"] + wide[f"{name}.bias"]

    blocks = {name.split(".")[1] for name in wide if name.startswith(("layers.", "h."))}
    for block in range(len(blocks)):
        if family == "llama":
            prefix = f"layers.{block}"
            inner = normed(f"{prefix}.input_layernorm")
            gate = inner @ wide[f"{prefix}.mlp.gate_proj.weight"].T
            up = inner @ wide[f"{prefix}.mlp.up_proj.weight"].T
            x = x + (gate / (1 + (-gate).exp()) * up) @ wide[f"{prefix}.mlp.down_proj.weight"].T
        else:
            prefix = f"h.{block}"
            inner = normed(f"{prefix}.ln_1") @ wide[f"{prefix}.mlp.c_fc.weight"]
            inner = inner + wide[f"{prefix}.mlp.c_fc.bias"]
            cubed = math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)
            inner = 0.5 * inner * (1 + cubed.tanh())
            x = x + inner @ wide[f"{prefix}.mlp.c_proj.weight"] + wide[f"{prefix}.mlp.c_proj.bias"]
    return normed("norm" if family == "llama" else "ln_f") @ wide["lm_head.weight"].T
