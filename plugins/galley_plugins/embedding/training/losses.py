"""Losses of pairs of vectors, by sentence-transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from sentence_transformers.sentence_transformer.losses import CoSENTLoss, MultipleNegativesRankingLoss
from torch.nn import functional

from galley_plugins.embedding.training.data import ALIKE

if TYPE_CHECKING:
    from collections.abc import Sequence

SCALE = 20.0  # of cosines


def ranked(first: torch.Tensor, second: torch.Tensor, scores: Sequence[float]) -> torch.Tensor:
    """CoSENT: cosines in the order of the scores.

    Args:
        first, second: [pairs, d]
    """
    labels = torch.tensor(scores, device=first.device)
    return CoSENTLoss(None, SCALE).compute_loss_from_embeddings([first, second], labels)


def contrasted(
    first: torch.Tensor,
    second: torch.Tensor,
    others: torch.Tensor | None = None,
    scale: float | torch.Tensor = SCALE,
) -> torch.Tensor:
    """InfoNCE: each of `first` finds its own among `second` and `others`, by cosine.

    Args:
        first, second: [pairs, d]
        others: [texts, d]
    """
    loss = MultipleNegativesRankingLoss(None, scale)
    vectors = [first, second] if others is None else [first, second, others]
    return loss.compute_loss_from_embeddings(vectors, None)


def blended(
    first: torch.Tensor,
    second: torch.Tensor,
    scores: Sequence[float] | None,
    *,
    scale: float | torch.Tensor = SCALE,
    in_batch: bool = True,
) -> torch.Tensor:
    """What a batch of either kind asks for.

    Args:
        first, second: [pairs, d]
        scores: of the pairs; None if all are alike.
        in_batch: of scored pairs, contrast those that are alike with the others.
    """
    if scores is None:
        return contrasted(first, second, scale=scale)
    loss = ranked(first, second, scores)
    alike = torch.tensor([score >= ALIKE for score in scores], device=first.device)
    if in_batch and alike.any():
        loss = loss + contrasted(first[alike], second[alike], second[~alike], scale)
    return loss


def continued(states: torch.Tensor, head: torch.nn.Module, targets: torch.Tensor) -> torch.Tensor:
    """Next-token loss: each row predicts the token after its own.

    Args:
        states: [texts, tokens, d], last hidden states.
        head: from hidden states to logits.
        targets: int64 [texts, tokens], the tokens themselves, -100 where there is none.
    """
    predicting, following = states[:, :-1], targets[:, 1:]
    told = following != -100
    return functional.cross_entropy(head(predicting[told]), following[told])
