"""The top of each row, against torch's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from galley_plugins.speculation.top_candidates import best_tokens, top_candidates


def random_logits(rows: int, vocabulary: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", [49152, 1024, 1000, 513, 512, 65, 8])
def test_tokens_are_the_exact_top_eight(vocabulary: int, dtype: torch.dtype) -> None:
    logits = random_logits(5, vocabulary).to(dtype)
    tokens, probabilities = top_candidates(logits)
    expected = logits.float().sort(dim=-1, descending=True, stable=True).indices[:, :8]
    assert tokens.tolist() == expected.tolist()
    exact = logits.float().softmax(-1).gather(1, expected).numpy()
    assert (probabilities >= exact - 1e-6).all()  # the mass far away is left out, so never too small
    assert (probabilities.sum(-1) <= 1 + 1e-5).all()


def test_probabilities_of_few_blocks_are_the_softmax() -> None:
    logits = random_logits(4, 512)
    tokens, probabilities = top_candidates(logits)
    exact = logits.softmax(-1).gather(1, torch.from_numpy(tokens).long())
    np.testing.assert_allclose(probabilities, exact.numpy(), rtol=1e-5)


@pytest.mark.parametrize("seed", range(20))
def test_of_equal_logits_the_smaller_id_comes_first(seed: int) -> None:
    """As vLLM's greedy sampling takes it; rounding to few values makes ties common."""
    logits = random_logits(6, 2000, seed).round().to(torch.bfloat16)
    tokens, _ = top_candidates(logits)
    assert tokens[:, 0].tolist() == logits.float().argmax(-1).tolist()
    expected = logits.float().sort(dim=-1, descending=True, stable=True).indices[:, :8]
    assert tokens.tolist() == expected.tolist()
    assert best_tokens(logits).tolist() == logits.float().argmax(-1).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", [49152, 1000, 65, 64, 8, 1])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_best_token_is_torchs(vocabulary: int, dtype: torch.dtype, sign: int) -> None:
    logits = (sign * random_logits(5, vocabulary).abs()).to(dtype)
    logits[1, vocabulary // 2 :] = float("-inf")
    logits[2, :] = float("-inf")
    logits[3, -1] = float("inf")
    best = best_tokens(logits)
    assert best.dtype == np.int32
    assert best.tolist() == logits.float().argmax(-1).tolist()


def test_negative_logits_order_as_floats_do() -> None:
    logits = -random_logits(3, 640).abs() - 1
    tokens, _ = top_candidates(logits)
    assert tokens.tolist() == logits.topk(8, -1).indices.tolist()


def test_masked_tokens_have_no_probability() -> None:
    logits = torch.full((2, 4096), float("-inf"))
    logits[0, 4000], logits[0, 7] = 1.0, 0.0
    tokens, probabilities = top_candidates(logits)
    assert tokens[0, :2].tolist() == [4000, 7]
    np.testing.assert_allclose(probabilities[0, :3], [0.7310586, 0.2689414, 0.0], atol=1e-6)
    assert np.isfinite(probabilities).all()


def test_a_vocabulary_of_fewer_than_eight_is_padded() -> None:
    tokens, probabilities = top_candidates(torch.tensor([[0.0, 2.0, 1.0]]))
    assert tokens.tolist() == [[1, 2, 0, -1, -1, -1, -1, -1]]
    assert probabilities[0, 3:].tolist() == [0.0] * 5


def test_rows_of_a_larger_tensor_are_read_where_they_lie() -> None:
    whole = random_logits(4, 1024)
    tokens, _ = top_candidates(whole[:, :1000])
    assert tokens.tolist() == whole[:, :1000].topk(8, -1).indices.tolist()
