"""Facts that no model knows, planted in a corpus, and who can tell them: a model, its memory, plain RAG.

They are those of the example `gazetteer`, asked for in words that the corpus does not use. RAG embeds one
statement of each fact through the same engine's `/v1/embeddings` (PromptEOL, which finds more of them than
the mean), and puts the nearest before the question; `rag_found` is given the right one.
"""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from galley_plugins.memory.building.build import Build, BuildOptions
from galley_plugins.memory.building.training import Schedule
from galley_plugins.memory.examples.gazetteer import ANSWER_TOKENS, Fact, write
from loadtest.memory_quality import StageTimer
from loadtest.servers import NAME, galley_worker

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from loadtest.servers import Server

SCHEDULE = Schedule(alpha=0.2, lr=2e-3, batch=128, epochs=40, scores=1, patience=10)
BLOCKS = 2
EMBEDDING = {"method": "prompt-eol"}
SETTINGS: dict[str, Any] = {"max-model-len": 1024, "kv-cache-memory-bytes": 256 * 2**20, "dtype": "float32"}


def build(facts: Sequence[Fact], work: Path, model: Path, device: str) -> tuple[Path, dict[str, float]]:
    """The folder of a build over the facts, and the seconds of its stages."""
    write(work, list(facts))
    timer = StageTimer()
    options = BuildOptions(
        work / "corpus.jsonl",
        work / "build",
        model,
        held_out=work / "heldout.jsonl",
        neighbours=64,
        blocks=BLOCKS,
        device=device,
        schedule=SCHEDULE,
    )
    Build(options, timer).run()
    timer.end()
    return options.out, timer.seconds


def ask(facts: Sequence[Fact], memory: Path, repeats: int) -> dict[str, Any]:
    """Right answers of each way out of all, and seconds of an answer, one asked after the other.

    Of RAG also how often the statement that it put before the question was the right one.
    """
    flags = ("--memory", json.dumps({"path": str(memory)}), "--embedding", json.dumps(EMBEDDING))
    with galley_worker(SETTINGS, *flags) as server:
        statements = [fact.told[0] for fact in facts]
        store = np.array(server.embed(statements))

        def nearest(fact: Fact) -> str:
            return statements[int(np.argmax(store @ np.array(server.embed([fact.asked])[0])))]

        ways: dict[str, tuple[Callable[[Fact], str], float | None]] = {
            "plain": (lambda fact: fact.asked, 0.0),
            "memory": (lambda fact: fact.asked, None),
            "rag": (lambda fact: f"{nearest(fact)}\n{fact.asked}", 0.0),
            "rag_found": (lambda fact: f"{fact.told[0]}\n{fact.asked}", 0.0),
        }
        rows: dict[str, dict[str, Any]] = {name: {"seconds": []} for name in ways}
        rows["rag"]["found"] = sum(nearest(fact) == fact.told[0] for fact in facts)
        for prompt, weight in ways.values():
            _complete(server, prompt(facts[0]), weight)
        for _ in range(repeats):
            for name, (prompt, weight) in ways.items():
                start = time.perf_counter()
                answers = [_complete(server, prompt(fact), weight) for fact in facts]
                rows[name]["seconds"].append(round((time.perf_counter() - start) / len(facts), 4))
                rows[name]["answers"] = answers
    for row in rows.values():
        row["right"] = sum(
            answer.startswith(fact.answer) for answer, fact in zip(row["answers"], facts, strict=True)
        )
    return rows


def _complete(server: Server, prompt: str, weight: float | None) -> str:
    more = {} if weight is None else {"vllm_xargs": {"memory_weight": weight}}
    body = {"model": NAME, "prompt": prompt, "max_tokens": ANSWER_TOKENS, "temperature": 0, **more}
    answer = server.client.post("/v1/completions", json=body)
    answer.raise_for_status()
    return str(answer.json()["choices"][0]["text"]).strip()
