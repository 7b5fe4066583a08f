#!/usr/bin/env python
"""Are greedy answers with speculation those without, token for token? On all of Spec-Bench, in float32.

First turns at temperature 0, to their end or 128 tokens, from as many concurrent clients as the batch is
large. Every answer is compared with the one of vLLM without speculation and without plugins.

Answers are kept in a work file as they come, so that a run that was stopped goes on where it was, and several
runs with different methods may share it: two, each bound to one core with `VLLM_CPU_OMP_THREADS_BIND`, get
through batch 1 sooner than one after the other. Cells of the last record that had the same settings stay in
the next, until as many prompts of theirs are compared again.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import signal
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from loadtest.harness import RESULTS, Report, commit, console
from loadtest.servers import NAME
from loadtest.specbench import Prompt, data_path, in_turn, load_prompts
from loadtest.speculation_servers import BASE, GALLEY, serving, settings_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from loadtest.servers import Server

REFERENCE = (BASE, 8)
BATCHES = (1, 8)
Key = tuple[str, int]


class Answers:
    """Token ids by (method, batch) and question, in a file of one line each below a line of settings.

    Raises:
        ValueError: the file was made with other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self._path = path
        self._commit = commit()
        self.found: dict[Key, dict[int, list[int]]] = defaultdict(dict)
        self.commits: set[str] = set()
        header = json.dumps(settings) + "\n"
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            if lines[0] != header:
                raise ValueError(f"{path} was made with other settings: remove it, or repeat them")
            if not lines[-1].endswith("\n"):  # stopped while writing
                with path.open("a", encoding="utf-8") as file:
                    file.write("\n")
            for line in lines[1:]:
                with contextlib.suppress(json.JSONDecodeError):  # the rest of a line that was not written
                    self._take(json.loads(line))
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_text(header, encoding="utf-8")

    def add(self, key: Key, question: int, tokens: list[int]) -> None:
        method, batch = key
        row = {
            "method": method,
            "batch": batch,
            "question": question,
            "tokens": tokens,
            "commit": self._commit,
        }
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self._take(row)

    def _take(self, row: dict[str, Any]) -> None:
        self.found[row["method"], row["batch"]][row["question"]] = row["tokens"]
        self.commits.add(row["commit"])


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """The first place where two answers differ, the shorter one's end included; None where they do not."""
    for place, (left, right) in enumerate(itertools.zip_longest(one, other)):
        if left != right:
            return place
    return None


def compare(found: dict[Key, dict[int, list[int]]]) -> dict[str, dict[str, Any]]:
    """By cell: how many answers were compared with the reference, and which differ where."""
    reference = found.get(REFERENCE, {})
    cells: dict[str, dict[str, Any]] = {}
    for (method, batch), answers in sorted(found.items()):
        if (method, batch) == REFERENCE:
            continue
        shared = sorted(answers.keys() & reference.keys())
        differing = {
            str(question): place
            for question in shared
            if (place := first_difference(answers[question], reference[question])) is not None
        }
        cells[f"{method} b{batch}"] = {
            "compared": len(shared),
            "identical": len(shared) - len(differing),
            "tokens": sum(len(answers[question]) for question in shared),
            "first_difference": differing,
        }
    return cells


