"""Whether text stays sensible: what a quantized model thinks of the answers that the full one gives.

Greedy answers of the full weights to chats, scored token by token; both models run in transformers, in
float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from galley_plugins.quantization.perplexity import log_likelihoods

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence


@dataclass(frozen=True)
class Answer:
    """Token ids of a chat as the model reads it, and of what it wrote."""

    prompt: list[int]
    written: list[int]


@torch.inference_mode()
def greedy_answers(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    tokens: int,
    batch: int = 12,
    advance: Callable[[int], None] | None = None,
) -> list[Answer]:
    """What the model answers to each text as a chat; up to the end that it writes, which counts.

    Args:
        tokens: of an answer, at the most.
        batch: texts that are answered together, those of like length.
        advance: told how many more are done.
    """
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        for text in texts
    ]
    ends = model.generation_config.eos_token_id
    stops = set(ends if isinstance(ends, list) else [ends])
    found: dict[int, Answer] = {}
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    for start in range(0, len(order), batch):
        places = order[start : start + batch]
        width = max(len(prompts[place]) for place in places)
        ids = torch.zeros(len(places), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, place in enumerate(places):
            ids[row, width - len(prompts[place]) :] = torch.tensor(prompts[place])
            mask[row, width - len(prompts[place]) :] = 1
        out = model.generate(
            ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=min(stops),
        )
        for place, row in zip(places, out[:, width:].tolist(), strict=True):
            found[place] = Answer(prompts[place], until_end(row, stops))
        if advance is not None:
            advance(len(places))
    return [found[place] for place in range(len(prompts))]


def until_end(ids: Sequence[int], stops: set[int]) -> list[int]:
    """The ids up to the first stop, which is one of them."""
    last = next((place for place, token in enumerate(ids) if token in stops), len(ids) - 1)
    return list(ids[: last + 1])


def scores(model: Any, answers: Iterable[Answer]) -> list[list[float]]:
    """Of each answer the log-probabilities of its tokens, in nats."""
    found = []
    for answer in answers:
        rows = log_likelihoods(model, [*answer.prompt, *answer.written])
        found.append(rows[-len(answer.written) :].tolist())
    return found


def mean(rows: Sequence[Sequence[float]]) -> float:
    """Over all tokens."""
    return sum(map(sum, rows)) / sum(map(len, rows))
