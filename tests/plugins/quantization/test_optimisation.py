from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from galley_plugins.quantization.grouping import absmax_scales
from galley_plugins.quantization.matrix import encode
from galley_plugins.quantization.optimisation import optimise_scales


def error(weights: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    """Squared error of each group, [output, groups], in float64."""
    grouped = weights.double().view(len(weights), scales.shape[1], -1)
    codes = encode(weights, scales, bits).double().view_as(grouped)
    return (codes * scales.double().unsqueeze(-1) - grouped).square().sum(-1)


def normal(rows: int, columns: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("bits", "worse"), [(4, 1.05), (8, 1.1)])
@pytest.mark.parametrize("group_size", [32, 128, 0])
def test_scales_come_close_to_the_best_of_an_exhaustive_search(
    bits: int, worse: float, group_size: int
) -> None:
    weights = normal(24, 256, seed=group_size)
    start = absmax_scales(weights, group_size, bits)
    found = optimise_scales(weights, start, bits, steps=100, learning_rate=0.01)
    tried = torch.stack([error(weights, start * ratio, bits) for ratio in torch.linspace(0.3, 1.1, 400)])
    assert error(weights, found, bits).sum() <= worse * tried.amin(0).sum()
    if bits == 4 and group_size != 32:
        assert error(weights, found, bits).sum() < 0.9 * error(weights, start, bits).sum()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([1e-30, 1e-6, 1.0, 1e6]), st.sampled_from([4, 8]))
def test_the_error_never_grows_whatever_the_weights_size(seed: int, scale: float, bits: int) -> None:
    weights = normal(4, 64, seed, scale)
    weights[0] = 0
    weights[1, 5] = 100 * scale
    start = absmax_scales(weights, 32, bits)
    found = optimise_scales(weights, start, bits, steps=30, learning_rate=0.01)
    assert torch.isfinite(found).all()
    assert (found > 0).all()
    before, after = error(weights, start, bits), error(weights, found, bits)
    assert (after <= before * (1 + 1e-4)).all()


def test_groups_of_zeros_keep_their_scale() -> None:
    start = torch.full((2, 2), 0.25)
    assert torch.equal(optimise_scales(torch.zeros(2, 16), start, 4, steps=5, learning_rate=0.01), start)
