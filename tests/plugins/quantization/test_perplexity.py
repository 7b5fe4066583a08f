from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from galley_plugins.quantization.perplexity import log_likelihoods, perplexity, windows


class Uniform(torch.nn.Module):
    """Knows nothing: every one of eight tokens is as likely."""

    def forward(self, ids: torch.Tensor) -> Any:
        return type("Output", (), {"logits": torch.zeros(*ids.shape, 8)})


class Halves(torch.nn.Module):
    """Gives the token after the one before a half, the other two a quarter each."""

    def forward(self, ids: torch.Tensor) -> Any:
        after = torch.nn.functional.one_hot((ids + 1) % 3, 3).float()
        return type("Output", (), {"logits": after * math.log(2)})


def test_a_model_that_knows_nothing_is_as_perplexed_as_there_are_tokens() -> None:
    assert perplexity(Uniform(), [[0, 1, 2], [3, 4]]) == pytest.approx(8)


def test_a_token_is_judged_by_the_row_before_it() -> None:
    found = log_likelihoods(Halves(), [0, 1, 0, 2])
    assert found.exp().tolist() == pytest.approx([1 / 2, 1 / 4, 1 / 4])
    told: list[None] = []
    assert perplexity(Halves(), [[0, 1], [1, 0, 1]], lambda: told.append(None)) == pytest.approx(
        16 ** (1 / 3)
    )
    assert len(told) == 2


def test_windows_follow_one_another() -> None:
    assert windows(range(10), count=2, length=4) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert windows(range(10), count=None, length=3) == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    with pytest.raises(ValueError, match="found 10 tokens, expected 3 windows of 4"):
        windows(range(10), count=3, length=4)
    with pytest.raises(ValueError, match="found 10 tokens, expected 1 windows of 16"):
        windows(range(10), count=None, length=16)
