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
import os
import signal
import statistics
import sys
import time
from collections import defaultdict
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parents[1]))

from loadtest.harness import RESULTS, Report, commit, console
from loadtest.specbench import Prompt, data_path, in_turn, load_prompts, stretch
from loadtest.speculation_cells import Cell, Work, block_size_of, wake, warm, wave
from loadtest.speculation_figures import figures_of, markdown
from loadtest.speculation_servers import (
    BASE,
    METHODS,
    OURS,
    OWN_BASE,
    WARM,
    serving,
    settings_of,
    speculation_of,
)
from loadtest.suffix_peer import PeerError, suffix_peer_path

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loadtest.servers import Server

QUICK_METHODS = (BASE, "suffix", OURS)  # no time for vLLM's n-grams, so its suffixes are the best peer
BATCHES, QUICK_BATCHES = (1, 4, 8, 16), (1, 8)
QUICK_PROMPTS, QUICK_TOKENS = 1, 48
MIXED = "all tasks"


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


def seconds_left(done: Sequence[tuple[int, float]], todo: Sequence[int]) -> float:
    """Seconds that the cells to do will take, by what cells took at the same batch size, or at any."""
    if not done:
        return 0.0
    every = statistics.fmean(seconds for _, seconds in done)
    by_batch: dict[int, list[float]] = defaultdict(list)
    for batch, seconds in done:
        by_batch[batch].append(seconds)
    return sum(statistics.fmean(by_batch[batch]) if batch in by_batch else every for batch in todo)


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
    unknown = [name for name in methods if name not in (BASE, OWN_BASE) and speculation_of(name) is None]
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
        settings = settings_of(content, prompts=options.prompts, max_tokens=options.max_tokens)
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
