"""What a quantized checkpoint says in transformers, and a server's answers beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from galley_kernels import PackedMatrix
from galley_plugins.quantization.layout import read_quantized
from loadtest.servers import NAME
from tests.e2e.texts import PROMPTS

if TYPE_CHECKING:
    from pathlib import Path

    from loadtest.servers import Server

TOKENS = 24
MIXED = [("*.layers.0.*", None), ("*.down_proj", {"bits": 8}), ("*.layers.3.mlp.down_proj", None)]


def dequantized(folder: Path, shallow: str) -> Any:
    """The model that the checkpoint stands for."""
    model = AutoModelForCausalLM.from_pretrained(shallow, dtype=torch.float32)
    state = model.state_dict()
    for name, found in read_quantized(folder):
        if isinstance(found, PackedMatrix):
            state[f"{name}.weight"].copy_(found.dequantize())
        elif name in state:
            assert torch.equal(state[name], found.float())
    return model


@torch.inference_mode()
def answers_of(model: Any, shallow: str) -> list[list[int]]:
    """Greedy answers."""
    tokenizer = AutoTokenizer.from_pretrained(shallow)
    answers = []
    for prompt in PROMPTS[:4]:
        messages = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        out = model.generate(ids, max_new_tokens=TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0)
        answers.append(out[0, ids.shape[1] :].tolist())
    return answers


def ask(server: Server, prompt: str, **fields: Any) -> list[int]:
    body: dict[str, Any] = {
        "model": NAME,
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": TOKENS,
        "ignore_eos": True,
        "return_token_ids": True,
        **fields,
    }
    answer = server.client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    ids: list[int] = answer.json()["choices"][0]["token_ids"]
    return ids
