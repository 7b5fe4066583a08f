from __future__ import annotations

import math

import pytest
import torch

from galley_plugins.embedding.training.losses import blended, continued, contrasted, ranked

# Unit vectors with cosines 1, 0.6 and 0.
FIRST = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
SECOND = torch.tensor([[2.0, 0.0], [0.6, 0.8], [0.0, 3.0]])


def test_ranking_by_hand() -> None:
    """Scores 1, 5, 3: (0.6 above 1), (0 above 1) and (0.6 above 0) should hold; the first two do not."""
    expected = math.log(1 + math.exp(20 * 0.4) + math.exp(20 * 1.0) + math.exp(-20 * 0.6))
    assert ranked(FIRST, SECOND, [1.0, 5.0, 3.0]).item() == pytest.approx(expected)


def test_equal_scores_ask_for_nothing() -> None:
    assert ranked(FIRST, SECOND, [2.0, 2.0, 2.0]).item() == 0


def test_contrast_by_hand() -> None:
    """Two texts along the axes, their partners 0.6/0.8 between them, and another one along the first axis."""
    first = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    second = torch.tensor([[0.8, 0.6], [0.6, 0.8]])
    others = torch.tensor([[1.0, 0.0]])
    rows = [
        -0.8 * 10 + math.log(math.exp(8) + math.exp(6) + math.exp(10)),
        -0.8 * 10 + math.log(math.exp(6) + math.exp(8) + math.exp(0)),
    ]
    found = contrasted(first, second, others, scale=torch.tensor(10.0))
    assert found.item() == pytest.approx(sum(rows) / 2)


def test_the_temperature_is_learnt() -> None:
    scale = torch.tensor(20.0, requires_grad=True)
    contrasted(FIRST, SECOND, scale=scale).backward()
    assert scale.grad is not None
    assert scale.grad.item() != 0


def test_a_scored_batch_is_ranked_and_its_alike_pairs_contrasted_with_all() -> None:
    scores = [4.0, 1.0, 2.0]
    both = ranked(FIRST, SECOND, scores) + contrasted(FIRST[:1], SECOND[:1], SECOND[1:])
    assert blended(FIRST, SECOND, scores).item() == pytest.approx(both.item())
    assert blended(FIRST, SECOND, scores, in_batch=False).item() == pytest.approx(
        ranked(FIRST, SECOND, scores).item()
    )
    assert blended(FIRST, SECOND, None).item() == pytest.approx(contrasted(FIRST, SECOND).item())


def test_next_tokens_by_hand() -> None:
    """Logits are the states; of two texts, the second is one token shorter and has one prediction."""
    states = torch.zeros(2, 3, 4)
    states[0, 0, 2] = 5.0
    targets = torch.tensor([[1, 2, 3], [1, 0, -100]])
    right, even = -5 + math.log(3 + math.exp(5)), math.log(4)
    found = continued(states, torch.nn.Identity(), targets)
    assert found.item() == pytest.approx((right + 2 * even) / 3)
