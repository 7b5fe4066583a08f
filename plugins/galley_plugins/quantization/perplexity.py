"""Perplexity of a text under a model in transformers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def windows(ids: Sequence[int], count: int | None, length: int) -> list[list[int]]:
    """The first `count` windows of `length` tokens, one behind the other; None is all that are whole.

    Raises:
        ValueError: the text is too short.
    """
    wanted = max(len(ids) // length, 1) if count is None else count
    if len(ids) < wanted * length:
        raise ValueError(f"found {len(ids)} tokens, expected {wanted} windows of {length}")
    return [list(ids[place * length : (place + 1) * length]) for place in range(wanted)]


@torch.inference_mode()
def log_likelihoods(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """float32 [tokens - 1]: log-probability of each token but the first, in nats."""
    tokens = torch.tensor(ids, device=getattr(model, "device", None))
    logits = model(tokens[None]).logits[0, :-1].float()
    return -torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none")


def perplexity(
    model: Any, texts: Sequence[Sequence[int]], advance: Callable[[], None] | None = None
) -> float:
    """exp of the mean negative log-likelihood in nats; a text's first token is given.

    Args:
        texts: token ids.
        advance: told of each text that is done.
    """
    total = 0.0
    for ids in texts:
        total -= float(log_likelihoods(model, ids).double().sum())
        if advance is not None:
            advance()
    return math.exp(total / sum(len(ids) - 1 for ids in texts))
