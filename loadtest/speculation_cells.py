"""Cells of a benchmark of speculation: waves of prompts through a server."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from loadtest.specbench import Prompt

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from loadtest.servers import Server

SETTLE_SECONDS = 5.0
GENERATED = "vllm:generation_tokens_total"
LATER_STEPS = "vllm:inter_token_latency_seconds_count"  # steps that gave a request tokens, but its first
OWN = "galley_speculation_"


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
