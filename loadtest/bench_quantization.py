#!/usr/bin/env python
"""What weight-only quantization costs SmolLM2-135M: perplexity of WikiText-2's test text, bits, and seconds.

The weights of the decoder layers' linear maps are quantized and put back as what they stand for; embeddings,
norms and the output layer stay. The model runs in transformers, in float32, over windows of 1024 tokens one
behind the other. Bits count codes, scales, and of outliers values, columns and the starts of rows.

Figures:
    ppl_*      perplexity; fp is of the weights as they came
    bits_*     bits per quantized weight
    seconds_*  to quantize all of them

Speed, and perplexity of checkpoints behind a server, are not measured yet.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from galley_plugins.models import resolve
from galley_plugins.quantization.options import QuantizationOptions
from galley_plugins.quantization.quantizer import quantize
from loadtest.harness import Report, console
from loadtest.perplexity import windows
from loadtest.servers import MODEL

if TYPE_CHECKING:
    from collections.abc import Sequence

WIKITEXT = Path("lm") / "wikitext2_test.txt"
WINDOWS, QUICK_WINDOWS, WINDOW_TOKENS = 16, 1, 1024
CHOICES: dict[str, QuantizationOptions] = {
    "int8": QuantizationOptions("rtn", bits=8),
    "rtn_channel": QuantizationOptions("rtn"),
    "easyquant": QuantizationOptions("easyquant"),
    "rtn_g64": QuantizationOptions("rtn", group_size=64),
    "rtn_g32": QuantizationOptions("rtn", group_size=32),
    "finequant": QuantizationOptions("finequant"),
    "both": QuantizationOptions("finequant+easyquant"),
    "both_2.5": QuantizationOptions("finequant+easyquant", sigma=2.5),
}
QUICK_CHOICES = ("int8", "finequant", "easyquant", "both_2.5")


@torch.inference_mode()
def perplexity(model: Any, texts: Sequence[list[int]]) -> float:
    """exp of the mean negative log-likelihood in nats; a window's first token is given."""
    total = 0.0
    for ids in texts:
        logits = model(torch.tensor([ids])).logits[0, :-1]
        total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum"))
    return math.exp(total / sum(len(ids) - 1 for ids in texts))


def measure(model: Any, originals: dict[str, torch.Tensor], options: QuantizationOptions) -> dict[str, Any]:
    """Quantize the model's linear maps in place; bits, outliers, group sizes, error and seconds."""
    seconds = bits = outliers = error = energy = 0.0
    sizes: dict[str, int] = {}
    for name, weights in originals.items():
        start = time.perf_counter()
        matrix = quantize(weights, options)
        seconds += time.perf_counter() - start
        bits += matrix.bits_per_weight * weights.numel()
        outliers += matrix.outlier_share * weights.numel()
        size = str(matrix.group_size) if options.chooses_groups or options.group_size else "channel"
        sizes[size] = sizes.get(size, 0) + 1
        back = matrix.dequantize()
        error += float((back - weights).square().sum())
        energy += float(weights.square().sum())
        model.get_submodule(name).weight.data.copy_(back)
    total = sum(weights.numel() for weights in originals.values())
    return {
        "options": options.to_values(),
        "bits": round(bits / total, 4),
        "outlier_share": round(outliers / total, 6),
        "matrices_by_group_size": sizes,
        "relative_error": round(math.sqrt(error / energy), 5),
        "seconds": round(seconds, 2),
        "weights": total,
    }


def read_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help=f"folder with {WIKITEXT}; default: $GALLEY_DATA")
    parser.add_argument("--windows", type=int, help=f"of {WINDOW_TOKENS} tokens; default {WINDOWS}")
    parser.add_argument("--choices", help=f"comma-separated; default {','.join(CHOICES)}")
    parser.add_argument("--quick", action="store_true", help="one window, fewer choices")
    options = parser.parse_args(arguments)
    options.windows = options.windows or (QUICK_WINDOWS if options.quick else WINDOWS)
    chosen = options.choices.split(",") if options.choices else (QUICK_CHOICES if options.quick else CHOICES)
    unknown = sorted(set(chosen) - set(CHOICES))
    if unknown:
        parser.error(f"--choices: found {', '.join(unknown)}, expected some of {', '.join(CHOICES)}")
    options.choices = list(chosen)
    if options.windows < 1:
        parser.error(f"--windows: found {options.windows}, expected at least 1")
    options.data = options.data or (Path(os.environ["GALLEY_DATA"]) if "GALLEY_DATA" in os.environ else None)
    if options.data is None or not (options.data / WIKITEXT).is_file():
        parser.error(f"--data: expected a folder with {WIKITEXT}, or GALLEY_DATA that names one")
    return options


def main() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = read_options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    name = "bench_quantization.quick" if options.quick else "bench_quantization"
    report = Report(name, {**vars(options), "data": options.data.name})
    folder = resolve(MODEL)
    text = (options.data / WIKITEXT).read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(folder)(text, verbose=False)["input_ids"]
    texts = windows(ids, options.windows, WINDOW_TOKENS)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    originals = {
        name: module.weight.detach().clone()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in name
    }
    quantize(next(iter(originals.values()))[:8], CHOICES["both"])  # compiles
    figures: dict[str, Any] = {"ppl_fp": round(perplexity(model, texts), 4)}
    console.print(f"fp: {figures['ppl_fp']}")
    rows = {}
    for choice in options.choices:
        rows[choice] = row = measure(model, originals, CHOICES[choice])
        row["perplexity"] = round(perplexity(model, texts), 4)
        figures |= {f"ppl_{choice}": row["perplexity"], f"bits_{choice}": row["bits"]}
        figures[f"seconds_{choice}"] = row["seconds"]
        console.print(f"{choice}: {row['perplexity']} at {row['bits']} bits, {row['seconds']} s")
    report.add("choices", rows)
    report.finish(figures)


if __name__ == "__main__":
    main()
