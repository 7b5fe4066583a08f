#!/usr/bin/env python
"""What weight-only quantization costs SmolLM2-135M and what it brings: perplexity, bits, seconds, and speed.

Perplexity is of WikiText-2's test text, over windows of 1024 tokens one behind the other. The weights of the
decoder layers' linear maps are quantized and put back as what they stand for; embeddings, norms and the
output layer stay. The model runs in transformers, in float32. Bits count codes, scales, and of outliers
values, columns and the starts of rows.

Speed is tokens a second through servers (loadtest/quantization_speed.py), prompts of Spec-Bench, one chat
after the other (b1) and eight at once (c8): vLLM in bfloat16, llama.cpp with the model's own Q4_1 file, and
Galley with 4-bit weights by FineQuant, quantized while loading, without and with drafts.

Figures:
    ppl_*              perplexity; fp is of the weights as they came, served is of Galley's 4-bit server over
                       the first two windows, activations being integers and the output layer of 8 bits
    bits_*             bits per quantized weight
    seconds_*          to quantize all of them
    int4_speedup_*     Galley's 4-bit server over vLLM in bfloat16
    over_llamacpp_*    the same with drafts, over llama.cpp
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
from galley_plugins.quantization.perplexity import perplexity, windows
from galley_plugins.quantization.quantizer import quantize
from loadtest import quantization_speed as speed
from loadtest.harness import Report, console
from loadtest.perplexity import perplexity as served_perplexity
from loadtest.servers import MODEL
from loadtest.specbench import in_turn, load_prompts

if TYPE_CHECKING:
    from collections.abc import Sequence

WIKITEXT = Path("lm") / "wikitext2_test.txt"
SPEC_BENCH = Path("spec") / "specbench.jsonl"
WINDOWS, QUICK_WINDOWS, WINDOW_TOKENS = 16, 1, 1024
SECTIONS = ("perplexity", "speed")
PER_WAVE, QUICK_PER_WAVE = {"b1": 3, "c8": 8}, {"b1": 1, "c8": 8}
REPEATS, MAX_TOKENS, QUICK_MAX_TOKENS = 3, 64, 24
CHOICES: dict[str, QuantizationOptions] = {
    "int8": QuantizationOptions("rtn", bits=8),
    "rtn_channel": QuantizationOptions("rtn"),
    "easyquant": QuantizationOptions("easyquant"),
    "rtn_g64": QuantizationOptions("rtn", group_size=64),
    "rtn_g32": QuantizationOptions("rtn", group_size=32),
    "finequant": QuantizationOptions("finequant"),
    "both": QuantizationOptions("finequant+easyquant"),
    "both_2.5": QuantizationOptions("finequant+easyquant", sigma=2.5),
    "both_g32": QuantizationOptions("finequant+easyquant", group_sizes=(32,)),
}
QUICK_CHOICES = ("int8", "finequant", "easyquant", "both")


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
    parser.add_argument("--only", help=f"comma-separated sections; default {','.join(SECTIONS)}")
    parser.add_argument("--servers", help=f"comma-separated; default {','.join(speed.SERVERS)}")
    parser.add_argument("--repeats", type=int, help=f"waves of prompts for each load; default {REPEATS}")
    parser.add_argument("--quick", action="store_true", help="one window, fewer choices, few short answers")
    options = parser.parse_args(arguments)
    for name, known in (("only", SECTIONS), ("servers", speed.SERVERS)):
        given = getattr(options, name)
        setattr(options, name, list(known) if given is None else given.split(","))
        if unknown := sorted(set(getattr(options, name)) - set(known)):
            parser.error(f"--{name}: found {', '.join(unknown)}, expected some of {', '.join(known)}")
    options.repeats = options.repeats or (1 if options.quick else REPEATS)
    options.windows = options.windows or (QUICK_WINDOWS if options.quick else WINDOWS)
    chosen = options.choices.split(",") if options.choices else (QUICK_CHOICES if options.quick else CHOICES)
    unknown = sorted(set(chosen) - set(CHOICES))
    if unknown:
        parser.error(f"--choices: found {', '.join(unknown)}, expected some of {', '.join(CHOICES)}")
    options.choices = list(chosen)
    if options.windows < 1:
        parser.error(f"--windows: found {options.windows}, expected at least 1")
    options.data = options.data or (Path(os.environ["GALLEY_DATA"]) if "GALLEY_DATA" in os.environ else None)
    for path in (WIKITEXT, SPEC_BENCH) if "speed" in options.only else (WIKITEXT,):
        if options.data is None or not (options.data / path).is_file():
            parser.error(f"--data: expected a folder with {path}, or GALLEY_DATA that names one")
    return options


def measure_choices(report: Report, texts: Sequence[list[int]], choices: Sequence[str]) -> dict[str, Any]:
    """Perplexity, bits and seconds of each choice."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(resolve(MODEL), dtype=torch.float32).eval()
    originals = {
        name: module.weight.detach().clone()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in name
    }
    quantize(next(iter(originals.values()))[:8], CHOICES["both"])  # compiles
    figures: dict[str, Any] = {"ppl_fp": round(perplexity(model, texts), 4)}
    console.print(f"fp: {figures['ppl_fp']}")
    rows = {}
    for choice in choices:
        rows[choice] = row = measure(model, originals, CHOICES[choice])
        row["perplexity"] = round(perplexity(model, texts), 4)
        figures |= {f"ppl_{choice}": row["perplexity"], f"bits_{choice}": row["bits"]}
        figures[f"seconds_{choice}"] = row["seconds"]
        console.print(f"{choice}: {row['perplexity']} at {row['bits']} bits, {row['seconds']} s")
    report.add("choices", rows)
    return figures


def measure_speed(report: Report, texts: Sequence[list[int]], options: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second through servers, and the perplexity of Galley's."""
    lines = (options.data / SPEC_BENCH).read_text(encoding="utf-8").splitlines()
    prompts = in_turn(list(load_prompts(lines).values()))
    per_wave, tokens = (QUICK_PER_WAVE, QUICK_MAX_TOKENS) if options.quick else (PER_WAVE, MAX_TOKENS)
    waves, figures = [], {}
    with speed.all_serving(options.servers) as servers:
        if speed.OURS in servers:
            with speed.awake(servers[speed.OURS]):
                figures["ppl_served"] = round(served_perplexity(servers[speed.OURS], texts[:2]), 4)
        for wave in speed.measure(servers, prompts, per_wave, options.repeats, tokens):
            waves.append(wave)
            console.print(f"{wave.server}, {wave.load}: {wave.speed:.1f} tokens/s")
    report.add("speed", {"settings": speed.settings(tokens), "waves": speed.values_of(waves)})
    return figures | speed.figures_of(waves)


def main() -> None:
    from transformers import AutoTokenizer

    options = read_options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    name = "bench_quantization.quick" if options.quick else "bench_quantization"
    if options.only == ["speed"]:
        name += ".speed"
    report = Report(name, {**vars(options), "data": options.data.name})
    text = (options.data / WIKITEXT).read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(resolve(MODEL))(text, verbose=False)["input_ids"]
    texts = windows(ids, options.windows, WINDOW_TOKENS)
    figures: dict[str, Any] = {}
    if "perplexity" in options.only:
        figures |= measure_choices(report, texts, options.choices)
    if "speed" in options.only:
        figures |= measure_speed(report, texts, options)
    report.finish(figures)


if __name__ == "__main__":
    main()
