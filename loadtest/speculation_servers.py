"""The servers that speculation is measured on: Galley's methods, vLLM's own, and vLLM without any."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from typing import TYPE_CHECKING, Any

from loadtest.harness import versions
from loadtest.servers import Server, galley_worker, plain_vllm
from loadtest.suffix_peer import suffix_peer_path

if TYPE_CHECKING:
    from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")

# What Galley and vLLM choose differently is set for both; 2048 is vLLM's own number for a CPU.
SETTINGS: dict[str, Any] = {
    "dtype": "float32",
    "max-model-len": 4096,
    "max-num-seqs": 16,
    "max-num-batched-tokens": 2048,
    "kv-cache-memory-bytes": 1024**3,
}
PEERS: dict[str, dict[str, Any]] = {
    "ngram": {
        "method": "ngram",
        "num_speculative_tokens": 8,
        "prompt_lookup_min": 2,
        "prompt_lookup_max": 4,
    },
    "suffix": {"method": "suffix", "num_speculative_tokens": 8},
}
BASE, OURS, WARM = "none", "hybrid", "-warm"
OWN_BASE = "galley-none"  # Galley's worker, whose steps are quicker than vLLM's on a CPU, without speculation
GALLEY = ("trigram", "recycling", "prompt-lookup", OURS, "self")
METHODS = (
    BASE,
    OWN_BASE,
    *PEERS,
    *(name for name in GALLEY if name != "self"),
    OURS + WARM,
)  # measured by default


def settings_of(content: bytes, **own: Any) -> dict[str, Any]:
    """All that answers depend on: the engine, versions, the file of prompts (`content`) and a run's `own`."""
    return {
        **own,
        "engine": SETTINGS,
        "data_sha256": hashlib.sha256(content).hexdigest(),
        "versions": versions(),
    }


def speculation_of(method: str) -> dict[str, Any] | None:
    """What a method's server is told: vLLM's `speculative-config`, or Galley's `speculation`."""
    kind = method.removesuffix(WARM)
    return PEERS.get(kind) or ({"method": kind} if kind in GALLEY else None)


@contextlib.contextmanager
def serving(method: str) -> Iterator[tuple[Server, float]]:
    """The method's server, and the seconds until it was ready."""
    kind = method.removesuffix(WARM)
    environment = {}
    if kind == "suffix":
        others = os.environ.get("PYTHONPATH")
        environment["PYTHONPATH"] = os.pathsep.join([str(suffix_peer_path()), *([others] if others else [])])
    start = time.monotonic()
    if kind in (*GALLEY, OWN_BASE):
        ours = speculation_of(kind)
        drafts = ("--speculation", json.dumps(ours)) if ours else ()
        scope = galley_worker(SETTINGS, "--compile", "off", *drafts)
    else:
        config = speculation_of(kind)
        scope = plain_vllm({**SETTINGS, **({"speculative-config": config} if config else {})}, environment)
    with scope as server:
        yield server, time.monotonic() - start
