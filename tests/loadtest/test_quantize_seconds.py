"""Timing of the command `galley quantize`, on a small model."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from loadtest import quantize_seconds
from loadtest.quantize_seconds import CommandError, figures_of, measure, quantize
from tests.support.small_checkpoint import make_small_checkpoint

if TYPE_CHECKING:
    from pathlib import Path


def test_the_command_is_timed_and_its_weights_counted(tmp_path: Path) -> None:
    make_small_checkpoint(tmp_path / "model")
    found = quantize("rtn", tmp_path / "out", model=str(tmp_path / "model"))
    assert found["seconds"] > 0
    assert 0.5 < found["cpu_seconds"] < 2 * os.cpu_count() * found["seconds"]  # at least the imports
    assert found["weights"] == 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 160)
    assert 4 < found["bits"] < 5
    more = quantize("rtn", tmp_path / "coarse", "--group-size", "32", model=str(tmp_path / "model"))
    assert more["bits"] == 4.5  # a scale of 16 bits for 32 weights
    with pytest.raises(
        CommandError, match=r"galley quantize --method rtn: error: .*exists, expected a new folder"
    ):
        quantize("rtn", tmp_path / "out", model=str(tmp_path / "model"))


def test_methods_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(
            command, 0, '{"bits_per_weight": 4.5, "matrices": [{"shape": [2, 3]}]}'
        )

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(quantize_seconds, "METHODS", ())  # what is asked for counts
    runs = list(measure(2, ["rtn", "easyquant"]))
    assert [(run["repeat"], run["method"], run["weights"]) for run in runs] == [
        (0, "rtn", 6), (0, "easyquant", 6), (1, "rtn", 6), (1, "easyquant", 6),
    ]  # fmt: skip


def test_figures_are_medians_and_scaled_to_a_billion() -> None:
    runs = [
        {"method": "finequant+easyquant", "seconds": seconds, "cpu_seconds": 2 * seconds, "weights": 10**8}
        for seconds in (20.0, 11.0, 12.0)
    ]
    assert figures_of(runs) == {
        "command_seconds_both": 12.0,
        "command_seconds_per_billion_both": 120.0,
        "command_cpu_seconds_both": 24.0,
    }
