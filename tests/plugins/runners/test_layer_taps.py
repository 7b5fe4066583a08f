from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from galley_plugins.runners.layer_taps import LayerTaps, MlpTap, TappedRows, decoder_layers, looked_into


class Layer(nn.Module):
    """As vLLM's: hidden states and a residual in and out; both move by one with each layer."""

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        residual = hidden_states if residual is None else hidden_states + residual
        return torch.ones_like(residual), residual


def run(layers: Any, states: torch.Tensor) -> torch.Tensor:
    """The residual stream after all layers."""
    hidden, residual = states.clone(), None
    for layer in layers:
        hidden, residual = layer(torch.arange(len(states)), hidden, residual)
    return hidden + residual


@pytest.fixture
def layers() -> nn.ModuleList:
    return nn.ModuleList([Layer() for _ in range(4)])


def rows(sources: list[int], targets: list[int], read: list[int]) -> TappedRows:
    return TappedRows(*(torch.tensor(each, dtype=torch.int64) for each in (sources, targets, read)))


STATES = torch.tensor([[10.0], [20.0], [30.0], [40.0]])


def test_rows_are_copied_before_the_layers_that_were_named_and_read_before_another(
    layers: nn.ModuleList,
) -> None:
    taps = LayerTaps(layers, range(1, 2), 3)
    taps.begin(rows(sources=[3], targets=[1], read=[1, 2]))
    # Before layer 3, three layers have added 1 each; row 1 became row 3 before layer 1.
    assert run(layers, STATES).tolist() == [[14.0], [44.0], [34.0], [44.0]]
    read = taps.end()
    assert read is not None
    assert read.tolist() == [[43.0], [33.0]]


def test_a_step_with_nothing_marked_is_untouched(layers: nn.ModuleList) -> None:
    taps = LayerTaps(layers, range(1, 3), 2)
    taps.begin(None)
    assert run(layers, STATES).tolist() == [[14.0], [24.0], [34.0], [44.0]]
    assert taps.end() is None
    taps.begin(rows([0], [1], [2]))
    taps.end()
    assert run(layers, STATES).tolist() == [[14.0], [24.0], [34.0], [44.0]]  # as when a draft is computed


def test_a_model_that_keeps_its_layers_elsewhere_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"expected a model with model\.layers, SimpleNamespace is built otherwise"
    ):
        decoder_layers(SimpleNamespace())


def test_layers_are_looked_into_only_in_steps_with_something_to_do(layers: nn.ModuleList) -> None:
    assert not looked_into(layers)
    taps = LayerTaps(layers, range(1, 3), read_layer=3)
    assert not looked_into(layers)
    taps.begin(rows([0], [1], [2]))
    assert looked_into(layers)
    run(layers, STATES)
    taps.end()
    assert not looked_into(layers)


@pytest.mark.parametrize("how", ["a hook before", "a hook behind", "another forward"])
def test_layers_that_others_changed_are_looked_into(layers: nn.ModuleList, how: str) -> None:
    if how == "a hook before":
        layers[1].register_forward_pre_hook(lambda *_: None)
    elif how == "a hook behind":
        layers[1].register_forward_hook(lambda *_: None)
    else:
        layers[1].forward = lambda *_: None  # type: ignore[method-assign]
    assert looked_into(layers)


def test_what_enters_an_mlp_is_kept_in_a_compiled_graph_too() -> None:
    """Whatever the number of rows, with one graph, as vLLM compiles a model."""

    class WithMlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = nn.Linear(4, 4)

        def forward(self, states: torch.Tensor) -> torch.Tensor:
            return states + self.mlp(2 * states)

    layers = nn.Sequential(WithMlp(), WithMlp()).requires_grad_(False)
    buffer = torch.zeros(16, 4)
    MlpTap(layers[1], buffer, lambda: True, compiled=True)
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(layers, fullgraph=True, backend=backend)
    for rows in (3, 7):
        states = torch.randn(rows, 4)
        torch._dynamo.mark_dynamic(states, 0)
        buffer.zero_()
        compiled(states)
        assert torch.equal(buffer[:rows], 2 * layers[0](states))
        assert not buffer[rows:].any()
    assert len(graphs) == 1
    assert list(layers.state_dict()) == list(dict(layers.named_parameters()))
