"""Tokens a second through servers with a memory and without, and whether a weight of 0 changes nothing."""

from __future__ import annotations

import json
from statistics import median
from typing import TYPE_CHECKING, Any

from loadtest.servers import galley_worker
from loadtest.turns import Wave, all_serving, awake, measure, values_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from loadtest.specbench import Prompt

SETTINGS: dict[str, Any] = {
    "max-model-len": 2048,
    "max-num-seqs": 16,
    "kv-cache-memory-bytes": 512 * 2**20,
}
PLAIN, MEMORY, SILENT = "plain", "memory", "memory_at_zero"
PER_WAVE, QUICK_PER_WAVE = {"b1": 3, "c8": 8}, {"b1": 1, "c8": 8}
IDENTICAL, QUICK_IDENTICAL, IDENTICAL_TOKENS = 4, 2, 32


def compare(
    memory: Path, prompts: Sequence[Prompt], dtype: str, repeats: int, max_tokens: int, *, quick: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Raw waves, and figures; the memory's share of the mix is the one that its build chose.

    Args:
        memory: folder of a build.
    """
    settings = {**SETTINGS, "dtype": dtype}
    same = QUICK_IDENTICAL if quick else IDENTICAL
    starters = {
        PLAIN: galley_worker(settings, "--tasks", "generate"),
        MEMORY: galley_worker(settings, "--tasks", "generate", "--memory", json.dumps({"path": str(memory)})),
    }
    with all_serving(starters) as running:
        servers = {**running, SILENT: running[MEMORY]}
        zero = {"vllm_xargs": {"memory_weight": 0.0}}
        answers = {}
        for name in (PLAIN, SILENT):
            with awake(servers[name]):
                fields = zero if name == SILENT else {}
                answers[name] = [
                    servers[name].chat(prompt.text, max_tokens=IDENTICAL_TOKENS, **fields)["choices"][0][
                        "message"
                    ]["content"]
                    for prompt in prompts[-same:]
                ]
        waves: list[Wave] = list(
            measure(
                servers,
                prompts[:-same],
                QUICK_PER_WAVE if quick else PER_WAVE,
                repeats,
                max_tokens,
                {SILENT: zero},
            )
        )
    raw = {"settings": settings, "waves": values_of(waves), "answers_at_zero": answers}
    return raw, {**figures_of(waves), "identical_at_zero": answers[PLAIN] == answers[SILENT]}


def figures_of(waves: Sequence[Wave]) -> dict[str, float]:
    """Medians of ratios of waves of the same prompts."""
    found: dict[str, float] = {}
    for load, end in (("b1", "b1"), ("c8", "b8")):
        speeds = {
            name: [wave.speed for wave in waves if (wave.server, wave.load) == (name, load)]
            for name in (PLAIN, MEMORY, SILENT)
        }
        for name, figure in ((MEMORY, "speed_with_memory"), (SILENT, "speed_at_zero")):
            pairs = zip(speeds[name], speeds[PLAIN], strict=True)
            found[f"{figure}_{end}"] = round(median(ours / plain for ours, plain in pairs), 3)
        found[f"tokens_per_second_plain_{end}"] = round(median(speeds[PLAIN]), 2)
    return found
