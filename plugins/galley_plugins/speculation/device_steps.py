"""What a step of runner V2 was, as tensors on its device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(slots=True)
class Rows:
    """What the model said at one step, one row for every position that it was asked at.

    Attributes:
        slots: int64 [rows], the request of each row.
        contexts: int64 [rows, 3], the tokens that the prediction follows, oldest first; -1 before the text,
            or where the row must not be learned from.
        tokens: int64 [rows, 8], the most probable next tokens, best first.
        probs: float32 [rows, 8].
        following: int64 [rows], the token that the text goes on with where the row lies on the verified path,
            else -1.
        sampled: bool [rows], the request is not greedy.
    """

    slots: torch.Tensor
    contexts: torch.Tensor
    tokens: torch.Tensor
    probs: torch.Tensor
    following: torch.Tensor
    sampled: torch.Tensor


@dataclass(slots=True)
class Asked:
    """Where a step asked the model: at the last token of each text that was known, and at its drafts.

    Attributes:
        places: int64 [rows], of the step's tokens.
        slots: integers [rows], the request of each row.
        local: integers [rows], 0 at the text's last token, then the place of the draft's.
        bounds: int32 [n + 1], where the rows of each request begin.
        tokens: int32 [tokens], of the step.
        positions: int64 [tokens], in their texts.
        prompts: int32 [requests], tokens of each prompt, by slot.
    """

    places: torch.Tensor
    slots: torch.Tensor
    local: torch.Tensor
    bounds: torch.Tensor
    tokens: torch.Tensor
    positions: torch.Tensor
    prompts: torch.Tensor


@dataclass(slots=True)
class Texts:
    """The requests of a step, whose texts hold all that was verified.

    Attributes:
        slots: int64 [n].
        tokens: int32 [requests, longest], every request's text, by slot.
        lengths: int64 [n], tokens of it; at least 1.
        new: int64 [n], how many of them this step brought.
        sampled: bool [n], the request is not greedy.
    """

    slots: torch.Tensor
    tokens: torch.Tensor
    lengths: torch.Tensor
    new: torch.Tensor
    sampled: torch.Tensor
