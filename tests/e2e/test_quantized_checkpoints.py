"""A quantized model served by vLLM says what its dequantized weights say in transformers."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from galley_kernels import PackedMatrix
from galley_kernels.compiled.linear import exact
from galley_plugins.quantization.checkpoint import matrices_together, quantize_checkpoint
from galley_plugins.quantization.layout import read_quantized
from galley_plugins.quantization.plan import SUFFIX, Plan
from galley_plugins.quantization.sensitivity import sensitivities
from galley_plugins.quantization.source import Source
from loadtest.perplexity import log_likelihoods, prompt_logprobs
from loadtest.servers import FLOAT32, galley_worker
from tests.e2e.quantized import MIXED, TOKENS, answers_of, ask, dequantized
from tests.e2e.texts import PROMPTS
from tests.support.small_memory import MixReference, make_memory

pytestmark = pytest.mark.engine

OPTIONS = {**FLOAT32, "max-num-seqs": 8, "max-num-batched-tokens": 256}


@pytest.mark.parametrize("calibrated", [False, True])
def test_weights_apart_and_mixed_bits(shallow: str, tmp_path: Path, calibrated: bool) -> None:
    """With costs known some matrices keep an eighth of their weights apart, and some of 8 bits none."""
    out = tmp_path / "quantized"
    plan, known = Plan.from_values({"method": "finequant+easyquant"}, MIXED), None
    if calibrated:
        with Source(Path(shallow)) as source:
            names = [name for group in matrices_together(source, plan) for name in group]
        modules = [name.removesuffix(SUFFIX) for name in names]
        known = sensitivities(Path(shallow), modules, tmp_path / "calibration")
    rows = quantize_checkpoint(Path(shallow), out, plan, sensitivities=known)
    assert (max(row.outlier_share for row in rows) > 0.1) == calibrated
    flags = ("--speculation", '{"method": "hybrid"}', "--quantization", '{"activations": "float"}')
    with galley_worker(OPTIONS, *flags, weights=str(out)) as server:
        found = [ask(server, prompt) for prompt in PROMPTS[:4]]
    assert found == answers_of(dequantized(out, shallow), shallow)


def test_a_plain_checkpoint_is_quantized_while_it_is_loaded(shallow: str, tmp_path: Path) -> None:
    out = tmp_path / "quantized"
    quantize_checkpoint(Path(shallow), out, Plan.from_values({"method": "finequant"}, MIXED))
    options = {"method": "finequant", "rules": dict(MIXED), "activations": "float"}
    with galley_worker(OPTIONS, "--quantization", json.dumps(options), weights=shallow) as server:
        found = [ask(server, prompt) for prompt in PROMPTS[:4]]
    assert found == answers_of(dequantized(out, shallow), shallow)


class IntegerMap(torch.nn.Module):
    """A map as its definition has it: activations rounded in blocks, in float64."""

    def __init__(self, matrix: PackedMatrix) -> None:
        super().__init__()
        self._matrix = matrix

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return exact(x, self._matrix).float()


def rounded_model(folder: Path, shallow: str) -> Any:
    """The checkpoint with integer activations, and 8 bits for the output layer's weights in groups of 64."""
    model = dequantized(folder, shallow)
    for name, found in read_quantized(folder):
        if isinstance(found, PackedMatrix):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, IntegerMap(found))
    groups = model.lm_head.weight.detach().unflatten(-1, (-1, 64))
    scales = groups.abs().amax(-1, keepdim=True) / 127
    model.lm_head.weight = torch.nn.Parameter(((groups / scales).round() * scales).flatten(-2))
    return model


def test_integer_activations_beside_drafts_and_embeddings(shallow: str, tmp_path: Path) -> None:
    """All layers in one decoder; embeddings look between them, and drafts change nothing of a row.

    A memory that was made for the plain model reads from the decoder what enters an MLP.
    """
    out = tmp_path / "quantized"
    quantize_checkpoint(Path(shallow), out, Plan.from_values({"method": "finequant+easyquant"}))
    memory = make_memory(tmp_path / "memory", Path(shallow), layer=5, weight=0, seed=1)
    flags = ("--embedding", '{"method": "token-prepending"}', "--speculation", '{"method": "hybrid"}')
    flags += ("--memory", json.dumps({"path": str(memory)}))
    with galley_worker(OPTIONS, *flags, weights=str(out)) as server:
        assert server.client.get("/galley/status").json()["workers"][0]["compiled_layers"] == 8
        ids = AutoTokenizer.from_pretrained(shallow)(" ".join(PROMPTS))["input_ids"][:192]
        found = torch.tensor(log_likelihoods(prompt_logprobs(server, ids), ids))
        rows = prompt_logprobs(server, ids, vllm_xargs={"memory_weight": 0.8})
        mixed = torch.tensor(log_likelihoods(rows, ids))
        drafted = [ask(server, prompt) for prompt in PROMPTS[:4]]
        plain = [ask(server, prompt, vllm_xargs={"speculation": False}) for prompt in PROMPTS[:4]]
        with ThreadPoolExecutor(5) as pool:
            vectors = pool.submit(server.embed, PROMPTS)
            together = list(pool.map(lambda prompt: ask(server, prompt), PROMPTS[:4]))
    expected = likelihoods_of(rounded_model(out, shallow), ids)
    whole = likelihoods_of(dequantized(out, shallow), ids)
    off = float((found - expected).abs().mean())
    # A number that float32 rounds the other way moves all that follows it a little, so that they do not agree
    # to the last bit; but what is found is nearer to this rounding than to none.
    assert off < 0.08
    assert off < 0.75 * float((found - whole).abs().mean())
    expected, whole = (
        MixReference(Path(shallow), [memory], model)
        .log_probs(ids, [0.8])[:-1]
        .gather(1, torch.tensor(ids[1:]).unsqueeze(1))
        .squeeze(1)
        for model in (rounded_model(out, shallow), dequantized(out, shallow))
    )
    off = float((mixed - expected).abs().mean())
    assert off < 0.08
    assert off < 0.75 * float((mixed - whole).abs().mean())
    assert float((mixed - found).abs().mean()) > 0.5
    assert drafted == plain
    assert len(vectors.result()) == len(PROMPTS)
    assert all(len(answer) == TOKENS for answer in together)


@torch.inference_mode()
def likelihoods_of(model: Any, ids: list[int]) -> torch.Tensor:
    """[tokens - 1]: log-probabilities of each token but the first."""
    logits = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    return logits.gather(1, torch.tensor(ids[1:]).unsqueeze(1)).squeeze(1)
