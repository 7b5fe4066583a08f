"""Spec-Bench (arXiv 2401.07851): 480 prompts of six tasks, read from its own JSONL file."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

TASKS = {
    **dict.fromkeys(
        ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"), "mt_bench"
    ),
    **{task: task for task in ("translation", "summarization", "qa", "math_reasoning", "rag")},
}


@dataclass(frozen=True)
class Prompt:
    question: int
    category: str
    text: str


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
