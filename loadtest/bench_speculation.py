#!/usr/bin/env python
"""What speculation gains on Spec-Bench: Galley's methods and vLLM's own, each over vLLM without any.

First turns through the chat endpoint at temperature 0, from as many concurrent clients as the batch is large.
A task is one wave of prompts; its speed is its generated tokens over the wave's wall time. A speed-up is the
ratio of two methods' medians over the repeats, by task, and the mean of that over the six tasks.

A cell is one method at one batch size in one repeat, in a process of its own, so that nothing is learned from
an earlier cell. `METHOD-warm` serves other prompts of the same tasks before the measured ones.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import signal
import statistics
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from loadtest.harness import RESULTS, Report, commit, console, versions
from loadtest.servers import Server, galley_worker, plain_vllm
from loadtest.suffix_peer import PeerError, suffix_peer_path

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

os.environ.setdefault("HF_HUB_OFFLINE", "1")

# What Galley and vLLM choose differently is set for both; 2048 is vLLM's own number for a CPU.
SETTINGS: dict[str, Any] = {
    "dtype": "float32",
    "max-model-len": 4096,
    "max-num-seqs": 16,
    "max-num-batched-tokens": 2048,
    "kv-cache-memory-bytes": 1024**3,
}
PEERS: dict[str, dict[str, Any]] = {
    "ngram": {
        "method": "ngram",
        "num_speculative_tokens": 8,
        "prompt_lookup_min": 2,
        "prompt_lookup_max": 4,
    },
    "suffix": {"method": "suffix", "num_speculative_tokens": 8},
}
BASE, OURS, WARM = "none", "hybrid", "-warm"
GALLEY = ("trigram", "recycling", "prompt-lookup", OURS)
METHODS = (BASE, *PEERS, *GALLEY, OURS + WARM)
QUICK_METHODS = (BASE, "suffix", "ngram", OURS)
BATCHES, QUICK_BATCHES = (1, 4, 8, 16), (1, 8)
QUICK_PROMPTS, QUICK_TOKENS = 1, 32
TASKS = {
    **dict.fromkeys(
        ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"), "mt_bench"
    ),
    **{task: task for task in ("translation", "summarization", "qa", "math_reasoning", "rag")},
}
MIXED = "all tasks"

ANSWER_SECONDS = 600.0
SETTLE_SECONDS = 5.0
GENERATED = "vllm:generation_tokens_total"
LATER_STEPS = "vllm:inter_token_latency_seconds_count"  # steps that gave a request tokens, but its first
DRAFTS = "vllm:spec_decode_num_drafts_total"
ACCEPTED = "vllm:spec_decode_num_accepted_tokens_total"
OWN = "galley_speculation_"
DRAFT_SECONDS, STEP_SECONDS = OWN + "draft_seconds_total", OWN + "step_seconds_total"


@dataclass(frozen=True)
class Prompt:
    question: int
    category: str
    text: str


@dataclass(frozen=True)
class Answer:
    """What came back for one prompt."""

    question: int
    tokens: int
    seconds: float
    finish: str
    text: str


@dataclass(frozen=True)
class Wave:
    """Some prompts through so many clients.

    Attributes:
        seconds: from the first request to the last answer.
        counters: by how much the engine's counters grew; see `counters_of`.
    """

    seconds: float
    answers: list[Answer]
    counters: dict[str, float]

    @property
    def generated(self) -> int:
        return sum(answer.tokens for answer in self.answers)

    @property
    def tokens_per_second(self) -> float:
        return self.generated / self.seconds

    @property
    def concurrency(self) -> float:
        """Requests in flight, on average."""
        return sum(answer.seconds for answer in self.answers) / self.seconds

    @property
    def steps(self) -> float:
        """Forward passes that gave a request tokens, over all requests.

        Generated less accepted tokens would be too few: what is accepted beyond a request's end counts there.
        """
        return len(self.answers) + self.counters.get(LATER_STEPS, 0.0)


@dataclass(frozen=True)
class Cell:
    """One method at one batch size in one repeat.

    Attributes:
        waves: by task, or one of all tasks together.
        start_seconds: until the process was ready.
        load: of the machine, over the minute before the first wave.
    """

    method: str
    batch: int
    repeat: int
    waves: dict[str, Wave]
    block_size: int | None = None
    start_seconds: float = 0.0
    load: float = 0.0
    commit: str = ""

    @property
    def key(self) -> tuple[str, int, int]:
        return self.method, self.batch, self.repeat

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> Cell:
        waves = {
            task: Wave(**{**wave, "answers": [Answer(**answer) for answer in wave["answers"]]})
            for task, wave in values["waves"].items()
        }
        return cls(**{**values, "waves": waves})

    def summary(self) -> dict[str, Any]:
        """What stays in the results: everything but the texts."""
        waves: dict[str, Any] = {}
        for task, wave in self.waves.items():
            waves[task] = {
                "prompts": len(wave.answers),
                "generated": wave.generated,
                "seconds": round(wave.seconds, 4),
                "tokens_per_second": round(wave.tokens_per_second, 3),
                "concurrency": round(wave.concurrency, 2),
                "steps": wave.steps,
                "counters": {name: round(value, 6) for name, value in wave.counters.items()},
            }
            if self.batch == 1:
                waves[task]["requests"] = {
                    str(answer.question): {"tokens": answer.tokens, "seconds": round(answer.seconds, 4)}
                    for answer in wave.answers
                }
        return {**asdict(self), "waves": waves}


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


# -- prompts ----------------------------------------------------------------------------------------------


def data_path(given: Path | None, environment: Mapping[str, str]) -> Path:
    """The file of prompts: the given one, else `spec/specbench.jsonl` below `$GALLEY_DATA`.

    Raises:
        FileNotFoundError: it is not there, or nothing says where.
    """
    folder = environment.get("GALLEY_DATA")
    if given is None and not folder:
        raise FileNotFoundError("name Spec-Bench's file with --data, or its folder with GALLEY_DATA")
    path = given or Path(folder or "") / "spec" / "specbench.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: name Spec-Bench's file with --data")
    return path


def load_prompts(lines: Iterable[str]) -> dict[str, list[Prompt]]:
    """First turns by task, in an order whose every stretch takes from a task's categories in turn.

    Raises:
        ValueError: a line is no question of Spec-Bench, or a task has none.
    """
    found: dict[str, dict[str, list[Prompt]]] = {task: defaultdict(list) for task in TASKS.values()}
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            prompt = Prompt(int(row["question_id"]), row["category"], row["turns"][0])
            found[TASKS[prompt.category]][prompt.category].append(prompt)
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise ValueError(f"line {number} is no question of Spec-Bench: {error!r}") from error
    missing = [task for task, categories in found.items() if not categories]
    if missing:
        raise ValueError(f"no question for {', '.join(missing)}")
    return {task: in_turn(list(categories.values())) for task, categories in found.items()}


def in_turn(groups: Sequence[Sequence[Prompt]]) -> list[Prompt]:
    """The first of each group, the second of each, and so on."""
    longest = max(map(len, groups), default=0)
    return [group[index] for index in range(longest) for group in groups if index < len(group)]


def stretch(prompts: dict[str, list[Prompt]], start: int, count: int) -> dict[str, list[Prompt]]:
    """`count` prompts of each task, from its `start`-th.

    Raises:
        ValueError: a task has too few.
    """
    for task, every in prompts.items():
        if len(every) < start + count:
            raise ValueError(f"{task} has {len(every)} prompts, this needs {start + count}")
    return {task: every[start : start + count] for task, every in prompts.items()}


# -- measuring --------------------------------------------------------------------------------------------


def counters_of(page: str) -> dict[str, float]:
    """The counters that matter on a page of metrics, over all labels; `NAME[POSITION]` where there is one."""
    found: dict[str, float] = defaultdict(float)
    for line in page.splitlines():
        name = line.split("{", 1)[0].split(" ", 1)[0]
        spec = name.startswith(("vllm:spec_decode_", OWN)) and name.endswith("_total")
        if spec or name in (GENERATED, LATER_STEPS):
            _, _, position = line.partition('position="')
            key = f"{name}[{position.split(chr(34), 1)[0]}]" if position else name
            found[key] += float(line.rsplit(" ", 1)[1])
    return dict(found)


def growth(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    return {name: value - before.get(name, 0.0) for name, value in after.items()}


def block_size_of(page: str) -> int | None:
    """Tokens of a block of the KV cache, from the labels of vLLM's `cache_config_info`."""
    for line in page.splitlines():
        if line.startswith("vllm:cache_config_info{"):
            _, _, rest = line.partition('block_size="')
            digits = rest.split('"', 1)[0]
            return int(digits) if digits.isdigit() else None
    return None


