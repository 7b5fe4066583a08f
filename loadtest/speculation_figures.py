"""Figures of measured cells: speed-ups, tokens a step, drafting's share, and tables of them."""

from __future__ import annotations

import statistics
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from loadtest.specbench import TASKS
from loadtest.speculation_cells import OWN
from loadtest.speculation_servers import BASE, METHODS, OURS, OWN_BASE, PEERS, WARM

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from loadtest.speculation_cells import Answer, Cell, Wave

DRAFTS = "vllm:spec_decode_num_drafts_total"
ACCEPTED = "vllm:spec_decode_num_accepted_tokens_total"
DRAFT_SECONDS, STEP_SECONDS = OWN + "draft_seconds_total", OWN + "step_seconds_total"

Rates = dict[tuple[str, int], dict[str, float]]


@dataclass
class Totals:
    """What several waves sum to."""

    generated: int = 0
    steps: float = 0.0
    counters: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @classmethod
    def of(cls, waves: Iterable[Wave]) -> Totals:
        totals = cls()
        for wave in waves:
            totals.generated += wave.generated
            totals.steps += wave.steps
            for name, value in wave.counters.items():
                totals.counters[name] += value
        return totals

    @property
    def tokens_per_step(self) -> float | None:
        return _ratio(self.generated, self.steps)

    @property
    def mean_accepted_length(self) -> float | None:
        """Tokens of a step that verified a draft."""
        accepted = _ratio(self.counters[ACCEPTED], self.counters[DRAFTS])
        return None if accepted is None else 1 + accepted

    @property
    def draft_share(self) -> float | None:
        return _ratio(self.counters[DRAFT_SECONDS], self.counters[STEP_SECONDS])


