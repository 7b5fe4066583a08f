"""vLLM's own linear layers, on a CPU, with maps for few rows beside what vLLM chooses."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import CompilationMode
from vllm.model_executor.layers import utils

from galley_kernels import compiled
from galley_plugins import few_rows

pytestmark = pytest.mark.skipif(not compiled.available(), reason="no C++ compiler")

INPUTS, OUTPUTS = 64, 48


class Layer(torch.nn.Module):
    def __init__(self, *, bias: bool = False, ranks: int = 1, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.tp_size = ranks
        self.weight = torch.nn.Parameter(torch.randn(OUTPUTS, INPUTS, dtype=dtype), requires_grad=False)
        self.bias = torch.nn.Parameter(torch.randn(OUTPUTS, dtype=dtype)) if bias else None
        self.skip_bias_add = False


def loaded(layer: Layer) -> tuple[Any, torch.Tensor]:
    """The layer as vLLM has it after loading, and the weight that it was loaded with."""
    weight = layer.weight.data.clone()
    with few_rows.loading():
        utils.dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
    return layer, weight


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 5, few_rows.MOST, few_rows.MOST + 1, 200])
def test_a_layer_multiplies_as_before_whatever_its_rows(bias: bool, rows: int) -> None:
    layer, weight = loaded(Layer(bias=bias))
    x = torch.randn(rows, INPUTS)
    added = layer.bias.detach() if bias else None
    expected = torch.nn.functional.linear(x, weight, added)
    assert torch.allclose(layer.cpu_linear(x, layer.weight, added), expected, atol=1e-4)


def test_few_rows_do_not_depend_on_each_other() -> None:
    layer, _ = loaded(Layer())
    x = torch.randn(few_rows.MOST, INPUTS)
    together = layer.cpu_linear(x, layer.weight, None)
    assert torch.equal(together, torch.cat([layer.cpu_linear(row, layer.weight, None) for row in x.split(1)]))


def test_a_bias_that_the_caller_adds_is_not_added_here() -> None:
    layer = Layer(bias=True)
    layer.skip_bias_add = True
    _, weight = loaded(layer)
    x = torch.randn(2, INPUTS)
    assert torch.allclose(layer.cpu_linear(x, layer.weight, None), x @ weight.T, atol=1e-4)


def test_layers_that_vllm_must_have_whole_are_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert few_rows.linear_of(loaded(Layer())[0]) is not None
    assert few_rows.linear_of(loaded(Layer(ranks=2))[0]) is None
    assert few_rows.linear_of(loaded(Layer(dtype=torch.float64))[0]) is None
    monkeypatch.setattr(few_rows, "available_bytes", lambda: 4 * 4 * INPUTS * OUTPUTS - 1)
    assert few_rows.linear_of(loaded(Layer())[0]) is None  # no memory for a copy


def test_copies_of_all_layers_together_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few_rows, "available_bytes", lambda: 4 * 4 * INPUTS * OUTPUTS * 2)
    layers = [Layer() for _ in range(3)]
    with few_rows.loading():
        for layer in layers:
            utils.dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
    assert [few_rows.linear_of(layer) is not None for layer in layers] == [True, True, False]


def test_vllms_choice_is_its_own_again_after_loading() -> None:
    before = utils.dispatch_cpu_unquantized_gemm
    with contextlib.suppress(RuntimeError), few_rows.loading():
        assert utils.dispatch_cpu_unquantized_gemm is not before
        raise RuntimeError("loading fails")
    assert utils.dispatch_cpu_unquantized_gemm is before


@pytest.mark.parametrize(
    ("dtype", "mode", "adapters", "variable", "expected"),
    [
        (torch.float32, CompilationMode.NONE, None, None, True),
        (torch.float32, CompilationMode.NONE, None, "0", False),
        (torch.float32, CompilationMode.NONE, object(), None, False),
        (torch.float32, CompilationMode.DYNAMO_TRACE_ONCE, None, None, False),
        (torch.bfloat16, CompilationMode.NONE, None, None, False),
    ],
)
def test_engines_that_want_them(
    dtype: torch.dtype,
    mode: Any,
    adapters: Any,
    variable: str | None,
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(few_rows.VARIABLE, raising=False)
    if variable is not None:
        monkeypatch.setenv(few_rows.VARIABLE, variable)
    config = SimpleNamespace(
        model_config=SimpleNamespace(dtype=dtype),
        compilation_config=SimpleNamespace(mode=mode),
        lora_config=adapters,
    )
    assert few_rows.wanted(config) is expected
