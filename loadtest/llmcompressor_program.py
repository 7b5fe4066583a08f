"""Quantizes a model with llm-compressor, for `loadtest.llmcompressor_peer`, which runs it in an environment
of its own.

Reads a request as JSON from the standard input, writes the weights as the numbers that the codes stand for to
the file that it names, and prints the clock's and the processor's seconds and its threads as a
last line of JSON.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, fake_quantize
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def recipe(method: str, bits: int, group_size: int) -> Any:
    """Symmetric integers, as Galley's are; group size 0 is a scale a channel."""
    strategy: dict[str, Any] = {"strategy": "group", "group_size": group_size}
    weights = QuantizationArgs(
        num_bits=bits, type="int", symmetric=True, **(strategy if group_size else {"strategy": "channel"})
    )
    kind = {"rtn": QuantizationModifier, "gptq": GPTQModifier}[method]
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
    return kind(config_groups=groups, ignore=["lm_head"])


@torch.no_grad()
def dequantized(model: Any) -> dict[str, torch.Tensor]:
    """By module, of those that were quantized."""
    found = {}
    for name, module in model.named_modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is not None and scheme.weights is not None:
            scale = module.weight_scale.to(torch.bfloat16)  # as Galley stores them
            zero = getattr(module, "weight_zero_point", None)
            found[name] = fake_quantize(module.weight.float(), scale.float(), zero, scheme.weights)
    return {name: weights.float().contiguous() for name, weights in found.items()}


def main() -> None:
    request = json.loads(sys.stdin.read())
    model = AutoModelForCausalLM.from_pretrained(request["model"], dtype=torch.float32)
    given: dict[str, Any] = {}
    if request["sequences"]:
        rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in request["sequences"]]
        given = {
            "dataset": Dataset.from_list(rows),
            "num_calibration_samples": len(rows),
            "max_seq_length": max(map(len, request["sequences"])),
        }
    tokenizer = AutoTokenizer.from_pretrained(request["model"])
    start, before = time.perf_counter(), time.process_time()
    oneshot(
        model=model,
        tokenizer=tokenizer,
        recipe=recipe(request["method"], request["bits"], request["group_size"]),
        **given,
    )
    seconds, processor = time.perf_counter() - start, time.process_time() - before
    save_file(dequantized(model), request["out"])
    print(json.dumps({"seconds": seconds, "cpu_seconds": processor, "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
