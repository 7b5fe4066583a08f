"""Causal2Vec's contextual token (arXiv 2507.23386): a small bidirectional encoder reads the text, and an MLP
turns what it says into one embedding of the decoder, which is put before the text.

The paper names a BERT-style encoder and an MLP. What it leaves open is a choice here: the encoder's output is
its mean over the text's tokens, scaled to the root of its size, the MLP has one hidden layer with GELU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

MAX_TOKENS = 256  # of the encoder, a text's rest is seen by the decoder alone


class ContextEncoder(nn.Module):
    """From the encoder's token ids to contextual tokens.

    Args:
        encoder: a model of transformers with `last_hidden_state`.
        hidden_size: d of the decoder.
    """

    def __init__(self, encoder: Any, hidden_size: int) -> None:
        super().__init__()
        self.encoder = encoder.eval().requires_grad_(False)
        size = encoder.config.hidden_size
        self.projection = nn.Sequential(
            nn.Linear(size, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size)
        )

    @classmethod
    def load(
        cls, folder: Path, hidden_size: int, tensors: Mapping[str, torch.Tensor] | None = None
    ) -> ContextEncoder:
        """The encoder of a folder, with a projection of `tensors` if there are any.

        Raises:
            ValueError: a tensor is missing or of another shape.
        """
        from transformers import AutoModel

        own = cls(AutoModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True), hidden_size)
        if tensors is not None:
            try:
                own.projection.load_state_dict(
                    {
                        name.removeprefix("projection."): tensor
                        for name, tensor in tensors.items()
                        if name.startswith("projection.")
                    }
                )
            except RuntimeError as error:
                raise ValueError(f"projection: {' '.join(str(error).split())}") from None
        return own

    def forward(self, ids: Sequence[Sequence[int]]) -> torch.Tensor:
        """[texts, d], one row for each text's ids."""
        return self.projection(self.summaries(ids))

    @torch.no_grad()
    def summaries(self, ids: Sequence[Sequence[int]]) -> torch.Tensor:
        """[texts, encoder size] before the projection; the encoder itself is not trained."""
        device = self.projection[0].weight.device
        length = max(map(len, ids))
        rows = torch.zeros(len(ids), length, dtype=torch.int64)
        mask = torch.zeros(len(ids), length, dtype=torch.int64)
        for place, text in enumerate(ids):
            rows[place, : len(text)] = torch.tensor(text)
            mask[place, : len(text)] = 1
        mask = mask.to(device)
        states = self.encoder(input_ids=rows.to(device), attention_mask=mask).last_hidden_state
        weights = mask.unsqueeze(-1).to(states.dtype)
        means = (states * weights).sum(1) / weights.sum(1)
        return nn.functional.normalize(means, dim=-1) * means.shape[-1] ** 0.5


def encoder_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts as the encoder reads them, cut to what it can."""
    if not texts:
        return []
    limit = min(MAX_TOKENS, tokenizer.model_max_length)
    ids: list[list[int]] = tokenizer(list(texts), truncation=True, max_length=limit)["input_ids"]
    return ids
