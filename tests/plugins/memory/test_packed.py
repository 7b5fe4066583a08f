from __future__ import annotations

import copy

import pytest
import torch

from galley_plugins.memory.network import MemoryNetwork, Sizes
from galley_plugins.memory.packed import pack


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_packed_network_says_the_same(family: str, dtype: torch.dtype) -> None:
    network = MemoryNetwork(Sizes(family, 48, 64, 96, 2, 300)).initialize(0)
    generator = torch.Generator().manual_seed(1)
    for value in network.parameters():  # down projections begin with zeros
        value.data.add_(torch.randn(value.shape, generator=generator) * 0.1)
    states = torch.randn(5, 48, generator=generator).to(dtype)
    packed = copy.deepcopy(network).to(dtype).eval().requires_grad_(False)
    pack(packed)
    with torch.inference_mode():
        expected, found = network(states.float()), packed(states)
    assert found.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    assert float((found - expected).norm() / expected.norm()) < tolerance
