"""A quantized checkpoint served by vLLM says what its dequantized weights say in transformers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from galley_kernels import PackedMatrix
from galley_plugins.quantization.checkpoint import quantize_checkpoint
from galley_plugins.quantization.layout import read_quantized
from galley_plugins.quantization.plan import Plan
from loadtest.servers import FLOAT32, NAME, galley_worker
from tests.e2e.texts import PROMPTS

if TYPE_CHECKING:
    from loadtest.servers import Server

pytestmark = pytest.mark.engine

OPTIONS = {**FLOAT32, "max-num-seqs": 8, "max-num-batched-tokens": 256}
TOKENS = 24
PLANS = {
    "outliers apart, mixed bits, some as they were": Plan.from_values(
        {"method": "finequant+easyquant"},
        [("*.layers.0.*", None), ("*.down_proj", {"bits": 8}), ("*.layers.3.mlp.down_proj", None)],
    ),
    "compressed-tensors": Plan.from_values({"method": "finequant"}),
}


@torch.inference_mode()
def answers_of(folder: Path, shallow: str) -> list[list[int]]:
    """Greedy answers of the weights that the checkpoint stands for."""
    model = AutoModelForCausalLM.from_pretrained(shallow, dtype=torch.float32)
    state = model.state_dict()
    for name, found in read_quantized(folder):
        if isinstance(found, PackedMatrix):
            state[f"{name}.weight"].copy_(found.dequantize())
        elif name in state:
            assert torch.equal(state[name], found.float())
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


def ask(server: Server, prompt: str) -> list[int]:
    body: dict[str, Any] = {
        "model": NAME,
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": TOKENS,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    answer = server.client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    ids: list[int] = answer.json()["choices"][0]["token_ids"]
    return ids


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_answers_are_those_of_the_dequantized_weights(shallow: str, tmp_path: Path, plan: Plan) -> None:
    out = tmp_path / "quantized"
    quantize_checkpoint(Path(shallow), out, plan)
    with galley_worker(OPTIONS, "--speculation", '{"method": "hybrid"}', weights=str(out)) as server:
        found = [ask(server, prompt) for prompt in PROMPTS[:4]]
    assert found == answers_of(out, shallow)
