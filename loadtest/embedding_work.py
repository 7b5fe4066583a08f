"""Steps of a long benchmark, each measured once, and kept in a file until all are done."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from loadtest.harness import console

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path


@dataclass(frozen=True)
class Step:
    """One cell: its name, and what measures it and returns JSON values."""

    key: str
    run: Callable[[], dict[str, Any]]


class Work:
    """Measured cells in a file, one a line below a line that says how they were measured.

    Args:
        path: of the file; None keeps the cells in memory alone.
        header: what all cells have in common; a run goes on only with the same.

    Raises:
        ValueError: the file is there and `resume` is not set, or it was measured otherwise.
    """

    def __init__(self, path: Path | None, header: dict[str, Any], resume: bool) -> None:
        self._path = path
        self.cells: dict[str, dict[str, Any]] = {}
        if path is None:
            return
        if path.exists():
            if not resume:
                raise ValueError(f"{path} holds an interrupted run: go on with --resume, or remove it")
            self.cells = _read(path, header)
        path.parent.mkdir(exist_ok=True)
        partial = path.with_suffix(".partial")
        lines = [header, *self.cells.items()]
        partial.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        partial.replace(path)

    def do(self, steps: Sequence[Step]) -> list[dict[str, Any]]:
        """The cells of all steps, in their order; those that are there are not measured again."""
        missing = [step for step in steps if step.key not in self.cells]
        seconds = 0.0
        for count, step in enumerate(missing, 1):
            start = time.monotonic()
            self._add(step.key, step.run())
            took = time.monotonic() - start
            seconds += took
            left = timedelta(seconds=round(seconds / count * (len(missing) - count)))
            console.print(f"{count}/{len(missing)} {step.key}: {took:.0f} s; left: {left}")
        return [self.cells[step.key] for step in steps]

    def _add(self, key: str, values: dict[str, Any]) -> None:
        self.cells[key] = values
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([key, values]) + "\n")

    def remove(self) -> None:
        if self._path is not None:
            self._path.unlink()


def _read(path: Path, header: dict[str, Any]) -> dict[str, dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    whole = [json.loads(line) for line in lines if line.endswith("\n")]
    if not whole or whole[0] != json.loads(json.dumps(header)):
        raise ValueError(f"{path} was measured otherwise: remove it, or repeat that run's options")
    return dict(whole[1:])
