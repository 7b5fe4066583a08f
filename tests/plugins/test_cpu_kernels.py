"""Compiled norms, as vLLM dispatches to them, against torch's own in float64."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import rms_norm
from vllm import ir
from vllm.platforms import current_platform

from galley_plugins import cpu_kernels
from galley_plugins.worker.arguments import COMPILED_NORMS

if TYPE_CHECKING:
    from collections.abc import Iterator

EPSILON = 1e-5
TOLERANCE = 1e-5
SHAPES = st.tuples(st.integers(1, 70), st.sampled_from([16, 64, 576, 1040]))


@pytest.fixture(scope="module", autouse=True)
def chosen() -> Iterator[None]:
    """The priority that a worker on a CPU asks for."""
    current_platform.import_ir_kernels()  # as a worker does before it loads a model
    cpu_kernels.register()
    priorities = [(getattr(ir.ops, name), priority) for name, priority in COMPILED_NORMS.items()]
    with priorities[0][0].set_priority(priorities[0][1]), priorities[1][0].set_priority(priorities[1][1]):
        yield


def inputs(shape: tuple[int, ...], scale: float = 1.0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(sum(shape))
    x, residual = (scale * torch.randn(shape, generator=generator) for _ in range(2))
    return x, residual, torch.randn(shape[-1], generator=generator)


def expected(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    return rms_norm(x.double(), x.shape[-1:], None if weight is None else weight.double(), EPSILON)


def assert_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found.double(), wanted, rtol=TOLERANCE, atol=TOLERANCE)


def provider(name: str, *arguments: object) -> str:
    return getattr(ir.ops, name).dispatch(*arguments).provider


@settings(max_examples=40, deadline=None)
@given(SHAPES, st.sampled_from([1e-3, 1.0, 1e3]))
def test_a_norm_is_torchs(shape: tuple[int, int], scale: float) -> None:
    x, _, weight = inputs(shape, scale)
    assert provider("rms_norm", x, weight, EPSILON) == cpu_kernels.PROVIDER
    assert_close(ir.ops.rms_norm(x, weight, EPSILON), expected(x, weight))


@settings(max_examples=40, deadline=None)
@given(SHAPES)
def test_a_norm_after_an_addition_gives_the_sum_too(shape: tuple[int, int]) -> None:
    x, residual, weight = inputs(shape)
    total = x + residual
    assert provider("fused_add_rms_norm", x, residual, weight, EPSILON) == cpu_kernels.PROVIDER
    found, kept = ir.ops.fused_add_rms_norm.maybe_inplace(x.clone(), residual.clone(), weight, EPSILON)
    assert_close(found, expected(total, weight))
    assert torch.equal(kept, total)


def test_inputs_stay_where_the_caller_needs_them() -> None:
    x, residual, weight = inputs((5, 64))
    before = x.clone(), residual.clone()
    ir.ops.fused_add_rms_norm(x, residual, weight, EPSILON)
    assert torch.equal(x, before[0])
    assert torch.equal(residual, before[1])


def test_three_dimensions_are_rows_of_the_last() -> None:
    x, _, weight = inputs((3, 4, 64))
    assert provider("rms_norm", x, weight, EPSILON) == cpu_kernels.PROVIDER
    assert_close(ir.ops.rms_norm(x, weight, EPSILON), expected(x, weight))


def test_what_the_kernels_cannot_take_goes_to_vllms_own() -> None:
    x, _, weight = inputs((6, 64))
    odd, _, odd_weight = inputs((6, 20))
    heads = torch.randn(6, 4, 96)[..., :64]
    cases = [(x, None), (odd, odd_weight), (heads, weight), (x[:, ::2], weight[::2].contiguous())]
    for values, weights in cases:
        assert provider("rms_norm", values, weights, EPSILON) == "native"
        assert_close(ir.ops.rms_norm(values, weights, EPSILON), expected(values, weights))
    assert provider("rms_norm", x.bfloat16(), weight, EPSILON) == "native"
    assert provider("rms_norm", x.bfloat16(), weight.bfloat16(), EPSILON) == "native"
    assert provider("rms_norm", x, weight, EPSILON, 32) == "native"
    assert provider("fused_add_rms_norm", x, x.bfloat16(), weight, EPSILON) == "native"


def test_registering_again_changes_nothing() -> None:
    before = ir.ops.rms_norm.impls[cpu_kernels.PROVIDER]
    cpu_kernels.register()
    assert ir.ops.rms_norm.impls[cpu_kernels.PROVIDER] is before
