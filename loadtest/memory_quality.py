"""How well a text is predicted: a model alone, mixed with kNN-LM, and with the memory that imitates it."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, Any

from galley_plugins.memory.building.build import STAGES, Build, BuildOptions
from galley_plugins.memory.building.evaluation import evaluate
from loadtest.harness import console

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_JOINED = ((" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."), (" <unk>", ""), ("<unk>", ""))
_SPACES = (
    (re.compile(r" ([,.;:!?%)\]}])"), r"\1"),
    (re.compile(r"([(\[{$£]) "), r"\1"),
    (re.compile(r" (n't|'s|'re|'ve|'ll|'d|'m)\b"), r"\1"),
    (re.compile(r'" ([^"\n]*?) "'), r'"\1"'),
    (re.compile(r" +$", re.MULTILINE), ""),
)


def detokenized(text: str) -> str:
    """WikiText without its conventions: joined numbers and words, no spaces before stops, no `<unk>`."""
    for marked, plain in _JOINED:
        text = text.replace(marked, plain)
    for pattern, replacement in _SPACES:
        text = pattern.sub(replacement, text)
    return text


class StageTimer:
    """A build's reporter: seconds of each stage that ran."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._begun: tuple[str, float] | None = None

    def stage(self, name: str, total: int | None) -> Callable[[int], None]:
        self.end()
        console.print(f"{name}: {total}")
        self._begun = name, time.perf_counter()
        return lambda count: None

    def end(self) -> None:
        if self._begun is not None:
            name, begun = self._begun
            self.seconds[name] = round(time.perf_counter() - begun, 1)
            self._begun = None

    def reused(self, name: str) -> None:
        self.end()

    def bad_row(self, what: str) -> None:
        raise ValueError(what)

    def scored(self, step: int, mix: Any) -> None:
        console.print(f"step {step}: {mix.plain:.4f} -> {mix.nats:.4f} nats at {mix.weight:.2f}")


def measure(
    name: str,
    work: Path,
    corpus: str,
    test: str,
    model: Path,
    *,
    windows: int | None,
    device: str,
    **options: Any,
) -> dict[str, Any]:
    """Build a memory of `corpus`, and predict `test` with it.

    Args:
        name: of the row; its build stays in `work`, and another run goes on with it.
        windows: of 1024 tokens of the test text; None for all.
        options: of the build.
    """
    work.mkdir(parents=True, exist_ok=True)
    paths = {part: work / f"{name}.{part}.txt" for part in ("corpus", "test")}
    for part, text in (("corpus", corpus), ("test", test)):
        paths[part].write_text(text, encoding="utf-8")
    timer = StageTimer()
    out = work / name
    built = Build(BuildOptions(paths["corpus"], out, model, device=device, **options), timer).run(STAGES[-1])
    timer.end()
    memory = built.memory
    assert memory is not None
    begun = time.perf_counter()
    found = evaluate(out, paths["test"], model, windows=windows, knn=True, device=device)
    rows = {row["name"]: row for row in found["rows"]}
    mix, knn = memory.training["mix"], memory.training["teacher"]["knn"]
    gain, knn_gain = mix["plain"] - mix["nats"], knn["plain"] - knn["nats"]
    return {
        "seconds": timer.seconds,
        "seconds_test": round(time.perf_counter() - begun, 1),
        "test_tokens": found["tokens"],
        "layer": memory.layer,
        "sizes": vars(memory.sizes),
        "corpus": memory.corpus,
        "training": {key: value for key, value in memory.training.items() if key != "teacher"},
        "teacher": {key: value for key, value in memory.training["teacher"].items() if key != "knn"},
        "weights": {"memory": memory.weight, "knn": knn["weight"]},
        "test": rows,
        "heldout": {"plain": mix["plain"], "memory": mix["nats"], "knn": knn["nats"]},
        "gain_share_test": round(rows["memory"]["gain"] / rows["kNN-LM"]["gain"], 3),
        "gain_share_heldout": round(gain / knn_gain, 3),
        "bytes": bytes_of(out),
    }


def bytes_of(out: Path) -> dict[str, int]:
    """Of the datastore with its index, and of the memory."""

    def size(*names: str) -> int:
        return sum(
            path.stat().st_size for name in names for path in (out / name).rglob("*") if path.is_file()
        )

    datastore = sum(
        (out / "datastore" / name).stat().st_size for name in ("keys.f16", "values.i32")
    )  # held-out keys are no part of it
    return {"datastore_and_index": datastore + size("index"), "memory": size("memory")}