def ask(server: Server, prompt: Prompt, max_tokens: int) -> Answer:
    start = time.perf_counter()
    answer = server.chat(prompt.text, max_tokens=max_tokens)
    seconds = time.perf_counter() - start
    choice = answer["choices"][0]
    tokens = answer["usage"]["completion_tokens"]
    text = choice["message"]["content"] or ""
    return Answer(prompt.question, tokens, seconds, choice["finish_reason"], text)


def wave(server: Server, prompts: Sequence[Prompt], batch: int, max_tokens: int) -> Wave:
    before = counters_of(server.client.get("/metrics").text)
    with ThreadPoolExecutor(batch) as pool:
        start = time.perf_counter()
        answers = list(pool.map(lambda prompt: ask(server, prompt, max_tokens), prompts))
        seconds = time.perf_counter() - start
    expected = sum(answer.tokens for answer in answers)
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:  # the engine may answer a moment before it counts
        counters = growth(before, counters_of(server.client.get("/metrics").text))
        if counters.get(GENERATED, 0.0) >= expected or time.monotonic() > deadline:
            return Wave(seconds, answers, counters)
        time.sleep(0.05)


def wake(server: Server, batch: int) -> None:
    """The first requests of a process compile and allocate; these few tokens are no part of Spec-Bench."""
    prompts = [Prompt(-1, "", f"Say hello to guest number {guest}.") for guest in range(batch)]
    wave(server, prompts, batch, max_tokens=8)