def rates_of(cells: Iterable[Cell]) -> Rates:
    """Tokens a second by method and batch size, then by task: the median over the repeats."""
    found: dict[tuple[str, int], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for cell in cells:
        for task, measured in cell.waves.items():
            found[cell.method, cell.batch][task].append(measured.tokens_per_second)
    return {
        key: {task: statistics.median(values) for task, values in tasks.items()}
        for key, tasks in found.items()
    }


def ratios(rates: Rates, method: str, base: str, batch: int) -> dict[str, float]:
    """A method's tokens a second over another's, by task; empty where one of them was not measured."""
    ours, theirs = rates.get((method, batch), {}), rates.get((base, batch), {})
    return {task: rate / theirs[task] for task, rate in ours.items() if theirs.get(task)}


def speedup(rates: Rates, method: str, base: str, batch: int) -> float | None:
    """The mean over the tasks of the ratio by task."""
    by_task = ratios(rates, method, base, batch)
    return statistics.fmean(by_task.values()) if by_task else None


def best_peer(rates: Rates, batch: int) -> str | None:
    """That of vLLM's own methods with the better speed-up."""
    gains = {peer: gain for peer in PEERS if (gain := speedup(rates, peer, BASE, batch)) is not None}
    return max(gains, key=lambda peer: gains[peer]) if gains else None


def different_texts(cells: Sequence[Cell]) -> dict[str, int]:
    """By method, how many answers are none that the base gave to the prompt in any of its cells."""
    given: dict[int, set[str]] = defaultdict(set)
    for cell in cells:
        if cell.method == BASE:
            for answer in _answers(cell):
                given[answer.question].add(answer.text)
    return {
        method: sum(
            answer.text not in given[answer.question]
            for cell in cells
            if cell.method == method
            for answer in _answers(cell)
        )
        for method in _methods(cells)
        if method != BASE
    }


def varying_prompts(cells: Iterable[Cell]) -> int:
    """To how many prompts the base gave more than one answer."""
    given: dict[int, set[str]] = defaultdict(set)
    for cell in cells:
        if cell.method == BASE:
            for answer in _answers(cell):
                given[answer.question].add(answer.text)
    return sum(len(texts) > 1 for texts in given.values())


def totals(cells: Iterable[Cell], method: str, batch: int, task: str | None = None) -> Totals:
    return Totals.of(
        measured
        for cell in cells
        if (cell.method, cell.batch) == (method, batch)
        for name, measured in cell.waves.items()
        if task in (None, name)
    )


def figures_of(cells: Sequence[Cell]) -> dict[str, Any]:
    """What the benchmark says; without a method's name, a figure is `hybrid`'s."""
    rates = rates_of(cells)
    batches = sorted({cell.batch for cell in cells})
    differing = different_texts(cells)
    first = {name: totals(cells, name, 1) for name in _methods(cells)}
    ours = first.get(OURS, Totals())
    tasks = [task for task in dict.fromkeys(TASKS.values()) if task in rates.get((OURS, 1), {})]
    gains = {batch: speedup(rates, OURS, BASE, batch) for batch in batches}
    peers = {batch: best_peer(rates, batch) for batch in batches}
    known = [gain for gain in gains.values() if gain is not None]
    by_task = ratios(rates, OURS, BASE, 1)
    over_own = {batch: speedup(rates, OURS, OWN_BASE, batch) for batch in batches}
    warmed = {batch: speedup(rates, OURS + WARM, BASE, batch) for batch in batches}
    return {
        "identical": not any(differing.values()),
        "different_texts": differing,
        "base_varies_prompts": varying_prompts(cells),
        "tokens_per_step_b1": _round(ours.tokens_per_step),
        "mean_accepted_length_b1": _round(ours.mean_accepted_length),
        "tokens_per_step_b1_by_task": {
            task: _round(totals(cells, OURS, 1, task).tokens_per_step) for task in tasks
        },
        **{f"speedup_b{batch}": _round(gain) for batch, gain in gains.items()},
        **{f"best_peer_b{batch}": peer for batch, peer in peers.items()},
        **{
            f"over_best_peer_b{batch}": _round(speedup(rates, OURS, peer, batch)) if peer else None
            for batch, peer in peers.items()
        },
        **{f"over_own_none_b{batch}": _round(gain) for batch, gain in over_own.items() if gain is not None},
        "worst_speedup": _round(min(known, default=None)),
        "worst_task_speedup_b1": _round(min(by_task.values(), default=None)),
        "speedup_b1_by_task": {task: _round(by_task[task]) for task in tasks if task in by_task},
        **{f"draft_share_b{batch}": _round(totals(cells, OURS, batch).draft_share) for batch in batches},
        **{f"warm_speedup_b{batch}": _round(gain) for batch, gain in warmed.items() if gain is not None},
        "tokens_per_step_b1_by_method": {name: _round(sums.tokens_per_step) for name, sums in first.items()},
        "speedup_by_method": {
            name: {str(batch): _round(speedup(rates, name, BASE, batch)) for batch in batches}
            for name in _methods(cells)
            if name != BASE
        },
    }


def markdown(cells: Sequence[Cell]) -> str:
    """Two tables: methods by batch size, and methods by task at the smallest batch size."""
    if not cells:
        return ""
    rates = rates_of(cells)
    methods, batches = _methods(cells), sorted({cell.batch for cell in cells})
    least = batches[0]
    tasks = [*dict.fromkeys(task for name in methods for task in rates.get((name, least), {}))]
    head = ["method", *(f"speed-up, batch {batch}" for batch in batches)]
    head += [f"{name}, batch {least}" for name in ("tokens a step", "tokens of a verifying step")]
    head += [f"drafting's share, batch {batch}" for batch in batches]
    rows = []
    for name in methods:
        alone = totals(cells, name, least)
        values = [speedup(rates, name, BASE, batch) for batch in batches]
        values += [alone.tokens_per_step, alone.mean_accepted_length]
        values += [totals(cells, name, batch).draft_share for batch in batches]
        rows.append([name, *map(_shown, values)])
    by_task = [
        [name, *(_shown(ratios(rates, name, BASE, least).get(task)) for task in tasks)] for name in methods
    ]
    return "\n\n".join([_table(head, rows), _table([f"speed-up, batch {least}", *tasks], by_task)])


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _answers(cell: Cell) -> Iterator[Answer]:
    for measured in cell.waves.values():
        yield from measured.answers


def _methods(cells: Iterable[Cell]) -> list[str]:
    present = {cell.method for cell in cells}
    return [*(name for name in METHODS if name in present), *sorted(present - set(METHODS))]


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
