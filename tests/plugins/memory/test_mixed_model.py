"""A model with memories mixed in, against the mix computed by hand in float64."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from galley_plugins.memory.mixed_model import Mix, mixing_class, own_states, plain
from galley_plugins.memory.served import NamedMemory
from galley_plugins.runners.layer_taps import looked_into

if TYPE_CHECKING:
    from collections.abc import Sequence

HIDDEN, VOCABULARY, LAYERS = 8, 50, 4


class Layer(nn.Module):
    """As vLLM's: the MLP gets the normed residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return states + self.mlp(nn.functional.rms_norm(states, (HIDDEN,)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.model = nn.Module()
        self.model.layers = nn.ModuleList([Layer() for _ in range(LAYERS)])
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        states = self.embed(input_ids)
        for layer in self.model.layers:
            states = layer(states)
        return states

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        return self.head(hidden_states)


@dataclass
class Linear:
    """A memory that is one matrix."""

    layer: int
    matrix: torch.Tensor
    columns: torch.Tensor | None = None
    weight: float = 0.25

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        return states @ self.matrix.T.to(states.dtype)


def linear(layer: int, seed: int, columns: torch.Tensor | None = None) -> Linear:
    rows = VOCABULARY if columns is None else len(columns)
    return Linear(layer, torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(seed)), columns)


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model().eval().requires_grad_(False)


def mixed(model: Any, *memories: Linear, compiled: bool = False, dtype: torch.dtype = torch.float32) -> Mix:
    named = [NamedMemory(f"m{index}", 0.25, memory) for index, memory in enumerate(memories)]
    mix = Mix(named, hidden=HIDDEN, tokens=16, device=torch.device("cpu"), dtype=dtype, compiled=compiled)
    mix.attach(model)
    return mix


def begin(mix: Mix, shares: Sequence[Sequence[float]], counts: Sequence[int]) -> None:
    starts = torch.tensor([0, *counts]).cumsum(0).int()
    mix.begin_step(shares, starts, sum(counts))


def by_hand(
    plain_model: Model, ids: torch.Tensor, memories: Sequence[Linear], weights: Sequence[Sequence[float]]
) -> torch.Tensor:
    """float64 probabilities [tokens, vocabulary]: softmaxes added up by `weights`, of each token."""
    states = plain_model.embed(ids).double()
    inputs = []
    for layer in plain_model.model.layers:
        normed = states / (states.pow(2).mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()
        inputs.append(normed)
        states = states + normed @ layer.mlp.weight.double().T + layer.mlp.bias.double()
    shares = torch.tensor(weights, dtype=torch.float64)
    found = (1 - shares.sum(1, keepdim=True)) * (states @ plain_model.head.weight.double().T).softmax(-1)
    for memory, share in zip(memories, shares.T, strict=True):
        own = (inputs[memory.layer] @ memory.matrix.double().T).softmax(-1)
        places = slice(None) if memory.columns is None else memory.columns
        found[:, places] += share[:, None] * own
    return found


IDS = torch.tensor([3, 14, 15, 9, 26, 5])


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    "memories",
    [
        [linear(2, 1)],
        [linear(0, 1), linear(3, 2)],
        [linear(1, 1), linear(3, 2), linear(1, 3, torch.tensor([40, 2, 7]))],
    ],
    ids=["one", "two layers", "three of two layers, one over some tokens"],
)
def test_the_distribution_is_the_weighted_sum(model: Model, memories: list[Linear], compiled: bool) -> None:
    shares = [[0.3, 0.2, 0.1], [0.0, 0.0, 0.0], [0.5, 0.3, 0.2]]
    each = [share[: len(memories)] for share in shares]
    counts = (1, 2, 3)
    weights = [share for share, count in zip(each, counts, strict=True) for _ in range(count)]
    expected = by_hand(model, IDS, memories, weights)
    own = model.compute_logits(model(IDS))
    mix = mixed(model, *memories, compiled=compiled)
    begin(mix, each, counts)
    rows = model(IDS)
    found = model.compute_logits(rows)
    assert found.dtype == torch.float32
    assert torch.allclose(found[[0, 3, 4, 5]].double().exp(), expected[[0, 3, 4, 5]], atol=1e-6)
    assert torch.equal(found[[1, 2]], own[[1, 2]])  # to the last bit
    # A runner selects rows, of drafts and of prompts too: each brings its own along.
    picked = torch.tensor([5, 1, 3])
    assert torch.allclose(model.compute_logits(rows[picked]), found[picked], atol=1e-6)