def warm(server: Server, prompts: dict[str, list[Prompt]], batch: int, max_tokens: int) -> None:
    for task in prompts.values():
        wave(server, task, batch, max_tokens)


def speculation_of(method: str) -> dict[str, Any] | None:
    """What a method's server is told: vLLM's `speculative-config`, or Galley's `speculation`."""
    kind = method.removesuffix(WARM)
    return PEERS.get(kind) or ({"method": kind} if kind in GALLEY else None)


@contextlib.contextmanager
def serving(method: str) -> Iterator[tuple[Server, float]]:
    """The method's server, and the seconds until it was ready."""
    kind = method.removesuffix(WARM)
    environment = {}
    if kind == "suffix":
        others = os.environ.get("PYTHONPATH")
        environment["PYTHONPATH"] = os.pathsep.join([str(suffix_peer_path()), *([others] if others else [])])
    start = time.monotonic()
    if kind in GALLEY:
        flags = ("--compile", "off", "--speculation", json.dumps(speculation_of(kind)))
        scope = galley_worker(SETTINGS, *flags)
    else:
        config = speculation_of(kind)
        scope = plain_vllm({**SETTINGS, **({"speculative-config": config} if config else {})}, environment)
    with scope as server:
        server.client.timeout = ANSWER_SECONDS
        yield server, time.monotonic() - start


