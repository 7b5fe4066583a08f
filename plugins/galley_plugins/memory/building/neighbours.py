"""The nearest keys of a datastore: exactly up to a million entries, above by product quantization (FAISS).

Distances are squared and Euclidean, as in kNN-LM. The exact search reads the datastore in blocks, so that it
need not fit into memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from galley_plugins.memory.building.stages import StageError, explained

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    from galley_plugins.memory.building.stages import Stage

INDEX = "index.faiss"
MOST_EXACT = 1_000_000
CENTROIDS, CODE_BYTES, PROBES = 4096, 64, 32  # MLP Memory's code, knn_utils/build_index.py
CODES = 256  # of a byte; product quantization learns them from as many keys
TRAINED_ON = 64  # keys for each centroid
BLOCK_BYTES = 1 << 30  # of keys in float32 at once
Kind = Literal["flat", "ivf-pq"]


def kind_of(entries: int) -> Kind:
    return "flat" if entries < MOST_EXACT else "ivf-pq"


def build_index(
    stage: Stage, keys: NDArray[np.float16], kind: Kind, advance: Callable[[int], None] = lambda rows: None
) -> None:
    """Write an index of [entries, width] keys; a flat one is the datastore itself and nothing more.

    Raises:
        StageError: there are too few keys for a code, or the disk has no room.
    """
    stage.begin()
    if kind == "flat":
        advance(len(keys))
        stage.finish({"kind": kind, "entries": len(keys)})
        return
    import faiss

    entries, width = keys.shape
    if entries < CODES:
        raise StageError(f"index: found {entries} entries, expected {CODES} or more for ivf-pq")
    centroids = min(CENTROIDS, max(entries // TRAINED_ON, 1))
    code = max(part for part in range(1, min(CODE_BYTES, width) + 1) if width % part == 0)
    quantizer = faiss.IndexFlatL2(width)
    index = faiss.IndexIVFPQ(quantizer, width, centroids, code, CODES.bit_length() - 1)
    rows = np.random.default_rng(0).choice(entries, min(entries, TRAINED_ON * centroids), replace=False)
    index.train(keys[np.sort(rows)].astype(np.float32))
    block = _rows(width)
    for start in range(0, entries, block):
        part = keys[start : start + block].astype(np.float32)
        index.add(part)
        advance(len(part))
    index.nprobe = min(PROBES, centroids)
    path = stage.folder / f"{INDEX}.partial"
    with explained(path), path.open("wb") as file:
        faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))  # type: ignore[attr-defined]
    parameters = {"centroids": centroids, "code_bytes": code, "probes": index.nprobe}
    stage.finish({"kind": kind, "entries": entries, **parameters})


class Neighbours:
    """Searches a datastore.

    Args:
        keys: float16 [entries, width], in memory or mapped.
        index: file of an index; None searches exactly.
        device: of the exact search.
    """

    def __init__(
        self, keys: NDArray[np.float16], index: Path | None = None, device: torch.device | None = None
    ) -> None:
        self._keys = keys
        self._index: Any = None
        self._device = device or torch.device("cpu")
        self._resident: torch.Tensor | None = None
        if self._device.type == "cuda" and keys.nbytes < torch.cuda.mem_get_info(self._device)[0] // 4:
            self._resident = torch.from_numpy(np.array(keys)).to(self._device)
        if index is not None:
            import faiss

            self._index = faiss.read_index(str(index))

    @classmethod
    def of(cls, stage: Stage, keys: NDArray[np.float16], device: torch.device) -> Neighbours:
        """As `build_index` left it."""
        flat = stage.result["kind"] == "flat"
        return cls(keys, None if flat else stage.folder / INDEX, device)

    def search(self, queries: NDArray[Any], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """[queries, k] distances, rising, and entries; entry -1, infinitely far, where there are fewer.

        Args:
            queries: floating [queries, width].
        """
        wide = np.ascontiguousarray(queries, np.float32)
        if self._index is not None:
            distances, entries = self._index.search(wide, k)
            return np.where(entries < 0, np.inf, distances), entries
        if self._device.type == "cuda":
            return self._on_device(wide, k)
        return self._by_blocks(wide, k)

    def _by_blocks(
        self, queries: NDArray[np.float32], k: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        import faiss

        best: Any = None
        block = _rows(self._keys.shape[1])
        for start in range(0, len(self._keys), block):
            part = self._keys[start : start + block].astype(np.float32)
            found = faiss.knn(queries, part, min(k, len(part)))
            best = _nearest(best, (found[0], found[1] + start), k)
        distances, entries = best
        return _filled(distances, entries, k)

    def _on_device(
        self, queries: NDArray[np.float32], k: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        best: Any = None
        rows = torch.from_numpy(queries).to(self._device)
        block = _rows(self._keys.shape[1])
        for start in range(0, len(self._keys), block):
            part = self._part(start, start + block)
            squares = (part * part).sum(1)
            found = []
            for row in range(0, len(rows), 2048):
                own = rows[row : row + 2048]
                distances = squares - 2 * (own @ part.T) + (own * own).sum(1, keepdim=True)
                found.append(distances.topk(min(k, len(part)), largest=False))
            distances = torch.cat([pair[0] for pair in found]).clamp_(min=0).cpu().numpy()
            places = torch.cat([pair[1] for pair in found]).cpu().numpy() + start
            best = _nearest(best, (distances, places), k)
        distances, entries = best
        return _filled(distances, entries, k)

    def _part(self, start: int, stop: int) -> torch.Tensor:
        """float32 [rows, width] on the device."""
        if self._resident is not None:
            return self._resident[start:stop].float()
        return torch.from_numpy(np.array(self._keys[start:stop])).to(self._device).float()


def _nearest(best: Any, more: Any, k: int) -> Any:
    """The k nearest of two lists of [queries, n] distances and entries, nearest first."""
    if best is None:
        return more
    distances, entries = (np.concatenate(pair, axis=1) for pair in zip(best, more, strict=True))
    nearest = torch.from_numpy(distances).topk(min(k, distances.shape[1]), largest=False)
    return nearest.values.numpy(), np.take_along_axis(entries, nearest.indices.numpy(), 1)


def _filled(
    distances: NDArray[np.float32], entries: NDArray[np.int64], k: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    missing = ((0, 0), (0, k - distances.shape[1]))
    return (
        np.pad(distances, missing, constant_values=np.inf),
        np.pad(entries, missing, constant_values=-1),
    )


def _rows(width: int) -> int:
    return max(BLOCK_BYTES // (4 * width), 1)
