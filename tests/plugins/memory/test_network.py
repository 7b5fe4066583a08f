"""The network is the plain reading of its description, in both families."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from galley_plugins.memory.network import MemoryNetwork, Sizes
from tests.plugins.memory.reference import plain_forward, random_tensors


@pytest.mark.parametrize("inputs", [16, 24])
@pytest.mark.parametrize("blocks", [0, 1, 3])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_logits_are_those_of_a_plain_forward(family: Any, blocks: int, inputs: int) -> None:
    tensors = random_tensors(family, inputs, 16, 40, blocks, 30)
    network = MemoryNetwork(Sizes(family, inputs, 16, 40, blocks, 30, 1e-3))
    network.load_state_dict(tensors)
    states = torch.randn(7, inputs, generator=torch.Generator().manual_seed(1))
    expected = plain_forward(family, tensors, states, 1e-3)
    with torch.no_grad():
        assert torch.allclose(network(states).double(), expected, atol=1e-4)
    assert torch.allclose(network(states).double(), expected, atol=1e-4)  # as it is trained


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_blocks_begin_as_the_identity(family: Any) -> None:
    head = torch.randn(30, 16, generator=torch.Generator().manual_seed(2))
    network = MemoryNetwork(Sizes(family, 16, 16, 40, 2, 30)).initialize(5, head)
    states = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
    none = MemoryNetwork(Sizes(family, 16, 16, 40, 0, 30)).initialize(5, head)
    assert torch.allclose(network(states), none(states))
    assert torch.equal(network.lm_head.weight, head)


def test_a_seed_gives_the_same_values() -> None:
    sizes = Sizes("llama", 20, 16, 40, 2, 30)
    first, same, other = (MemoryNetwork(sizes).initialize(seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["layers.1.mlp.gate_proj.weight"], other["layers.1.mlp.gate_proj.weight"])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"family": "bert"}, "family: found 'bert', expected llama, gpt2"),
        ({"width": 0}, "width: found 0"),
        ({"outputs": 1.5}, "outputs: found 1.5"),
        ({"blocks": -1}, "blocks: found -1"),
        ({"epsilon": 0.0}, "epsilon: found 0.0, expected a number above 0"),
    ],
)
def test_wrong_sizes_are_refused_by_name(changed: dict[str, Any], message: str) -> None:
    values: dict[str, Any] = {
        "family": "llama",
        "inputs": 8,
        "width": 8,
        "hidden": 8,
        "blocks": 1,
        "outputs": 8,
    }
    with pytest.raises(ValueError, match=message):
        Sizes(**{**values, **changed})
