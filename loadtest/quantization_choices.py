"""Ways to quantize a model's linear maps, Galley's and llm-compressor's: perplexity, bits and seconds."""

from __future__ import annotations

import math
import time
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from galley_plugins.models import resolve
from galley_plugins.quantization.options import QuantizationOptions
from galley_plugins.quantization.perplexity import perplexity
from galley_plugins.quantization.quantizer import quantize
from loadtest import llmcompressor_peer
from loadtest.llmcompressor_peer import PeerOptions
from loadtest.servers import MODEL

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from galley_plugins.quantization.matrix import QuantizedMatrix

Weights = dict[str, torch.Tensor]

CHOICES: dict[str, QuantizationOptions | PeerOptions] = {
    "int8": QuantizationOptions("rtn", bits=8),
    "rtn_channel": QuantizationOptions("rtn"),
    "llmcompressor_rtn_channel": PeerOptions("rtn"),
    "gptq_channel": PeerOptions("gptq"),
    "easyquant": QuantizationOptions("easyquant"),
    "rtn_g64": QuantizationOptions("rtn", group_size=64),
    "llmcompressor_rtn_g64": PeerOptions("rtn", group_size=64),
    "gptq_g64": PeerOptions("gptq", group_size=64),
    "easyquant_g64": QuantizationOptions("easyquant", group_size=64),
    "rtn_g32": QuantizationOptions("rtn", group_size=32),
    "llmcompressor_rtn_g32": PeerOptions("rtn", group_size=32),
    "gptq_g32": PeerOptions("gptq", group_size=32),
    "finequant": QuantizationOptions("finequant"),
    "both": QuantizationOptions("finequant+easyquant"),
    "both_2.5": QuantizationOptions("finequant+easyquant", sigma=2.5),
    "both_g32": QuantizationOptions("finequant+easyquant", group_sizes=(32,)),
}
"""Groups of 128 are none of them: they do not divide the built-in model's 576 inputs."""

QUICK_CHOICES = ("int8", "finequant", "easyquant", "both")


def linear_maps(model: Any) -> Weights:
    """Weights of the decoder layers' linear maps by module, copied."""
    return {
        name: module.weight.detach().clone()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in name
    }


def timed(originals: Weights, options: QuantizationOptions) -> Iterator[tuple[str, QuantizedMatrix, float]]:
    """Each matrix quantized, and the seconds it took."""
    for name, weights in originals.items():
        start = time.perf_counter()
        matrix = quantize(weights, options)
        yield name, matrix, time.perf_counter() - start


def measure(model: Any, originals: Weights, options: QuantizationOptions) -> dict[str, Any]:
    """Quantize the model's linear maps in place; bits, outliers, group sizes, error and seconds."""
    seconds = bits = outliers = 0.0
    sizes: dict[str, int] = {}
    made: Weights = {}
    for name, matrix, taken in timed(originals, options):
        seconds += taken
        bits += matrix.bits_per_weight * matrix.codes.numel()
        outliers += matrix.outlier_share * matrix.codes.numel()
        size = str(matrix.group_size) if options.chooses_groups or options.group_size else "channel"
        sizes[size] = sizes.get(size, 0) + 1
        made[name] = matrix.dequantize()
    total = sum(weights.numel() for weights in originals.values())
    return {
        "options": options.to_values(),
        "bits": round(bits / total, 4),
        "outlier_share": round(outliers / total, 6),
        "matrices_by_group_size": sizes,
        "relative_error": put(model, originals, made),
        "seconds": round(seconds, 2),
        "weights": total,
    }


def measure_peer(
    model: Any, originals: Weights, options: PeerOptions, sequences: Sequence[list[int]]
) -> dict[str, Any]:
    """The same of llm-compressor; beside what takes data, EasyQuant's seconds before and after it.

    Raises:
        PeerError: it is not there, or failed.
    """
    ours = QuantizationOptions("easyquant", group_size=options.group_size)
    with_data = options.method == "gptq"

    def easyquant() -> list[tuple[float, float]]:
        """By the clock and of all cores."""
        start = time.process_time()
        taken = sum(taken for _, _, taken in timed(originals, ours)) if with_data else 0.0
        return [(taken, time.process_time() - start)]

    before = easyquant()
    found = llmcompressor_peer.quantized(resolve(MODEL), options, sequences)
    beside = before + easyquant()
    total = sum(weights.numel() for weights in originals.values())
    bits = sum(options.bits_per_weight(weights.shape[1]) * weights.numel() for weights in originals.values())
    row: dict[str, Any] = {
        "package": llmcompressor_peer.PACKAGE,
        "options": vars(options),
        "bits": round(bits / total, 4),
        "relative_error": put(model, originals, found.weights),
        "seconds": round(found.seconds, 2),
        "cpu_seconds": round(found.cpu_seconds, 2),
        "threads": found.threads,
        "weights": total,
    }
    if with_data:
        row |= {
            "sequences": len(sequences),
            "sequence_tokens": len(sequences[0]),
            "easyquant_seconds": [round(clock, 2) for clock, _ in beside],
            "easyquant_threads": torch.get_num_threads(),
            "easyquant_cpu_seconds": [round(processor, 2) for _, processor in beside],
            "over_easyquant": round(found.seconds / median(clock for clock, _ in beside), 2),
            "cpu_over_easyquant": round(found.cpu_seconds / median(used for _, used in beside), 2),
        }
    return row


def put(model: Any, originals: Weights, made: Weights) -> float:
    """Give the model these weights; the error's Frobenius norm over that of all weights.

    Raises:
        ValueError: they are not of the modules that they should be.
    """
    if set(made) != set(originals):
        raise ValueError(f"found weights of {len(made)} modules, expected {len(originals)}")
    error = energy = 0.0
    for name, original in originals.items():
        error += float((made[name] - original).square().sum())
        energy += float(original.square().sum())
        model.get_submodule(name).weight.data.copy_(made[name])
    return round(math.sqrt(error / energy), 5)


def measure_all(
    texts: Sequence[list[int]], sequences: Sequence[list[int]], choices: Sequence[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The full weights as `fp`, then each choice.

    Args:
        texts: token ids whose perplexity is measured.
        sequences: those that GPTQ takes.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(resolve(MODEL), dtype=torch.float32).eval()
    originals = linear_maps(model)
    quantize(next(iter(originals.values()))[:8], QuantizationOptions())  # compiles
    full = perplexity(model, texts)
    yield "fp", {"bits": 16.0, "perplexity": round(full, 4)}
    for choice in choices:
        options = CHOICES[choice]
        if isinstance(options, PeerOptions):
            row = measure_peer(model, originals, options, sequences)
        else:
            row = measure(model, originals, options)
        found = perplexity(model, texts)
        yield choice, {**row, "perplexity": round(found, 4), "ratio": round(found / full, 4)}


def figures_of(choice: str, row: dict[str, Any]) -> dict[str, float]:
    found = {f"ppl_{choice}": row["perplexity"]}
    for figure in ("bits", "seconds"):
        if choice != "fp":
            found[f"{figure}_{choice}"] = row[figure]
    if "over_easyquant" in row:
        found[f"seconds_over_easyquant_{choice}"] = row["over_easyquant"]
        found[f"cpu_seconds_over_easyquant_{choice}"] = row["cpu_over_easyquant"]
    return found
