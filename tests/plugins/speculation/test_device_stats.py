"""What the device counts is what the host would have counted."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from galley_plugins.speculation import device_stats
from galley_plugins.speculation.device_stats import DeviceStats
from galley_plugins.speculation.options import STATS_VARIABLE
from galley_plugins.speculation.stats import PLACES, SpeculationStats

if TYPE_CHECKING:
    import pytest

STEPS = [
    # tokens of each draft, accepted of them, whether the request gained a token
    ([0, 5, 16], [0, 2, 16], [True, True, True]),
    ([3, 70, 8], [-1, 20, 8], [False, True, True]),  # -1: a chunk of a prompt
    ([1, 1, 1], [-1, -1, -1], [False, False, False]),
]


def counted(monkeypatch: pytest.MonkeyPatch, every: float) -> SpeculationStats:
    monkeypatch.setattr(device_stats, "EVERY_SECONDS", every)
    stats = SpeculationStats(None)
    own = DeviceStats(stats, "cpu")
    for nodes, accepted, speaking in STEPS:
        own.drafting()
        own.verified(torch.tensor(nodes), torch.tensor(accepted), torch.tensor(speaking))
        own.drafted()
    return stats


def test_counts_equal_those_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    found = counted(monkeypatch, every=0.0)
    expected = SpeculationStats(None)
    for nodes, accepted, speaking in STEPS:
        rows = np.flatnonzero(speaking)
        if len(rows):
            expected.add("steps")
            expected.verified(np.array(nodes, np.int32)[rows], np.array(accepted, np.int32)[rows])
    seconds = PLACES["draft_seconds"]
    assert found.values[seconds] > 0
    found.values[seconds] = 0
    np.testing.assert_array_equal(found.values, expected.values)


def test_counts_are_copied_out_now_and_then_only(monkeypatch: pytest.MonkeyPatch) -> None:
    found = counted(monkeypatch, every=60.0)
    assert found.values[PLACES["steps"]] == 1  # the first step's; later ones wait


def test_ranks_but_the_first_count_for_themselves(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("stats") / "counters"
    monkeypatch.setenv(STATS_VARIABLE, str(path))
    SpeculationStats.from_environment(rank=1).add("steps")
    assert not path.exists()
    SpeculationStats.from_environment(rank=0).add("steps")
    assert np.fromfile(path)[PLACES["steps"]] == 1
