"""A model folder of random weights in the names and shapes of a small Llama."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

if TYPE_CHECKING:
    from pathlib import Path

HIDDEN, INNER, LAYERS, VOCABULARY = 64, 160, 2, 96


def make_small_checkpoint(folder: Path, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Write it into two files with an index; gives its tensors."""
    generator = torch.Generator().manual_seed(5)

    def random(*shape: int) -> torch.Tensor:
        plain = 0.05 * torch.randn(shape, generator=generator)
        return torch.where(torch.rand(shape, generator=generator) < 0.004, 8 * plain, plain).to(dtype)

    tensors = {"model.embed_tokens.weight": random(VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        for name, rows in (("q", HIDDEN), ("k", 32), ("v", 32), ("o", HIDDEN)):
            tensors[f"{prefix}self_attn.{name}_proj.weight"] = random(rows, HIDDEN)
        tensors[f"{prefix}mlp.gate_proj.weight"] = random(INNER, HIDDEN)
        tensors[f"{prefix}mlp.up_proj.weight"] = random(INNER, HIDDEN)
        tensors[f"{prefix}mlp.down_proj.weight"] = random(HIDDEN, INNER)
        tensors[f"{prefix}input_layernorm.weight"] = random(HIDDEN)
    tensors["lm_head.weight"] = random(VOCABULARY, HIDDEN)
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(tensors)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, own in halves.items():
        save_file({name: tensors[name] for name in own}, folder / file, {"format": "pt"})
    index = {"weight_map": {name: file for file, own in halves.items() for name in own}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    return tensors
