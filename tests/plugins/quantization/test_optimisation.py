from __future__ import annotations

import subprocess
import sys

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


def test_ranges_serve_the_inputs_whose_errors_cost() -> None:
    """Beside an exhaustive search by the same costs; each group has costs of its own."""
    weights = normal(48, 128, seed=4)
    costs = torch.rand(128, generator=torch.Generator().manual_seed(5)) ** 4 * 1e-3
    costs[64:] *= 50

    def cost(scales: torch.Tensor) -> torch.Tensor:
        grouped = weights.double().view(48, 2, 64)
        codes = encode(weights, scales, 4).double().view_as(grouped)
        errors = (codes * scales.double().unsqueeze(-1) - grouped).square()
        return (errors * costs.double().view(2, 64)).sum(-1)

    start = absmax_scales(weights, 64, 4)
    plain = optimise_scales(weights, start, 4, steps=100, learning_rate=0.01)
    found = optimise_scales(weights, start, 4, steps=100, learning_rate=0.01, costs=costs)
    best = torch.stack([cost(start * ratio) for ratio in torch.linspace(0.3, 1.1, 400)]).amin(0)
    assert cost(found).sum() <= 1.05 * best.sum()
    assert cost(found).sum() < 0.9 * cost(plain).sum()
    # All costs alike, of whatever size, are none.
    assert torch.allclose(
        optimise_scales(weights, start, 4, steps=9, learning_rate=0.01, costs=torch.full((128,), 3e-9)),
        optimise_scales(weights, start, 4, steps=9, learning_rate=0.01),
    )


def test_weights_whose_errors_cost_nothing_keep_their_scale() -> None:
    weights = normal(8, 64, seed=6)
    start = absmax_scales(weights, 32, 4)
    costs = torch.cat([torch.zeros(32), torch.ones(32)])
    found = optimise_scales(weights, start, 4, steps=20, learning_rate=0.01, costs=costs)
    assert torch.equal(found[:, 0], start[:, 0])
    assert (found[:, 1] < start[:, 1]).any()
    none = optimise_scales(weights, start, 4, steps=20, learning_rate=0.01, costs=torch.zeros(64))
    assert torch.equal(none, start)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("rows", [1, 7, 96])
def test_a_matrix_is_the_same_by_any_number_of_threads(threads: int, rows: int) -> None:
    weights = normal(rows, 96, seed=rows)
    start = absmax_scales(weights, 32, 4)
    expected = torch.cat(
        [
            optimise_scales(row[None], scale[None], 4, steps=20, learning_rate=0.01)
            for row, scale in zip(weights, start, strict=True)
        ]
    )
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = optimise_scales(weights, start, 4, steps=20, learning_rate=0.01)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found, expected)


def test_openmp_is_left_as_torch_needs_it() -> None:
    """Threads of numba's own switch nested parallelism on, which slows down torch's attention for good."""
    script = """
import ctypes, re, torch
from galley_plugins.quantization.optimisation import optimise_scales
torch.set_num_threads(2)
torch.ones(512, 512) @ torch.ones(512, 512)
optimise_scales(torch.randn(64, 64), torch.ones(64, 1), 4, steps=3, learning_rate=0.01)
paths = {line.split()[-1] for line in open("/proc/self/maps") if re.search("libg?i?omp", line)}
assert paths
assert not any(ctypes.CDLL(path).omp_get_nested() for path in paths)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
