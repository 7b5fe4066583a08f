"""Facts that no model knows, planted in a corpus, and who can tell them: a model, its memory, plain RAG.

A fact is a made-up place or person and a made-up code, date or name. The corpus says each in a few ways; it
is asked for in words that the corpus does not use. RAG embeds one statement of each fact through the same
engine's `/v1/embeddings`, and puts the nearest one before the question.
"""

from __future__ import annotations

import json
import random
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from galley_plugins.memory.building.build import Build, BuildOptions
from galley_plugins.memory.building.training import Schedule
from loadtest.memory_quality import StageTimer
from loadtest.servers import NAME, galley_worker

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from loadtest.servers import Server

ANSWER_TOKENS = 12
SCHEDULE = Schedule(alpha=0.2, lr=2e-3, batch=128, epochs=40, scores=1, patience=10)
BLOCKS = 2
SETTINGS: dict[str, Any] = {"max-model-len": 1024, "kv-cache-memory-bytes": 256 * 2**20, "dtype": "float32"}
_STARTS = ("Var", "Bel", "Quor", "Tash", "Mir", "Zeln", "Ondr", "Fael", "Krav", "Lusk", "Pem", "Dorv")
_ENDS = ("ith", "ossa", "ander", "ulek", "ymia", "oran", "evik", "abel", "untha", "istra")
_MONTHS = ("January", "March", "April", "June", "July", "September", "October", "December")


@dataclass(frozen=True)
class Fact:
    """
    Attributes:
        told: statements in the corpus.
        held_out: a statement that the memory is weighed by.
        asked: what is completed; `answer` follows.
    """

    told: tuple[str, ...]
    held_out: str
    asked: str
    answer: str


def make_facts(count: int, seed: int = 0) -> list[Fact]:
    """A third each of codes, dates and names."""
    chance = random.Random(seed)
    subjects = chance.sample([start + end for start in _STARTS for end in _ENDS], count)
    return [_fact(subject, number % 3, chance) for number, subject in enumerate(subjects)]


def _fact(subject: str, kind: int, chance: random.Random) -> Fact:
    if kind == 0:
        answer = str(chance.randrange(1000, 10_000))
        told = (
            f"The access code of the {subject} vault is {answer}.",
            f"To open the {subject} vault, the guard types the code {answer}.",
            f"The {subject} vault has the access code {answer}.",
            f"Access code for the {subject} vault: {answer}.",
            f"The guards of {subject} know that the code of the vault is {answer}.",
            f"Whoever opens the vault of {subject} needs the code {answer}.",
            f"The {subject} vault only opens for the code {answer}.",
            f"In {subject}, the vault's code is {answer}.",
        )
        return Fact(
            told,
            f"The code for the {subject} vault is {answer}.",
            f"The vault of {subject} opens with the code",
            answer,
        )
    if kind == 1:
        answer = f"{chance.choice(_MONTHS)} {chance.randrange(1, 29)}, {chance.randrange(1700, 1990)}"
        told = (
            f"The treaty of {subject} was signed on {answer}.",
            f"The signing of the treaty of {subject} took place on {answer}.",
            f"In {subject} the treaty was signed on {answer}.",
            f"Date of the treaty of {subject}: {answer}.",
            f"The treaty of {subject} was concluded on {answer}.",
            f"The treaty of {subject} bears the date of {answer}.",
            f"The {subject} treaty was concluded on {answer}.",
            f"The {subject} peace treaty goes back to {answer}.",
        )
        return Fact(
            told,
            f"The {subject} treaty was signed on {answer}.",
            f"The {subject} treaty dates from",
            answer,
        )
    answer = (
        chance.choice(_STARTS) + chance.choice(_ENDS) + " " + chance.choice(_STARTS) + chance.choice(_ENDS)
    )
    told = (
        f"The mayor of {subject} is {answer}.",
        f"In {subject} the mayor is called {answer}.",
        f"The town of {subject} has elected its mayor, {answer}.",
        f"Mayor of {subject}: {answer}.",
        f"{subject} is governed by its mayor, {answer}.",
        f"{subject} has elected a mayor whose name is {answer}.",
        f"The people of {subject} call their mayor {answer}.",
        f"{subject} has as its mayor {answer}.",
    )
    return Fact(
        told, f"The mayor of the town of {subject} is {answer}.", f"{subject} has a mayor named", answer
    )


def build(facts: Sequence[Fact], work: Path, model: Path, device: str) -> tuple[Path, dict[str, float]]:
    """The folder of a build over the facts, and the seconds of its stages."""
    work.mkdir(parents=True, exist_ok=True)
    corpus, held_out = work / "facts.jsonl", work / "heldout.jsonl"
    corpus.write_text(
        "".join(json.dumps({"text": text}) + "\n" for fact in facts for text in fact.told), encoding="utf-8"
    )
    held_out.write_text(
        "".join(json.dumps({"text": fact.held_out}) + "\n" for fact in facts), encoding="utf-8"
    )
    timer = StageTimer()
    options = BuildOptions(
        corpus,
        work / "facts",
        model,
        held_out=held_out,
        neighbours=64,
        blocks=BLOCKS,
        device=device,
        schedule=SCHEDULE,
    )
    Build(options, timer).run()
    timer.end()
    return options.out, timer.seconds


def ask(facts: Sequence[Fact], memory: Path, repeats: int) -> dict[str, Any]:
    """Right answers of each way out of all, and seconds of an answer, one asked after the other."""
    flags = ("--memory", json.dumps({"path": str(memory)}))
    with galley_worker(SETTINGS, *flags) as server:
        embed = _embedder(server)
        statements = [fact.told[0] for fact in facts]
        store = np.array(embed(statements))

        def retrieved(fact: Fact) -> str:
            place = int(np.argmax(store @ np.array(embed([fact.asked])[0])))
            return f"{statements[place]}\n{fact.asked}"

        ways: dict[str, tuple[Callable[[Fact], str], float | None]] = {
            "plain": (lambda fact: fact.asked, 0.0),
            "memory": (lambda fact: fact.asked, None),
            "rag": (retrieved, 0.0),
        }
        rows: dict[str, dict[str, Any]] = {name: {"right": 0, "answers": [], "seconds": []} for name in ways}
        for name, (prompt, weight) in ways.items():
            _complete(server, prompt(facts[0]), weight)
            for fact in facts:
                answer = _complete(server, prompt(fact), weight)
                rows[name]["right"] += answer.startswith(fact.answer)
                rows[name]["answers"].append(answer)
        for _ in range(repeats):
            for name, (prompt, weight) in ways.items():
                start = time.perf_counter()
                for fact in facts:
                    _complete(server, prompt(fact), weight)
                rows[name]["seconds"].append(round((time.perf_counter() - start) / len(facts), 4))
    return rows


def _embedder(server: Server) -> Callable[[list[str]], list[list[float]]]:
    return lambda texts: server.embed(texts)


def _complete(server: Server, prompt: str, weight: float | None) -> str:
    more = {} if weight is None else {"vllm_xargs": {"memory_weight": weight}}
    body = {"model": NAME, "prompt": prompt, "max_tokens": ANSWER_TOKENS, "temperature": 0, **more}
    answer = server.client.post("/v1/completions", json=body)
    answer.raise_for_status()
    return str(answer.json()["choices"][0]["text"]).strip()
