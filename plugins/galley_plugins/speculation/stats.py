"""Counters of speculation: written by the process that drafts, read by the one that serves `/metrics`.

They lie in one small memory-mapped file of doubles, so that neither process ever waits for the other.
"""

from __future__ import annotations

import atexit
import contextlib
import os
from bisect import bisect_left
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from galley_plugins.speculation.options import STATS_VARIABLE

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

POSITIONS = 16  # accepted tokens are counted by place in the draft, the last place and beyond together
LENGTHS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)  # upper bounds of the histogram of draft lengths

_COUNTERS = {
    "steps": "Steps of the model in which a request could have had a draft",
    "tree_steps": "Steps that verified a draft with branches",
    "branch_wins": "Drafts of which a branch other than the first was accepted",
    "request_steps": "Steps, counted once for each request that gained tokens",
    "draft_tokens": "Draft tokens verified",
    "accepted_tokens": "Draft tokens accepted",
    "step_seconds": "Wall time of steps that had no prompt chunk (runner V1)",
    "draft_seconds": "Time spent in learning from such steps and in drafting; on runner V2, of all steps",
    "verify_seconds": "Time spent in sampling along drafts in such steps (runner V1)",
    "skip_sets_tried": "Sets of skipped sub-layers that self-drafting has scored",
    "skip_sets_kept": "Such sets that were better than the best before",
}
# Where each counter lies in the file.
PLACES = {name: place for place, name in enumerate(_COUNTERS)}
POSITION_START = len(_COUNTERS)
LENGTH_START = POSITION_START + POSITIONS
LENGTH_SUM = LENGTH_START + len(LENGTHS) + 1
SIZE = LENGTH_SUM + 1


class SpeculationStats:
    """The writing side; without a path the counters stay in this process."""

    def __init__(self, path: Path | None) -> None:
        if path is None:
            self.values: Any = np.zeros(SIZE)
        else:
            descriptor = os.open(path, os.O_CREAT | os.O_TRUNC | os.O_RDWR, 0o600)
            os.ftruncate(descriptor, 8 * SIZE)
            os.close(descriptor)
            # As a plain array: each look into a memmap would make another memmap.
            self.values = np.asarray(np.memmap(path, np.float64, "r+", shape=(SIZE,)))

    @classmethod
    def from_environment(cls, rank: int = 0) -> SpeculationStats:
        """To the file that the environment names; ranks draft alike, so the first one speaks for all."""
        path = os.environ.get(STATS_VARIABLE)
        return cls(Path(path) if path and rank == 0 else None)

    def add(self, name: str, amount: float = 1.0) -> None:
        self.values[PLACES[name]] += amount

    def verified(self, nodes: Sequence[int], accepted: Sequence[int]) -> None:
        """A step verified one draft for each request.

        Args:
            nodes: of each request's draft; 0 where there was none.
            accepted: tokens accepted of it.
        """
        values = self.values
        self.add("request_steps", len(nodes))
        if not any(nodes):
            values[LENGTH_START] += len(nodes)
            return
        drafted = taken = 0
        for length, count in zip(nodes, accepted, strict=True):
            values[LENGTH_START + bisect_left(LENGTHS, length)] += 1
            for position in range(count):
                values[POSITION_START + min(position, POSITIONS - 1)] += 1
            drafted += length
            taken += count
        values[LENGTH_SUM] += drafted
        self.add("draft_tokens", drafted)
        self.add("accepted_tokens", taken)


class SpeculationCollector:
    """The reading side: a Prometheus collector over the file."""

    def __init__(self, path: Path, method: str) -> None:
        self._path = path
        self._method = method

    def describe(self) -> list[Any]:
        return []  # nothing to read before the engine has started

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily

        try:
            values = np.fromfile(self._path, np.float64)
        except OSError:
            return
        if len(values) != SIZE:
            return
        label = [self._method]
        for name, text in _COUNTERS.items():
            family = CounterMetricFamily(f"galley_speculation_{name}", text, labels=["method"])
            family.add_metric(label, float(values[PLACES[name]]))
            yield family
        family = CounterMetricFamily(
            "galley_speculation_accepted_tokens_by_position",
            "Draft tokens accepted, by place in the draft",
            labels=["method", "position"],
        )
        for position in range(POSITIONS):
            name = str(position) if position < POSITIONS - 1 else f"{position}+"
            family.add_metric([*label, name], float(values[POSITION_START + position]))
        yield family
        histogram = HistogramMetricFamily(
            "galley_speculation_draft_length", "Nodes of a request's draft in a step", labels=["method"]
        )
        counts = np.cumsum(values[LENGTH_START : LENGTH_START + len(LENGTHS) + 1])
        bounds = [*(str(float(bound)) for bound in LENGTHS), "+Inf"]
        histogram.add_metric(
            label, list(zip(bounds, map(float, counts), strict=True)), float(values[LENGTH_SUM])
        )
        yield histogram


def serve_metrics(path: Path, method: str) -> None:
    """Show the counters of `path` on this process's `/metrics`, and remove the file when it ends."""
    from prometheus_client import REGISTRY

    REGISTRY.register(SpeculationCollector(path, method))

    def remove() -> None:
        with contextlib.suppress(OSError):
            path.unlink()

    atexit.register(remove)