def kept(record: Path, settings: dict[str, Any], found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Cells of an earlier record with the same settings that compared more than was found now.

    Each has the commits of the answers it was made of.
    """
    try:
        sections = json.loads(record.read_text(encoding="utf-8"))["sections"]
    except FileNotFoundError:
        return {}
    if sections["settings"] != settings:
        return {}
    commits = sections["commits"]["of_answers"]
    return {
        name: {"commits": commits, **cell}
        for name, cell in sections["cells"].items()
        if cell["compared"] > found.get(name, {"compared": 0})["compared"]
    }


def ask(server: Server, prompt: Prompt, max_tokens: int, **fields: Any) -> list[int]:
    body = {
        "model": NAME,
        "messages": [{"role": "user", "content": prompt.text}],
        "temperature": 0,
        "max_tokens": max_tokens,
        "return_token_ids": True,
        **fields,
    }
    answer = server.client.post("/v1/chat/completions", json=body)
    answer.raise_for_status()
    tokens: list[int] = answer.json()["choices"][0]["token_ids"]
    return tokens


def fill(answers: Answers, key: Key, prompts: Sequence[Prompt], max_tokens: int) -> None:
    """Ask for what is missing of a cell."""
    method, batch = key
    missing = [prompt for prompt in prompts if prompt.question not in answers.found[key]]
    if not missing:
        return
    with serving(method) as (server, _), _progress() as progress, ThreadPoolExecutor(batch) as pool:
        bar = progress.add_task(f"{method}, batch {batch}", total=len(missing))
        for prompt, tokens in zip(
            missing, pool.map(lambda prompt: ask(server, prompt, max_tokens), missing), strict=True
        ):
            answers.add(key, prompt.question, tokens)
            progress.advance(bar)


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console)


def chosen(prompts: dict[str, list[Prompt]], count: int | None) -> Iterator[Prompt]:
    """Tasks in turn, so that a part of the run covers them all."""
    yield from in_turn([every[:count] for every in prompts.values()])


def read_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="Spec-Bench's JSONL; default: below $GALLEY_DATA")
    parser.add_argument("--prompts", type=int, help="of each task; default all 80")
    parser.add_argument("--max-tokens", type=int, default=128, help="of an answer; default 128")
    parser.add_argument("--methods", default=",".join(GALLEY), help="comma-separated; default %(default)s")
    parser.add_argument(
        "--batches", default=",".join(map(str, BATCHES)), help="comma-separated; default %(default)s"
    )
    parser.add_argument("--quick", action="store_true", help="hybrid at batch 8, 2 prompts of each task")
    options = parser.parse_args(arguments)
    if options.quick:
        options.prompts, options.max_tokens, options.methods, options.batches = 2, 48, "hybrid", "8"
    options.methods = options.methods.split(",")
    unknown = sorted(set(options.methods) - {*GALLEY, BASE})
    if unknown:
        parser.error(f"--methods: found {', '.join(unknown)}, expected some of {', '.join(GALLEY)}")
    try:
        options.batches = [int(batch) for batch in options.batches.split(",")]
    except ValueError:
        parser.error(f"--batches: found {options.batches}, expected numbers")
    if min(*options.batches, options.max_tokens, options.prompts or 1, 1) < 1:
        parser.error("--prompts, --max-tokens and --batches are at least 1")
    return options


def main() -> None:
    options = read_options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # servers end with their scopes
    name = "check_lossless.quick" if options.quick else "check_lossless"
    try:
        path = data_path(options.data, os.environ)
        content = path.read_bytes()
        prompts = list(chosen(load_prompts(content.decode().splitlines()), options.prompts))
        settings = settings_of(content, max_tokens=options.max_tokens)
        answers = Answers(RESULTS / f"{name}.cells.jsonl", settings)
    except (OSError, ValueError) as error:
        sys.exit(f"check_lossless: {error}")
    report = Report(name, {**vars(options), "data": path.name})
    cells = [(method, batch) for batch in options.batches for method in options.methods if method != BASE]
    for key in (REFERENCE, *cells):
        fill(answers, key, prompts, options.max_tokens)
    found = compare(answers.found)
    found = dict(sorted({**found, **kept(RESULTS / f"{name}.json", settings, found)}.items()))
    report.add("settings", settings)
    report.add("cells", found)
    report.add("commits", {"of_answers": sorted(answers.commits)})
    report.finish(
        {
            "identical": bool(found)
            and all(cell["compared"] == cell["identical"] for cell in found.values()),
            "compared": sum(cell["compared"] for cell in found.values()),
            "cells": {key: f"{cell['identical']}/{cell['compared']}" for key, cell in found.items()},
        }
    )


if __name__ == "__main__":
    main()
