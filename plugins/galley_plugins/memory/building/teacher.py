"""What kNN-LM would say at each place of the corpus: the distributions that a memory learns to imitate.

MLP Memory (arXiv 2508.01832, section 3.1): p(y) is the sum of softmax(-d / T) over the neighbours followed by
y, the place itself left out; kept sparse. The temperature suits the model's own distances: of several, the
one whose mix with the model predicts the held-out text best, which is kNN-LM itself.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np
import torch

from galley_plugins.memory.building.datastore import (
    HELD_KEYS,
    HELD_LIKELIHOODS,
    HELD_VALUES,
    KEYS,
    VALUES,
)
from galley_plugins.memory.building.mixture import Mixture, mixture
from galley_plugins.memory.building.stages import explained

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from galley_plugins.memory.building.neighbours import Neighbours
    from galley_plugins.memory.building.stages import Stage

OFFSETS, TOKENS, PROBS = "offsets.i64", "tokens.i32", "probs.f16"
TEMPERATURES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
QUERIES = 4096  # searched at once
MOST_WEIGHED = 1 << 15  # held-out places that the temperature is chosen by


def write_teacher(
    stage: Stage,
    datastore: Stage,
    neighbours: Neighbours,
    *,
    width: int,
    k: int,
    temperature: float | None,
    floor: float,
    advance: Callable[[int], None] = lambda places: None,
) -> None:
    """Write the distribution of every entry of the datastore; an interrupted run goes on.

    Args:
        width: of the keys.
        k: neighbours of a place.
        temperature: None for the best of `TEMPERATURES`.
        floor: probabilities below are left out, and the rest is normalised.
        advance: called with the places done since the last call.

    Raises:
        StageError: the disk has no room.
    """
    progress = stage.begin()
    keys, values = datastore.read(KEYS, "float16", width), datastore.read(VALUES, "int32")
    if not progress:
        mixes = weigh_temperatures(datastore, neighbours, width, k, TEMPERATURES)
        if temperature is None:
            temperature = min(mixes, key=lambda found: mixes[found].nats)
        mixes = (
            mixes
            if temperature in mixes
            else weigh_temperatures(datastore, neighbours, width, k, (temperature,))
        )
        found = mixes[temperature]
        progress = {
            "places": 0,
            "kept": 0,
            "temperature": temperature,
            "knn": {"weight": found.weight, "nats": found.nats, "plain": found.plain},
        }
    offsets = stage.array(OFFSETS, "int64", (len(keys) + 1,))
    offsets[0] = 0
    place, kept = progress["places"], progress["kept"]
    advance(place)
    paths = [stage.folder / f"{name}.partial" for name in (TOKENS, PROBS)]
    with explained(paths[0]), paths[0].open("ab") as tokens, paths[1].open("ab") as probs:
        tokens.truncate(4 * kept)
        probs.truncate(2 * kept)
        while place < len(keys):
            rows = np.arange(place, min(place + QUERIES, len(keys)))
            distances, entries = neighbours.search(keys[place : rows[-1] + 1], k + 1)
            distances, entries = _without(distances, entries, rows)
            counts, ids, shares = distributions(distances, values[entries], progress["temperature"], floor)
            tokens.write(ids.astype(np.int32).tobytes())
            probs.write(shares.astype(np.float16).tobytes())
            offsets[rows + 1] = kept + counts.cumsum()
            place, kept = int(rows[-1]) + 1, kept + len(ids)
            for file in (tokens, probs):
                file.flush()
                os.fsync(file.fileno())
            if isinstance(offsets, np.memmap):
                offsets.flush()
            stage.note({**progress, "places": place, "kept": kept})
            advance(len(rows))
    stage.finish({**{name: progress[name] for name in ("temperature", "knn")}, "kept": kept, "k": k})


def distributions(
    distances: NDArray[np.float32], tokens: NDArray[np.int32], temperature: float, floor: float = 0.0
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.float32]]:
    """kNN-LM's distributions, each token once.

    Args:
        distances: [places, k], squared; infinite ones do not count.
        tokens: [places, k], that followed the neighbours.

    Returns:
        how many tokens each place has, int64 [places]; the tokens, rising within a place, and their
        probabilities, one place behind the other.
    """
    if not distances.size:
        return np.zeros(len(distances), np.int64), np.empty(0, np.int32), np.empty(0, np.float32)
    rows = torch.from_numpy(np.ascontiguousarray(tokens)).sort(dim=1, stable=True)
    ids = rows.values.numpy()
    weights = torch.from_numpy(_softmax(distances, temperature)).gather(1, rows.indices).numpy()
    first = np.ones(ids.shape, bool)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    begins = np.flatnonzero(first)
    sums = np.add.reduceat(weights.reshape(-1), begins)
    places = begins // ids.shape[1]
    kept = sums > floor
    counts = np.bincount(places[kept], minlength=len(ids))
    totals = np.bincount(places[kept], sums[kept], minlength=len(ids))
    return counts, ids.reshape(-1)[begins[kept]], (sums[kept] / totals[places[kept]]).astype(np.float32)


def probabilities(
    distances: NDArray[np.float32],
    tokens: NDArray[np.int32],
    following: NDArray[np.int32],
    temperature: float,
) -> NDArray[np.float64]:
    """[places]: what kNN-LM gives the token that follows; 0 where no neighbour was followed by it."""
    weights = _softmax(distances, temperature)
    found: NDArray[np.float64] = (weights * (tokens == following[:, None])).sum(1, dtype=np.float64)
    return found


def weigh_temperatures(
    datastore: Stage, neighbours: Neighbours, width: int, k: int, temperatures: Sequence[float]
) -> dict[float, Mixture]:
    """kNN-LM on the held-out text, at its best share for each temperature."""
    values, following = datastore.read(VALUES, "int32"), datastore.read(HELD_VALUES, "int32")
    keys, likelihoods = (
        datastore.read(HELD_KEYS, "float16", width),
        datastore.read(HELD_LIKELIHOODS, "float32"),
    )
    places = spread(len(following), MOST_WEIGHED)
    found: dict[float, list[NDArray[np.float64]]] = {temperature: [] for temperature in temperatures}
    for start in range(0, len(places), QUERIES):
        rows = places[start : start + QUERIES]
        distances, entries = neighbours.search(keys[rows], k)
        for temperature, parts in found.items():
            parts.append(probabilities(distances, values[entries], following[rows], temperature))
    return {
        temperature: mixture(likelihoods[places], np.concatenate(parts))
        for temperature, parts in found.items()
    }


def spread(count: int, most: int) -> NDArray[np.int64]:
    """Up to `most` of the numbers below `count`, evenly."""
    return np.arange(count) if count <= most else np.linspace(0, count - 1, most).astype(np.int64)


def _without(
    distances: NDArray[np.float32], entries: NDArray[np.int64], rows: NDArray[np.int64]
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Neighbours without the place itself: the farthest goes where it is not among them."""
    own = entries == rows[:, None]
    own[~own.any(1), -1] = True
    shape = (len(rows), entries.shape[1] - 1)
    return distances[~own].reshape(shape), entries[~own].reshape(shape)


def _softmax(distances: NDArray[np.float32], temperature: float) -> NDArray[np.float32]:
    """0 throughout where all are infinite."""
    found: NDArray[np.float32] = torch.softmax(torch.from_numpy(distances) / -temperature, 1).numpy()
    return np.nan_to_num(found, copy=False)
