"""A LoRA adapter of random values, as peft writes one, and the model of transformers that it makes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

if TYPE_CHECKING:
    from pathlib import Path

RANK, ALPHA = 8, 16
MODULES = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")


def add_lora(model: Any, folder: Path) -> Any:
    """The model itself, with the adapter added to its weights."""
    tensors = load_file(folder / "adapter_model.safetensors")
    for name, a in tensors.items():
        if ".lora_A." in name:
            b = tensors[name.replace(".lora_A.", ".lora_B.")]
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            model.get_submodule(module).weight.data += ALPHA / RANK * b @ a
    return model


def make_lora(folder: Path, model: Path, seed: int = 0) -> Any:
    """Write an adapter of `MODULES` of every layer; the model in float32 with it added to its weights."""
    generator = torch.Generator().manual_seed(seed)
    merged = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tensors = {}
    for index, layer in enumerate(merged.model.layers):
        for name in MODULES:
            linear = layer.get_submodule(name)
            a = torch.randn(RANK, linear.in_features, generator=generator) / linear.in_features**0.5
            b = torch.randn(linear.out_features, RANK, generator=generator) / 20
            place = f"base_model.model.model.layers.{index}.{name}"
            tensors |= {f"{place}.lora_A.weight": a, f"{place}.lora_B.weight": b}
            linear.weight.data += ALPHA / RANK * b @ a
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": ALPHA,
        "bias": "none",
        "target_modules": [name.split(".")[1] for name in MODULES],
        "base_model_name_or_path": str(model),
    }
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return merged
