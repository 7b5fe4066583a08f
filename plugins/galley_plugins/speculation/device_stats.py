"""The counters of `stats` where drafts and verdicts stay on the device (runner V2).

They add up in a tensor there, which steps copy out about once a second without waiting for it: what the last
second before a pause counted is seen when work goes on.
"""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

import torch

from galley_kernels.choice import has_triton
from galley_plugins.speculation.stats import (
    LENGTH_START,
    LENGTH_SUM,
    LENGTHS,
    PLACES,
    POSITION_START,
    POSITIONS,
    SIZE,
)

if TYPE_CHECKING:
    from galley_plugins.speculation.stats import SpeculationStats

EVERY_SECONDS = 1.0
_COUNTED = ("steps", "request_steps", "draft_tokens", "accepted_tokens")


class DeviceStats:
    """Counts for `stats` on `device`."""

    def __init__(self, stats: SpeculationStats, device: torch.device | str) -> None:
        self._stats = stats
        self._cuda = torch.device(device).type == "cuda"
        self._fused = self._cuda and has_triton()
        self._values = torch.zeros(SIZE, dtype=torch.float64, device=device)
        self._copy = torch.zeros(SIZE, dtype=torch.float64, pin_memory=self._cuda)
        self._ready: torch.cuda.Event | None = None
        self._due = 0.0
        self._bounds = torch.tensor(LENGTHS, device=device)
        self._positions = torch.arange(POSITIONS, device=device)
        self._named = torch.tensor([*(PLACES[name] for name in _COUNTED), LENGTH_SUM], device=device)
        self._timed: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._started: torch.cuda.Event | float = 0.0

    def verified(self, nodes: torch.Tensor, accepted: torch.Tensor, counted: torch.Tensor) -> None:
        """A step verified one draft for each request.

        Args:
            nodes: int64 [requests], tokens of each draft.
            accepted: int64 [requests], how many of them stand.
            counted: bool [requests]; the rest gained no token in this step.
        """
        if self._fused:
            from galley_plugins.speculation.triton_stats import add_verified

            add_verified(self._values, self._bounds, nodes, accepted, counted)
            return
        nodes, accepted = nodes * counted, accepted * counted
        drafted = nodes.sum()
        sums = (counted.any(), counted.sum(), drafted, accepted.sum(), drafted)
        self._values[self._named] += torch.stack([value.double() for value in sums])
        places = LENGTH_START + torch.bucketize(nodes, self._bounds)
        self._values.index_add_(0, places, counted.double())
        reached = (accepted[:, None] > self._positions).double().sum(0)
        reached[-1] = (accepted - (POSITIONS - 1)).clamp(min=0).sum()
        self._values[POSITION_START : POSITION_START + POSITIONS] += reached

    def drafting(self) -> None:
        """Learning and drafting begin."""
        self._started = self._mark() if self._cuda else time.perf_counter()

    def drafted(self) -> None:
        """They have ended, as far as the host is concerned."""
        if isinstance(self._started, float):
            self._stats.add("draft_seconds", time.perf_counter() - self._started)
        else:
            self._timed.append((self._started, self._mark()))
        self._publish()

    def _mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _publish(self) -> None:
        while self._timed and self._timed[0][1].query():
            start, stop = self._timed.popleft()
            self._stats.add("draft_seconds", start.elapsed_time(stop) / 1e3)
        if self._ready is not None and self._ready.query():
            self._ready = None
            self._write()
        if self._ready is not None or time.monotonic() < self._due:
            return
        self._due = time.monotonic() + EVERY_SECONDS
        self._copy.copy_(self._values, non_blocking=True)
        if self._cuda:
            self._ready = self._mark()
        else:
            self._write()

    def _write(self) -> None:
        counts = self._copy.numpy()
        own = counts != 0  # what others count in the same file stays
        self._stats.values[own] = counts[own]