class Bench:
    """Cells and the prompts that they measure."""

    def __init__(self, prompts: dict[str, list[Prompt]], count: int, max_tokens: int) -> None:
        self._prompts = prompts
        self._count = count
        self._max_tokens = max_tokens

    def check(self, options: argparse.Namespace) -> None:
        """Stop what cannot be measured before it starts.

        Raises:
            ValueError: there are too few prompts.
            PeerError: vLLM's `suffix` needs a package that cannot be built here.
        """
        if options.quick:
            self.mixed(options.batches)
        else:
            warms = any(name.endswith(WARM) for name in options.methods)
            self.of_batch(max(options.batches), others=warms)
        if any(name.removesuffix(WARM) == "suffix" for name in options.methods):
            suffix_peer_path()

    def of_batch(self, batch: int, others: bool = False) -> dict[str, list[Prompt]]:
        """A wave for each task, none smaller than the batch that it is to fill; or as many other prompts."""
        count = max(self._count, batch)
        return stretch(self._prompts, count if others else 0, count)

    def mixed(self, batches: Sequence[int]) -> list[dict[str, list[Prompt]]]:
        """Waves for each batch size, with no prompt in two of them.

        Where the batch is larger than 1, one wave holds all tasks: together they fill it with fewer prompts.
        """
        found = []
        start = 0
        for batch in batches:
            count = max(self._count, -(-batch // len(self._prompts)))
            prompts = stretch(self._prompts, start, count)
            found.append(prompts if batch == 1 else {MIXED: in_turn(list(prompts.values()))})
            start += count
        return found

    def fresh(self, method: str, batch: int, repeat: int) -> Cell:
        """A cell in a process of its own."""
        with serving(method) as (server, seconds):
            wake(server, batch)
            if method.endswith(WARM):
                warm(server, self.of_batch(batch, others=True), batch, self._max_tokens)
            return self._cell(server, (method, batch, repeat), self.of_batch(batch), seconds)

    def shared(self, method: str, batches: Sequence[int], repeat: int) -> list[Cell]:
        """Cells of all batch sizes from one process, each with prompts that it has not seen."""
        with serving(method) as (server, seconds):
            wake(server, max(batches))
            return [
                self._cell(server, (method, batch, repeat), prompts, seconds)
                for batch, prompts in zip(batches, self.mixed(batches), strict=True)
            ]

    def _cell(
        self, server: Server, key: tuple[str, int, int], prompts: dict[str, list[Prompt]], seconds: float
    ) -> Cell:
        load = os.getloadavg()[0]
        size = block_size_of(server.client.get("/metrics").text)
        waves = {task: wave(server, every, key[1], self._max_tokens) for task, every in prompts.items()}
        return Cell(*key, waves, size, round(seconds, 1), round(load, 2), commit())


# -- an interrupted run -----------------------------------------------------------------------------------


class Work:
    """Measured cells in a file, one a line below a line that says how they were measured.

    Args:
        header: what all cells have in common; a run goes on only with the same.

    Raises:
        ValueError: the file is there and `resume` is not set, or it was measured otherwise.
    """

    def __init__(self, path: Path, header: dict[str, Any], resume: bool) -> None:
        self._path = path
        self.cells: list[Cell] = []
        if path.exists():
            if not resume:
                raise ValueError(f"{path} holds an interrupted run: go on with --resume, or remove it")
            self._read(header)
        path.parent.mkdir(exist_ok=True)
        lines = [header, *map(asdict, self.cells)]
        partial = path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        partial.replace(path)

    def _read(self, header: dict[str, Any]) -> None:
        lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True)
        whole = [json.loads(line) for line in lines if line.endswith("\n")]
        if not whole or whole[0] != json.loads(json.dumps(header)):
            raise ValueError(f"{self._path} was measured otherwise: remove it, or repeat that run's options")
        self.cells = [Cell.from_values(values) for values in whole[1:]]

    def add(self, cell: Cell) -> None:
        self.cells.append(cell)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(cell)) + "\n")

    def remove(self) -> None:
        self._path.unlink()


def seconds_left(done: Sequence[tuple[int, float]], todo: Sequence[int]) -> float:
    """Seconds that the cells to do will take, by what cells took at the same batch size, or at any."""
    if not done:
        return 0.0
    every = statistics.fmean(seconds for _, seconds in done)
    by_batch: dict[int, list[float]] = defaultdict(list)
    for batch, seconds in done:
        by_batch[batch].append(seconds)
    return sum(statistics.fmean(by_batch[batch]) if batch in by_batch else every for batch in todo)


# -- figures ----------------------------------------------------------------------------------------------

Rates = dict[tuple[str, int], dict[str, float]]


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


# -- the command ------------------------------------------------------------------------------------------


