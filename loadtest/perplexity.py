"""Perplexity of a text under a running server, by the log-probabilities of prompts."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from loadtest.servers import NAME

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loadtest.servers import Server


def perplexity(server: Server, texts: Sequence[list[int]]) -> float:
    """exp of the mean negative log-likelihood in nats; a text's first token is given.

    Args:
        texts: token ids, each at most as long as the server takes.
    """
    likelihoods = [value for ids in texts for value in log_likelihoods(prompt_logprobs(server, ids), ids)]
    return math.exp(-math.fsum(likelihoods) / len(likelihoods))


def log_likelihoods(rows: Sequence[dict[str, dict[str, Any]] | None], ids: Sequence[int]) -> list[float]:
    """Of each token but the first, out of an answer's `prompt_logprobs`.

    Raises:
        ValueError: there are not as many rows as tokens.
    """
    if len(rows) != len(ids):
        raise ValueError(f"found log-probabilities of {len(rows)} tokens, expected {len(ids)}")
    return [row[str(token)]["logprob"] for row, token in zip(rows, ids, strict=True) if row is not None]


def prompt_logprobs(server: Server, ids: list[int], **fields: Any) -> list[dict[str, dict[str, Any]] | None]:
    """For each token of a prompt what its log-probability was; None for the first."""
    body: dict[str, Any] = {
        "model": NAME,
        "prompt": ids,
        "max_tokens": 1,
        "temperature": 0,
        "prompt_logprobs": 0,
    }
    body |= fields
    answer = server.client.post("/v1/completions", json=body)
    answer.raise_for_status()
    rows: list[dict[str, dict[str, Any]] | None] = answer.json()["choices"][0]["prompt_logprobs"]
    return rows
