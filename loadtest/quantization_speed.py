"""Tokens a second through servers with 4-bit weights and without: one chat at a time, and eight at once.

The servers take turns (loadtest/turns.py). No prompt is asked twice, so that nobody answers from a cache or
drafts from an earlier answer to the same question.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from loadtest.quantization_peers import GGUF, PACKAGE, SLOT_TOKENS, SLOTS, gguf, llama_server
from loadtest.quantize_seconds import quantize
from loadtest.servers import Server, galley_worker, plain_vllm
from loadtest.turns import CLIENTS, Wave

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

SETTINGS: dict[str, Any] = {
    "max-model-len": 2048,
    "max-num-seqs": 16,
    "kv-cache-memory-bytes": 512 * 2**20,
}
INT4 = {"method": "finequant"}
HYBRID = {"method": "hybrid"}
BASE, PEER, OURS, DRAFTING = "vllm_bf16", "llama_cpp", "galley_int4", "galley_int4_hybrid"
COMPILED = "vllm_bf16_compiled"
CALIBRATED, CALIBRATED_DRAFTING = "galley_int4_calibrated", "galley_int4_calibrated_hybrid"
CALIBRATION = ("finequant+easyquant", "--self-calibrate")
FLOAT_BASE, FLOAT, FLOAT_DRAFTING = "vllm_float32", "galley_float32", "galley_float32_hybrid"
SERVERS = (BASE, PEER, OURS, DRAFTING)
EVERY = (*SERVERS, COMPILED, CALIBRATED, CALIBRATED_DRAFTING, FLOAT_BASE, FLOAT, FLOAT_DRAFTING)


@contextlib.contextmanager
def serving(name: str) -> Iterator[Server]:
    int4 = ("--quantization", json.dumps(INT4))
    if name in (BASE, COMPILED):
        scope = plain_vllm({**SETTINGS, "dtype": "bfloat16"}, compiled=name == COMPILED)
    elif name == FLOAT_BASE:
        scope = plain_vllm({**SETTINGS, "dtype": "float32"})
    elif name in (FLOAT, FLOAT_DRAFTING):
        drafts = ("--speculation", json.dumps(HYBRID)) if name == FLOAT_DRAFTING else ()
        scope = galley_worker({**SETTINGS, "dtype": "float32"}, *drafts)
    elif name in (CALIBRATED, CALIBRATED_DRAFTING):
        drafts = ("--speculation", json.dumps(HYBRID)) if name == CALIBRATED_DRAFTING else ()
        scope = _calibrated(*drafts)
    elif name == PEER:
        scope = llama_server(gguf())
    elif name == OURS:
        scope = galley_worker(SETTINGS, *int4)
    else:
        scope = galley_worker(SETTINGS, *int4, "--speculation", json.dumps(HYBRID))
    with scope as server:
        yield server


@contextlib.contextmanager
def _calibrated(*flags: str) -> Iterator[Server]:
    with tempfile.TemporaryDirectory(prefix="galley-quantize-") as place:
        method, *options = CALIBRATION
        quantize(method, Path(place) / "out", *options)
        with galley_worker(SETTINGS, *flags, weights=f"{place}/out") as server:
            yield server


def settings(max_tokens: int) -> dict[str, Any]:
    """All that the servers were told."""
    return {
        "engine": SETTINGS,
        "quantization": INT4,
        "calibrated": " ".join(CALIBRATION),
        "speculation": HYBRID,
        "max_tokens": max_tokens,
        "llama_cpp": {"package": PACKAGE, "model": GGUF, "slots": SLOTS, "slot_tokens": SLOT_TOKENS},
    }


def figures_of(waves: Sequence[Wave]) -> dict[str, float]:
    """Medians of each server and load, and ratios of waves of the same prompts."""
    speeds: dict[tuple[str, str], list[float]] = {}
    for wave in waves:
        speeds.setdefault((wave.server, wave.load), []).append(wave.speed)
    found = {
        f"tokens_per_second_{server}_{load}": round(median(own), 2) for (server, load), own in speeds.items()
    }
    ratios = {
        "int4_speedup": (OURS, BASE),
        "int4_hybrid_speedup": (DRAFTING, BASE),
        "int4_over_compiled": (OURS, COMPILED),
        "int4_over_llamacpp": (OURS, PEER),
        "float32_speedup": (FLOAT, FLOAT_BASE),
        "float32_hybrid_speedup": (FLOAT_DRAFTING, FLOAT_BASE),
        "float32_hybrid_over_none": (FLOAT_DRAFTING, FLOAT),
        "int4_hybrid_over_none": (DRAFTING, OURS),
        "over_llamacpp": (DRAFTING, PEER),
        "calibrated_over_compiled": (CALIBRATED, COMPILED),
        "calibrated_over_llamacpp": (CALIBRATED_DRAFTING, PEER),
        "calibrated_over_int4": (CALIBRATED, OURS),
    }
    for name, (ours, theirs) in ratios.items():
        for load in CLIENTS:
            pairs = list(zip(speeds.get((ours, load), []), speeds.get((theirs, load), []), strict=False))
            if pairs:
                found[f"{name}_{load}"] = round(median(our / their for our, their in pairs), 3)
    return found
