"""The model that is trained for, and its prompts as padded batches."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from galley_plugins.embedding.adapter import Base
from galley_plugins.speculation.store import tokenizer_hash

if TYPE_CHECKING:
    from collections.abc import Sequence

    from galley_plugins.embedding.prompts import Prompt

MAX_TOKENS = 512  # of a prompt; longer texts lose their end


@dataclass(frozen=True)
class BaseModel:
    """A decoder in float32, frozen, with its tokenizer.

    Attributes:
        language_model: of transformers, with its output layer.
        tokenizer: a fast one.
    """

    language_model: Any
    tokenizer: Any

    @classmethod
    def load(cls, place: str | os.PathLike[str]) -> BaseModel:
        """
        Args:
            place: a folder or a hub id.
        """
        from accelerate import PartialState
        from transformers import AutoModelForCausalLM, AutoTokenizer

        name = os.fspath(place)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
        device = PartialState().device
        return cls(model.eval().requires_grad_(False).to(device), AutoTokenizer.from_pretrained(name))

    @property
    def decoder(self) -> Any:
        return self.language_model.base_model

    @property
    def device(self) -> torch.device:
        return self.language_model.device

    @property
    def eos(self) -> int:
        """The end-of-text token.

        Raises:
            ValueError: the tokenizer has none.
        """
        if self.tokenizer.eos_token_id is None:
            raise ValueError("found a tokenizer without an end-of-text token, expected one")
        return int(self.tokenizer.eos_token_id)

    def describe(self) -> Base:
        return Base.of(self.language_model.config, tokenizer_hash(self.tokenizer))


@dataclass(frozen=True)
class Padded:
    """Token ids of several prompts; what follows a shorter one is arbitrary.

    Attributes:
        ids: int64 [prompts, longest]
        lengths: int64 [prompts]
    """

    ids: torch.Tensor
    lengths: torch.Tensor

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]], device: torch.device, fill: int = 0) -> Padded:
        ids = torch.full((len(rows), max(map(len, rows))), fill)
        for place, row in enumerate(rows):
            ids[place, : len(row)] = torch.tensor(row)
        return cls(ids.to(device), torch.tensor([len(row) for row in rows], device=device))

    @classmethod
    def of_prompts(cls, prompts: Sequence[Prompt], device: torch.device) -> Padded:
        return cls.of([prompt.ids for prompt in prompts], device)


def present(lengths: torch.Tensor, width: int) -> torch.Tensor:
    """bool [prompts, width]: where a prompt of that length has a token."""
    return torch.arange(width, device=lengths.device) < lengths[:, None]


def additive(seen: torch.Tensor) -> torch.Tensor:
    """An attention mask as transformers adds it.

    Args:
        seen: bool [prompts, queries, keys]

    Returns:
        float32 [prompts, 1, queries, keys], 0 or the lowest number.
    """
    mask = torch.zeros(seen.shape, device=seen.device)
    return mask.masked_fill_(~seen, torch.finfo(torch.float32).min).unsqueeze(1)