def read_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="Spec-Bench's JSONL; default: below $GALLEY_DATA")
    parser.add_argument("--prompts", type=int, help="of each task, and at least the batch size; default 6")
    parser.add_argument("--repeats", type=int, help="default 3")
    parser.add_argument("--max-tokens", type=int, help="of an answer; default 128")
    parser.add_argument("--methods", help=f"comma-separated; default {','.join(METHODS)}")
    parser.add_argument("--batches", help=f"comma-separated; default {','.join(map(str, BATCHES))}")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    parser.add_argument(
        "--quick", action="store_true", help="one process for a method's cells, under 4 minutes on 2 cores"
    )
    options = parser.parse_args(arguments)
    quick = options.quick
    options.prompts = options.prompts or (QUICK_PROMPTS if quick else 6)
    options.repeats = options.repeats or (1 if quick else 3)
    options.max_tokens = options.max_tokens or (QUICK_TOKENS if quick else 128)
    methods = options.methods.split(",") if options.methods else (QUICK_METHODS if quick else METHODS)
    unknown = [name for name in methods if name != BASE and speculation_of(name) is None]
    if unknown:
        parser.error(f"--methods: found {', '.join(unknown)}, expected some of {', '.join(METHODS)}")
    options.methods = list(dict.fromkeys((BASE, *methods)))
    try:
        named = map(int, options.batches.split(",")) if options.batches else ()
        options.batches = list(dict.fromkeys(named)) or list(QUICK_BATCHES if quick else BATCHES)
    except ValueError:
        parser.error(f"--batches: found {options.batches}, expected numbers")
    if min(options.prompts, options.repeats, options.max_tokens, *options.batches) < 1:
        parser.error("--prompts, --repeats, --max-tokens and --batches are at least 1")
    if quick and (options.resume or any(name.endswith(WARM) for name in options.methods)):
        parser.error(f"--quick has neither --resume nor methods that end in {WARM}")
    return options


def run_quick(bench: Bench, options: argparse.Namespace) -> list[Cell]:
    cells = []
    for repeat in range(options.repeats):
        for method in options.methods:
            start = time.monotonic()
            cells += bench.shared(method, options.batches, repeat)
            console.print(f"{method}: {time.monotonic() - start:.0f} s")
    return cells


def run_fresh(bench: Bench, options: argparse.Namespace, work: Work) -> list[Cell]:
    known = {cell.key for cell in work.cells}
    plan = [
        (method, batch, repeat)
        for repeat in range(options.repeats)
        for batch in options.batches
        for method in options.methods
        if (method, batch, repeat) not in known
    ]
    done: list[tuple[int, float]] = []
    for position, (method, batch, repeat) in enumerate(plan):
        start = time.monotonic()
        cell = bench.fresh(method, batch, repeat)
        work.add(cell)
        done.append((batch, time.monotonic() - start))
        rate = statistics.fmean(measured.tokens_per_second for measured in cell.waves.values())
        left = seconds_left(done, [later for _, later, _ in plan[position + 1 :]])
        console.print(
            f"{position + 1}/{len(plan)} {method}, batch {batch}, repeat {repeat + 1}: "
            f"{rate:.1f} tokens/s, {done[-1][1]:.0f} s; left: {timedelta(seconds=round(left))}"
        )
    return work.cells


def main() -> None:
    options = read_options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # servers end with their scopes
    name = "bench_speculation.quick" if options.quick else "bench_speculation"
    try:
        path = data_path(options.data, os.environ)
        content = path.read_bytes()
        prompts = load_prompts(content.decode().splitlines())
        bench = Bench(prompts, options.prompts, options.max_tokens)
        bench.check(options)
        settings = {
            "prompts": options.prompts,
            "max_tokens": options.max_tokens,
            "engine": SETTINGS,
            "data_sha256": hashlib.sha256(content).hexdigest(),
            "versions": versions(),
        }
        work = None if options.quick else Work(RESULTS / f"{name}.cells.jsonl", settings, options.resume)
    except (OSError, ValueError, PeerError) as error:
        sys.exit(f"bench_speculation: {error}")
    arguments = {**vars(options), "data": path.name}
    report = Report(name, arguments)
    cells = run_quick(bench, options) if work is None else run_fresh(bench, options, work)
    report.add("settings", settings)
    report.add("methods", {method: speculation_of(method) for method in options.methods})
    report.add("cells", {f"{cell.method} b{cell.batch} r{cell.repeat}": cell.summary() for cell in cells})
    table = markdown(cells)
    report.add("tables", {"markdown": table.splitlines()})
    print(table, flush=True)
    report.finish({"fresh_process_per_cell": not options.quick, **figures_of(cells)})
    if work is not None:
        work.remove()


if __name__ == "__main__":
    main()
