"""Prompts of the kinds that Spec-Bench has, for comparisons with and without speculation.

The benchmark's own file is taken where `$GALLEY_DATA` has it; these stand in for it elsewhere.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

_TOPICS = (
    "bees", "lighthouses", "bicycles", "volcanoes", "printing", "tea", "glaciers", "clocks", "bridges", "owls",
)  # fmt: skip
_SENTENCES = (
    "The old harbour was quiet when the first ships came in.",
    "She had never seen so many books in one room.",
    "Our train leaves at seven and arrives before noon.",
    "The committee will meet again on the third of March.",
    "Nobody knew why the river had changed its course.",
    "The bread must rest for an hour before it is baked.",
    "He forgot his umbrella and came home wet.",
    "Three of the five samples showed the same result.",
    "The museum is closed on Mondays and public holidays.",
    "A good map is worth more than a fast horse.",
)
_PASSAGE = (
    "In the town of Hallen the council planted {number} lime trees along the {topic} road in 1904. The trees grew "
    "slowly, because the soil was poor, and by 1930 only half of them were left. The council then dug a ditch, "
    "brought water from the mill, and planted the missing trees again. Today the road is known for its shade, "
    "and people come from other towns to walk there on Sundays."
)


def _own() -> list[str]:
    prompts = []
    for index, (topic, sentence) in enumerate(zip(_TOPICS, _SENTENCES, strict=True)):
        passage = _PASSAGE.format(number=20 + 7 * index, topic=topic)
        prompts += [
            f"Write a short blog post about {topic}, with three practical tips.",
            f"Translate English to German: {sentence}",
            f"Summarize: {passage}\nTL;DR:",
            f"What are {topic} good for?",
            f"A shop sells {topic} at {index + 3} dollars each. Ann buys {index + 4} and pays with a "
            f"{(index + 3) * (index + 4) + 15} dollar note. How much change does she get? Explain step by step.",
            f"{passage}\n\nAnswer from the text: how many trees were planted in 1904, and why did they grow slowly?",
        ]
    return prompts


def spec_prompts(count: int) -> list[str]:
    """`count` prompts, the six kinds in turn; at most 60 of our own, at most 480 of the benchmark's."""
    folder = os.environ.get("GALLEY_DATA")
    path = Path(folder) / "spec" / "specbench.jsonl" if folder else None
    if path is None or not path.is_file():
        return _own()[:count]
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    stride = max(1, len(rows) // count)
    return [row["turns"][0] for row in rows[::stride]][:count]
