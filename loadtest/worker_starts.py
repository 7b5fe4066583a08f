"""Seconds until a worker is ready: without torch.compile, and with it from an empty cache and a full one."""

from __future__ import annotations

import tempfile
import time
from statistics import median
from typing import TYPE_CHECKING, Any

from loadtest.servers import galley_worker

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

SETTINGS: dict[str, Any] = {
    "dtype": "bfloat16",
    "max-model-len": 2048,
    "max-num-seqs": 16,
    "kv-cache-memory-bytes": 512 * 2**20,
}
EAGER, COLD, WARM = "eager", "cold", "warm"


def start(name: str, cache: str) -> dict[str, Any]:
    """
    Args:
        cache: a folder for compiled code; empty for `cold`.
    """
    begin = time.perf_counter()
    flags = ("--compile", "off" if name == EAGER else "on")
    places = {"VLLM_CACHE_ROOT": f"{cache}/vllm", "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor"}
    with galley_worker(SETTINGS, *flags, env=places) as server:
        ready = time.perf_counter()
        server.chat("Say hello.", max_tokens=8)
        answered = time.perf_counter()
    return {"start": name, "seconds": round(ready - begin, 2), "answer_seconds": round(answered - ready, 2)}


def measure(repeats: int) -> Iterator[dict[str, Any]]:
    """All three, then all three again with a new cache."""
    for repeat in range(repeats):
        with tempfile.TemporaryDirectory(prefix="galley-compiled-") as cache:
            for name in (EAGER, COLD, WARM):
                yield {**start(name, cache), "repeat": repeat}


def figures_of(runs: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Medians, and the ratio of a warm start to one without torch.compile in the same repeat."""
    of = {name: [run["seconds"] for run in runs if run["start"] == name] for name in (EAGER, COLD, WARM)}
    ratios = [warm / eager for warm, eager in zip(of[WARM], of[EAGER], strict=True)]
    return {f"start_seconds_{name}": round(median(own), 2) for name, own in of.items()} | {
        "start_warm_over_eager": round(median(ratios), 3)
    }
