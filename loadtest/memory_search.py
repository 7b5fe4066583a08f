"""What a token costs: a memory's network, against kNN-LM's search over ever more entries.

Keys of large datastores are synthetic: an exact search takes the same time whatever they are.
"""

from __future__ import annotations

import time
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from galley_kernels import mix_log_probs
from galley_plugins.memory.building.teacher import distributions
from galley_plugins.memory.network import MemoryNetwork, Sizes
from loadtest.harness import console

if TYPE_CHECKING:
    from collections.abc import Sequence

NEIGHBOURS, TEMPERATURE, WEIGHT = 1024, 2.0, 0.25
ROWS = (1, 8)
MEMORY_CALLS = 20
_BLOCK = 200_000


def synthetic(entries: int, width: int, seed: int = 0) -> np.ndarray:
    """float32 [entries, width]; blocks are one another's multiples."""
    block = np.random.default_rng(seed).standard_normal((min(_BLOCK, entries), width), np.float32)
    keys = np.empty((entries, width), np.float32)
    for number, start in enumerate(range(0, entries, len(block))):
        part = keys[start : start + len(block)]
        np.multiply(block[: len(part)], 1 + number / 100, out=part)
    return keys


def measure(
    entries: Sequence[int], repeats: int, sizes: Sizes, vocabulary: int, *, quantized: bool
) -> dict[str, Any]:
    """Milliseconds of each repeat by datastore, and of the memory beside it, both with their mix.

    Args:
        quantized: an IVF-PQ index over each datastore too.
    """
    import faiss

    network = MemoryNetwork(sizes).initialize(0).eval().requires_grad_(False)
    columns = torch.arange(sizes.outputs)
    rng = np.random.default_rng(1)
    queries = rng.standard_normal((max(ROWS), sizes.inputs), np.float32)
    logits = torch.randn(max(ROWS), vocabulary)
    rows: list[dict[str, Any]] = []
    for count in entries:
        keys = synthetic(count, sizes.inputs)
        values = rng.integers(0, vocabulary, count).astype(np.int32)
        index = _quantized(keys) if quantized else None
        for repeat in range(repeats):
            for batch in ROWS:
                states, own = queries[:batch], logits[:batch]
                row = {"entries": count, "rows": batch, "repeat": repeat}
                row["memory_ms"] = _memory(network, states, own, columns)
                row["exact_ms"] = _retriever(
                    lambda states=states, keys=keys: faiss.knn(states, keys, NEIGHBOURS), values, own
                )
                if index is not None:
                    row["ivf_pq_ms"] = _retriever(
                        lambda states=states, index=index: index.search(states, NEIGHBOURS), values, own
                    )
                rows.append(row)
                console.print({key: round(value, 3) for key, value in row.items()})
        del keys
    return {"neighbours": NEIGHBOURS, "sizes": vars(sizes), "rows": rows}


def figures_of(found: dict[str, Any]) -> dict[str, float]:
    """Medians of ratios, and of the memory's milliseconds at each size of the datastore."""
    figures: dict[str, float] = {}
    for count in dict.fromkeys(row["entries"] for row in found["rows"]):
        name = f"{count // 1_000_000}m" if count >= 1_000_000 else f"{count // 1000}k"
        for batch in ROWS:
            rows = [row for row in found["rows"] if (row["entries"], row["rows"]) == (count, batch)]
            end = "" if batch == 1 else f"_rows{batch}"
            for kind, key in (("knn", "exact_ms"), ("ivf_pq", "ivf_pq_ms")):
                if key in rows[0]:
                    ratio = median(row[key] / row["memory_ms"] for row in rows)
                    figures[f"over_{kind}_{name}{end}"] = round(ratio, 1)
            figures[f"memory_ms_{name}{end}"] = round(median(row["memory_ms"] for row in rows), 3)
    return figures


@torch.inference_mode()
def _memory(network: MemoryNetwork, states: np.ndarray, own: torch.Tensor, columns: torch.Tensor) -> float:
    weight = torch.full((len(own),), WEIGHT)
    rows = torch.from_numpy(states)
    times = []
    for _ in range(MEMORY_CALLS):
        start = time.perf_counter()
        mix_log_probs(own, network(rows), weight, columns=columns)
        times.append(1000 * (time.perf_counter() - start))
    return median(times)


def _retriever(search: Any, values: np.ndarray, own: torch.Tensor) -> float:
    weight = torch.full((len(own),), WEIGHT)
    start = time.perf_counter()
    distances, entries = search()
    counts, tokens, probs = distributions(distances, values[np.maximum(entries, 0)], TEMPERATURE)
    logits = torch.full_like(own, -torch.inf)
    owners = torch.from_numpy(np.repeat(np.arange(len(counts)), counts))
    logits[owners, torch.from_numpy(tokens.astype(np.int64))] = torch.from_numpy(probs).log()
    mix_log_probs(own, logits, weight)
    return 1000 * (time.perf_counter() - start)


def _quantized(keys: np.ndarray) -> Any:
    """As `galley memory index` makes it."""
    import faiss

    from galley_plugins.memory.building.neighbours import CENTROIDS, CODE_BYTES, PROBES, TRAINED_ON

    entries, width = keys.shape
    centroids = min(CENTROIDS, entries // TRAINED_ON)
    index = faiss.IndexIVFPQ(faiss.IndexFlatL2(width), width, centroids, CODE_BYTES, 8)
    index.train(keys[:: max(entries // (TRAINED_ON * centroids), 1)])
    index.add(keys)
    index.nprobe = PROBES
    return index
