from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from galley_plugins.embedding.training.lora import MODULES, LoraDecoder
from tests.plugins.embedding.training.conftest import disturb, small_llama

if TYPE_CHECKING:
    from galley_plugins.embedding.training.base import BaseModel

IDS = torch.tensor([[3, 4, 5, 6, 7]])


def test_exported_tensors_merged_into_the_weights_give_what_peft_gives(base: BaseModel) -> None:
    decoder = LoraDecoder(base.decoder, rank=4)
    disturb(decoder)
    merged = small_llama().base_model
    plain = merged(input_ids=IDS).last_hidden_state
    tensors = decoder.tensors()
    assert len(tensors) == 2 * 2 * len(MODULES)
    for name in tensors:
        if name.endswith(".A"):
            layer = merged.get_submodule(name.removesuffix(".A"))
            layer.weight += tensors[name.removesuffix("A") + "B"] @ tensors[name]
    with torch.no_grad():
        found = decoder(input_ids=IDS).last_hidden_state
    torch.testing.assert_close(found, merged(input_ids=IDS).last_hidden_state)
    assert (found - plain).abs().max() > 0.1


def test_the_base_is_bit_for_bit_the_decoder(base: BaseModel) -> None:
    decoder = LoraDecoder(base.decoder, rank=4)
    disturb(decoder)
    with torch.no_grad():
        with decoder.base():
            found = decoder(input_ids=IDS).last_hidden_state
        again = decoder(input_ids=IDS).last_hidden_state
    plain = small_llama().base_model(input_ids=IDS).last_hidden_state
    assert torch.equal(found, plain)
    assert not torch.allclose(again, plain)


def test_only_lora_is_trained(base: BaseModel) -> None:
    decoder = LoraDecoder(base.decoder, rank=4)
    disturb(decoder)
    with decoder.base():
        decoder(input_ids=IDS)
    decoder(input_ids=IDS).last_hidden_state.sum().backward()
    assert all(value.grad is not None for value in decoder.parameters().values())
    trained = {id(value) for value in decoder.parameters().values()}
    for value in base.language_model.parameters():
        assert id(value) in trained or value.grad is None
