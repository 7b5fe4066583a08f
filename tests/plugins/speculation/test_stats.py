from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from galley_plugins.speculation.stats import SpeculationCollector, SpeculationStats

if TYPE_CHECKING:
    from pathlib import Path


def exposed(path: Path) -> dict[tuple[str, str], float]:
    registry = CollectorRegistry()
    registry.register(SpeculationCollector(path, "hybrid"))
    families = text_string_to_metric_families(generate_latest(registry).decode())
    found = {}
    for family in families:
        for sample in family.samples:
            assert sample.labels["method"] == "hybrid"
            found[sample.name, sample.labels.get("position", sample.labels.get("le", ""))] = sample.value
    return found


def test_counters_reach_metrics_through_the_file(tmp_path: Path) -> None:
    path = tmp_path / "stats"
    stats = SpeculationStats(path)
    stats.add("steps")
    stats.add("draft_seconds", 0.25)
    stats.verified([0, 5], [0, 2])
    stats.verified([16], [16])
    found = exposed(path)
    assert found["galley_speculation_steps_total", ""] == 1
    assert found["galley_speculation_draft_seconds_total", ""] == pytest.approx(0.25)
    assert found["galley_speculation_request_steps_total", ""] == 3
    assert found["galley_speculation_draft_tokens_total", ""] == 21
    assert found["galley_speculation_accepted_tokens_total", ""] == 18
    by_position = "galley_speculation_accepted_tokens_by_position_total"
    assert [found[by_position, place] for place in ("0", "1", "2", "15+")] == [2, 2, 1, 1]
    lengths = "galley_speculation_draft_length_bucket"
    assert [found[lengths, bound] for bound in ("0.0", "4.0", "6.0", "16.0", "+Inf")] == [1, 1, 2, 3, 3]
    assert found["galley_speculation_draft_length_sum", ""] == 21


def test_a_scrape_before_the_engine_wrote_shows_nothing(tmp_path: Path) -> None:
    assert exposed(tmp_path / "missing") == {}
    (tmp_path / "short").write_bytes(b"123")
    assert exposed(tmp_path / "short") == {}


def test_the_file_is_private(tmp_path: Path) -> None:
    SpeculationStats(tmp_path / "stats")
    assert (tmp_path / "stats").stat().st_mode & 0o777 == 0o600


def test_without_a_file_counting_goes_on() -> None:
    stats = SpeculationStats(None)
    stats.add("steps", 2)
    assert stats.values[0] == 2
