"""Quantized weights in engines that cannot keep vLLM's layers as they are: LoRA adapters, tensor parallelism."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from safetensors.torch import load_file, save_file

from galley_plugins.quantization.checkpoint import quantize_checkpoint
from galley_plugins.quantization.plan import Plan
from loadtest.servers import FLOAT32, galley_worker
from tests.e2e.quantized import MIXED, answers_of, ask, dequantized
from tests.e2e.texts import PROMPTS
from tests.support.small_lora import add_lora, make_lora

if TYPE_CHECKING:
    from loadtest.servers import Server

pytestmark = pytest.mark.engine

OPTIONS = {**FLOAT32, "max-num-seqs": 8, "max-num-batched-tokens": 256}
TUNED = "tuned"
HEADS, KEY_HEADS, HEAD = 8, 2, 64  # the built-in model has 9 and 3, which two ranks cannot share
CORES = sorted(os.sched_getaffinity(0))


def asked(server: Server, **fields: Any) -> list[list[int]]:
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(lambda prompt: ask(server, prompt, **fields), PROMPTS[:4]))


@pytest.mark.parametrize("activations", ["float", "integer"])
def test_adapters_add_to_packed_weights_beside_rows_without(
    shallow: str, tmp_path: Path, activations: str
) -> None:
    out = tmp_path / "quantized"
    quantize_checkpoint(Path(shallow), out, Plan.from_values({"method": "finequant+easyquant"}, MIXED))
    make_lora(tmp_path / TUNED, Path(shallow))
    options = {
        **OPTIONS,
        "enable-lora": True,
        "max-lora-rank": 8,
        "lora-modules": [f"{TUNED}={tmp_path / TUNED}"],
    }
    flags = ("--quantization", json.dumps({"activations": activations}))
    flags += ("--speculation", json.dumps({"method": "hybrid"}))
    with galley_worker(options, *flags, weights=str(out)) as server, ThreadPoolExecutor(2) as pool:
        tuned = pool.submit(asked, server, model=TUNED)
        plain = pool.submit(asked, server)
        found = plain.result(), tuned.result()
        status = server.client.get("/galley/status").json()["workers"][0]
    assert found[0] != found[1]
    assert status["compiled_layers"] == 0
    if activations == "integer":
        return  # answers of their own; what adapters add is seen
    model = dequantized(out, shallow)
    assert found[0] == answers_of(model, shallow)
    assert found[1] == answers_of(add_lora(model, tmp_path / TUNED), shallow)


def make_even_model(folder: Path, shallow: str) -> Path:
    """The shallow model with some of its heads, whose number is a power of two."""
    folder.mkdir()
    for path in Path(shallow).iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config |= {"num_attention_heads": HEADS, "num_key_value_heads": KEY_HEADS, "head_dim": HEAD}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(Path(shallow) / "model.safetensors")
    kept = {"q_proj": HEADS, "k_proj": KEY_HEADS, "v_proj": KEY_HEADS}
    for name, tensor in tensors.items():
        last = name.split(".")[-2]
        if last in kept:
            tensors[name] = tensor[: kept[last] * HEAD].clone()
        elif last == "o_proj":
            tensors[name] = tensor[:, : HEADS * HEAD].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.skipif(len(CORES) < 2, reason="two ranks need two cores")
def test_two_ranks_share_matrices_that_were_quantized_whole(shallow: str, tmp_path: Path) -> None:
    """A rank's part has the codes and scales that one rank would have, also where a group lies in both."""
    even, out = make_even_model(tmp_path / "even", shallow), tmp_path / "quantized"
    plan = {"method": "finequant+easyquant"}
    quantize_checkpoint(even, out, Plan.from_values(plan, MIXED))
    options = {**OPTIONS, "tensor-parallel-size": 2}
    flags = ("--quantization", json.dumps({**plan, "rules": dict(MIXED)}))
    flags += ("--speculation", json.dumps({"method": "hybrid"}))
    bound = {"VLLM_CPU_OMP_THREADS_BIND": f"{CORES[0]}|{CORES[1]}"}
    with galley_worker(options, *flags, weights=str(even), env=bound) as server:
        found = asked(server)
    assert found == answers_of(dequantized(out, str(even)), str(even))
