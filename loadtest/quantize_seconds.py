"""Seconds of the command `galley quantize`, start and imports included, method by method in turn.

Beside the clock's stand those of the processor, of all its cores together: what else the machine does moves
them less.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from galley_plugins.quantization.options import METHODS
from loadtest.servers import MODEL

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


class CommandError(RuntimeError):
    """The command failed; the message is its own."""


def quantize(method: str, out: Path, *options: str, model: str = MODEL) -> dict[str, Any]:
    """
    Args:
        options: of the command, besides the method.

    Raises:
        CommandError: it failed.
    """
    command = [sys.executable, "-m", "galley", "quantize", model, str(out), "--method", method, "--json"]
    command += options
    start, before = time.perf_counter(), _of_children()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds, processor = time.perf_counter() - start, _of_children() - before
    if done.returncode:
        raise CommandError(f"galley quantize --method {method}: {done.stderr.strip()}")
    report = json.loads(done.stdout)
    weights = sum(rows * columns for rows, columns in (row["shape"] for row in report["matrices"]))
    return {
        "method": method,
        "seconds": round(seconds, 2),
        "cpu_seconds": round(processor, 2),
        "bits": round(report["bits_per_weight"], 4),
        "weights": weights,
    }


def measure(repeats: int, methods: Sequence[str] = METHODS) -> Iterator[dict[str, Any]]:
    """Every method once, then every one again."""
    for repeat in range(repeats):
        for method in methods:
            with tempfile.TemporaryDirectory(prefix="galley-quantize-") as place:
                yield {**quantize(method, Path(place) / "out"), "repeat": repeat}


def figures_of(runs: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Medians, and of these the seconds for each billion of weights that were quantized."""
    found: dict[str, float] = {}
    for method in dict.fromkeys(run["method"] for run in runs):
        own = [run for run in runs if run["method"] == method]
        middle = median(run["seconds"] for run in own)
        name = method.replace("finequant+easyquant", "both")
        found[f"command_seconds_{name}"] = round(middle, 2)
        found[f"command_seconds_per_billion_{name}"] = round(middle / own[0]["weights"] * 1e9, 1)
        found[f"command_cpu_seconds_{name}"] = round(median(run["cpu_seconds"] for run in own), 2)
    return found


def _of_children() -> float:
    """The processor's seconds of all ended children so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
