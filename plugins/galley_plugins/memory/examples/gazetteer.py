"""A memory of made-up facts: write a corpus, build a memory of it, ask a served model with it and without.

    python gazetteer.py write gazetteer
    galley memory build gazetteer/corpus.jsonl gazetteer/build --held-out-text gazetteer/heldout.jsonl \\
        --blocks 2 --neighbours 64 --lr 2e-3 --batch 128 --epochs 40 --scores 1 --patience 10

A model with `memory: {path: gazetteer/build}` in galley.yaml then knows them:

    galley serve galley.yaml
    python gazetteer.py ask gazetteer

A fact is a code, a date or a mayor of a place that is nowhere else. The corpus says each in eight ways, and
it is asked for in a ninth.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx
from rich.console import Console
from rich.table import Table

FACTS = 60
ANSWER_TOKENS = 12
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


def write(folder: Path, facts: list[Fact]) -> None:
    """Write the corpus, a held-out text that says each fact in other words, and the questions."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "corpus.jsonl": [{"text": text} for fact in facts for text in fact.told],
        "heldout.jsonl": [{"text": fact.held_out} for fact in facts],
        "questions.jsonl": [asdict(fact) for fact in facts],
    }
    for name, rows in files.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def ask(folder: Path, url: str, model: str, key: str) -> int:
    """Print each answer with the memory and without; how many are right with it."""
    lines = (folder / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    facts = [Fact(**json.loads(line)) for line in lines]
    table = Table("asked", "answer", "without the memory", "with it")
    right = {"without": 0, "with": 0}
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=300) as client:
        for fact in facts:
            said = {}
            for way, more in (("without", {"vllm_xargs": {"memory_weight": 0}}), ("with", {})):
                body = {"model": model, "prompt": fact.asked, "max_tokens": ANSWER_TOKENS, "temperature": 0}
                answer = client.post("/v1/completions", json={**body, **more})
                answer.raise_for_status()
                said[way] = answer.json()["choices"][0]["text"].strip()
                right[way] += said[way].startswith(fact.answer)
            table.add_row(fact.asked, fact.answer, said["without"], said["with"])
    Console().print(table)
    print(f"right: {right['without']} of {len(facts)} without the memory, {right['with']} with it")
    return right["with"]


def main() -> None:
    parser = argparse.ArgumentParser(description="A memory of made-up facts.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("write", "write the corpus and the questions"), ("ask", "ask a running server")):
        command = commands.add_parser(name, help=text)
        command.add_argument("folder", type=Path)
        if name == "write":
            command.add_argument("--facts", type=int, default=FACTS, help="1 to 120; default: %(default)s")
        else:
            command.add_argument("--url", default="http://127.0.0.1:8000", help="default: %(default)s")
            command.add_argument("--model", default="smollm2", help="default: %(default)s")
            command.add_argument("--key", default="none", help="an API key, if the server asks for one")
    options = parser.parse_args()
    try:
        if options.command == "write":
            if not 1 <= options.facts <= len(_STARTS) * len(_ENDS):
                sys.exit(f"error: --facts: found {options.facts}, expected 1 to {len(_STARTS) * len(_ENDS)}")
            write(options.folder, make_facts(options.facts))
        else:
            ask(options.folder, options.url, options.model, options.key)
    except OSError as error:
        sys.exit(f"error: {error}")
    except httpx.HTTPError as error:
        sys.exit(f"error: {options.url}: {error}")


if __name__ == "__main__":
    main()
