"""Embeddings from transformers alone, to compare an engine's with."""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers import AutoModel, AutoTokenizer

from galley_plugins.models import resolve
from loadtest.servers import MODEL


@functools.cache
def _loaded() -> tuple[Any, Any]:
    folder = resolve(MODEL)
    return AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(
        folder, dtype=torch.float32
    ).eval()


@torch.no_grad()
def embed(text: str | list[int], pooling: str = "mean", dimensions: int | None = None) -> torch.Tensor:
    """[hidden] unit vector of one text, float32, computed alone and in one pass."""
    tokenizer, model = _loaded()
    ids = torch.tensor([tokenizer(text)["input_ids"] if isinstance(text, str) else text])
    hidden = model(ids).last_hidden_state[0]  # [tokens, hidden]
    vector = hidden.mean(0) if pooling == "mean" else hidden[-1]
    return torch.nn.functional.normalize(vector[:dimensions], dim=-1)


def cosine(vector: list[float], reference: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(torch.tensor(vector), reference, dim=0))


def token_count(text: str) -> int:
    return len(_loaded()[0](text)["input_ids"])