@pytest.mark.parametrize("share", [0.0, 1.0, 0.37])
def test_a_weight_of_one_leaves_the_model_out(model: Model, share: float) -> None:
    memory = linear(2, 1)
    expected = by_hand(model, IDS, [memory], [[share]] * 6)
    mix = mixed(model, memory)
    begin(mix, [[share]], [6])
    assert torch.allclose(model.compute_logits(model(IDS)).double().softmax(-1), expected, atol=1e-6)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_step_without_weights_is_the_models_own(model: Model, compiled: bool) -> None:
    states = model(IDS)
    own = model.compute_logits(states)
    mix = mixed(model, linear(2, 1), compiled=compiled)
    begin(mix, [[0.5]], [6])
    model(IDS)
    begin(mix, [[0.0], [0.0]], [2, 4])
    rows = model(IDS)
    assert rows.shape[1] == (HIDDEN if not compiled else 2 * HIDDEN + 1)
    assert torch.equal(own_states(model, rows), states)
    assert torch.equal(model.compute_logits(rows), own)
    assert torch.equal(model.compute_logits(states), own)


def test_padding_has_no_weight(model: Model) -> None:
    own = model.compute_logits(model(IDS))
    mix = mixed(model, linear(2, 1), compiled=True)
    begin(mix, [[0.5]], [6])
    begin(mix, [[0.5], [0.5]], [1, 1])
    found = model.compute_logits(model(IDS))
    assert not torch.equal(found[:2], own[:2])
    assert torch.equal(found[2:], own[2:])


def test_weights_keep_their_bits_beside_states_of_16(model: Model) -> None:
    model.bfloat16()
    mix = mixed(model, linear(2, 1), linear(3, 2), dtype=torch.bfloat16)
    shares = [[0.1, 1 / 3], [0.123456789, 1e-7]]
    begin(mix, shares, [2, 4])
    rows = model(IDS)
    assert rows.dtype == torch.bfloat16
    assert torch.equal(rows[:, -4:].contiguous().view(torch.float32)[[0, 5]], torch.tensor(shares))
    assert torch.allclose(model.compute_logits(rows).exp().sum(-1), torch.ones(6), atol=1e-4)


def test_names_of_parameters_and_the_kind_of_the_model_stay(model: Model) -> None:
    names, tensors = list(dict(model.named_parameters())), set(model.state_dict())
    mixed(model, linear(2, 1))
    assert isinstance(model, Model)
    assert type(model).__name__ == "Model"
    assert list(dict(model.named_parameters())) == names
    assert set(model.state_dict()) == tensors


def test_what_vllm_asks_of_a_class_is_as_before() -> None:
    from vllm.model_executor.models.interfaces import supports_lora, supports_pp
    from vllm.model_executor.models.llama import LlamaForCausalLM

    mixing = mixing_class(LlamaForCausalLM)
    assert mixing_class(LlamaForCausalLM) is mixing
    assert issubclass(mixing, LlamaForCausalLM)
    assert supports_lora(mixing)
    assert supports_pp(mixing)
    assert mixing.packed_modules_mapping == LlamaForCausalLM.packed_modules_mapping
    for name in ("forward", "compute_logits"):
        assert inspect.signature(getattr(mixing, name)) == inspect.signature(getattr(LlamaForCausalLM, name))


def test_drafts_of_the_model_itself_run_without_memories(model: Model) -> None:
    states = model(IDS)
    mix = mixed(model, linear(2, 1))
    begin(mix, [[0.5]], [6])
    rows = model(IDS)
    with plain(model):
        assert torch.equal(model(IDS), states)
        assert torch.equal(model.compute_logits(states), model.head(states))
        model(IDS.flip(0))  # leaves what the step has kept as it is
    assert torch.equal(model(IDS), rows)
    with plain(Model()):
        pass


def test_where_the_model_has_no_logits_there_are_none(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a rank whose part of the vocabulary was gathered elsewhere."""
    monkeypatch.setattr(Model, "compute_logits", lambda *given: None)
    mix = mixed(model, linear(2, 1))
    begin(mix, [[0.5]], [6])
    assert model.compute_logits(model(IDS)) is None


def test_layers_are_looked_into_only_in_steps_with_weights(model: Model) -> None:
    mix = mixed(model, linear(2, 1))
    modules = [layer.mlp for layer in model.model.layers]
    begin(mix, [[0.0]], [6])
    assert not looked_into(modules)
    begin(mix, [[0.5]], [6])
    assert looked_into(modules)


@pytest.mark.parametrize("layer", [-1, LAYERS])
def test_a_layer_that_the_model_has_not_is_named(model: Model, layer: int) -> None:
    with pytest.raises(ValueError, match=f"found layer {layer}, expected 0 to {LAYERS - 1}"):
        mixed(model, linear(layer, 1))


def test_a_model_that_is_built_otherwise_is_named() -> None:
    with pytest.raises(ValueError, match=r"expected a model with model\.layers, .*SimpleNamespace is built"):
        mixed(SimpleNamespace(), linear(0, 1))
    odd = SimpleNamespace(model=SimpleNamespace(layers=[nn.Identity()]))
    with pytest.raises(ValueError, match=r"a decoder layer with mlp, .*, Identity is built otherwise"):
        mixed(odd, linear(0, 1))
