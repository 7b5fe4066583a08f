"""The mix of two distributions: worked by hand, and what mixes must be."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch

from galley_kernels import mix_log_probs

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.parametrize("implementation", ["reference", "torch", "cpu", "triton"])


def test_a_mix_worked_by_hand(call: Callable[..., Any]) -> None:
    logits = torch.tensor([[0.0, 0.0]])  # a half each
    other = torch.tensor([[math.log(9.0), 0.0]])  # nine tenths, one tenth
    mixed = call(mix_log_probs, logits, other, torch.tensor([0.25]))
    assert mixed.tolist() == [pytest.approx([math.log(0.6), math.log(0.4)], abs=1e-6)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_probabilities_sum_to_one_over_blocks(call: Callable[..., Any], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits, other = (torch.randn(2, 4, 9001) * 5).to(dtype)
    weight = torch.tensor([0.0, 0.3, 0.7, 1.0])
    mixed = call(mix_log_probs, logits, other, weight)
    assert mixed.dtype == torch.float32
    assert torch.allclose(mixed.exp().sum(1), torch.ones(4), atol=1e-5)
    assert torch.allclose(mixed[0], torch.log_softmax(logits[0].float(), 0), atol=1e-5)
    assert torch.allclose(mixed[3], torch.log_softmax(other[3].float(), 0), atol=1e-5)
    share = weight[:, None].double()
    expected = (1 - share) * logits.double().softmax(1) + share * other.double().softmax(1)
    assert torch.allclose(mixed.double(), expected.log(), atol=2e-5)


def test_tokens_that_one_or_both_rule_out(call: Callable[..., Any]) -> None:
    never = float("-inf")
    logits = torch.tensor([[0.0, never, 0.0, never], [never, never, never, 1.0]])
    other = torch.tensor([[never, 2.0, 2.0, never], [0.0, 0.0, never, never]])
    mixed = call(mix_log_probs, logits, other, torch.tensor([0.5, 0.0]))
    quarter, half = math.log(0.25), math.log(0.5)
    assert mixed[0].tolist() == pytest.approx([quarter, quarter, half, never], abs=1e-6)
    assert mixed[1].tolist() == pytest.approx([never, never, never, 0.0], abs=1e-6)


def test_a_distribution_over_some_tokens_leaves_the_others_their_share(call: Callable[..., Any]) -> None:
    half = math.log(0.5)
    logits = torch.tensor([[half, -20.0, math.log(0.25), math.log(0.25)], [0.0, 0.0, 0.0, 0.0]])
    other = torch.tensor([[math.log(3.0), 0.0], [float("-inf"), 5.0]])  # of tokens 3 and 0
    mixed = call(mix_log_probs, logits, other, torch.tensor([0.2, 1.0]), torch.tensor([3, 0]))
    expected = [0.8 * 0.5 + 0.2 * 0.25, 0.8 * 0.25, 0.8 * 0.25 + 0.2 * 0.75]
    assert mixed[0, [0, 2, 3]].exp().tolist() == pytest.approx(expected, abs=1e-6)
    assert mixed[1].tolist() == [pytest.approx(0.0, abs=1e-6), *[float("-inf")] * 3]


def test_many_tokens_in_any_order_equal_the_rest_ruled_out(call: Callable[..., Any]) -> None:
    torch.manual_seed(2)
    logits, weight = torch.randn(3, 1003) * 4, torch.tensor([0.0, 0.4, 1.0])
    columns = torch.randperm(1003)[:301]
    other = torch.randn(3, 301) * 4
    whole = torch.full((3, 1003), float("-inf")).index_copy_(1, columns, other)
    expected = mix_log_probs(logits, whole, weight, implementation="reference")
    mixed = call(mix_log_probs, logits, other, weight, columns)
    assert torch.equal(torch.isfinite(mixed), torch.isfinite(expected))
    finite = torch.isfinite(expected)
    assert torch.allclose(mixed[finite], expected[finite], atol=1e-5)


def test_shifted_logits_and_rows_with_gaps_make_no_difference(call: Callable[..., Any]) -> None:
    torch.manual_seed(1)
    wide = torch.randn(3, 400)
    logits, other, weight = wide[:, :200], wide[:, 200:], torch.rand(3)
    plain = call(mix_log_probs, logits.contiguous(), other.contiguous(), weight)
    assert torch.allclose(call(mix_log_probs, logits + 300, other - 300, weight), plain, atol=1e-4)
    assert torch.equal(call(mix_log_probs, logits, other, weight), plain)


def test_shapes_that_differ_are_refused(implementation: str) -> None:
    with pytest.raises(ValueError, match=r"found logits \[2, 8\] and \[2, 9\]"):
        mix_log_probs(torch.zeros(2, 8), torch.zeros(2, 9), torch.zeros(2), implementation=implementation)
