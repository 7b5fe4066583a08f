from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import DynamicCache

from galley_plugins.embedding.training.data import ScoredPairs
from galley_plugins.embedding.training.gem import Gem, GemRecipe, Prefixes
from tests.plugins.embedding.training.conftest import disturb, small_llama

if TYPE_CHECKING:
    from galley_plugins.embedding.training.base import BaseModel
    from galley_plugins.embedding.training.data import TrainingData

TEXTS = ["a man runs .", "the old dog sleeps slowly here .", "cat"]
IDS = [[3, 4, 5], [6, 7, 8, 9, 10, 11]]


def trainee(base: BaseModel, data: TrainingData, kept_bytes: int = 1 << 20, **recipe: Any) -> Gem:
    found = Gem(base, GemRecipe(**recipe), ScoredPairs(data.train, 4, 0), 4, 0, kept_bytes)
    disturb(found)
    return found


def prefix(gem: Gem, ids: list[list[int]], *, keep: bool = False) -> Any:
    return gem._prefixes.of(ids, keep=keep)


@torch.no_grad()
def test_special_tokens_do_not_see_one_another(base: BaseModel, data: TrainingData) -> None:
    gem = trainee(base, data, tokens=3)
    before = gem.special_states(prefix(gem, IDS))
    gem._special[1] += 1.0
    after = gem.special_states(prefix(gem, IDS))
    assert torch.equal(before[:, [0, 2]], after[:, [0, 2]])
    assert not torch.allclose(before[:, 1], after[:, 1])


@torch.no_grad()
def test_each_special_token_is_one_alone_at_the_texts_end(base: BaseModel, data: TrainingData) -> None:
    """What serving does: the text's cache by the model itself, then one row with LoRA merged into the weights."""
    gem = trainee(base, data, tokens=2)
    found = gem.special_states(prefix(gem, IDS))
    plain, merged = small_llama().base_model, small_llama().base_model
    tensors = gem.tensors()
    for name in tensors:
        if name.endswith(".A"):
            layer = merged.get_submodule(name.removesuffix(".A"))
            layer.weight += tensors[name.removesuffix("A") + "B"] @ tensors[name]
    for row, ids in enumerate(IDS):
        for special in range(2):
            cache = DynamicCache()
            plain(input_ids=torch.tensor([ids]), past_key_values=cache, use_cache=True)
            state = merged(
                inputs_embeds=tensors["special"][special][None, None], past_key_values=cache, use_cache=True
            ).last_hidden_state
            torch.testing.assert_close(found[row, special], state[0, 0])


@torch.no_grad()
def test_text_rows_are_those_of_the_model_alone(base: BaseModel, data: TrainingData) -> None:
    gem = trainee(base, data)
    found = prefix(gem, [IDS[1]]).cache
    cache = DynamicCache()
    small_llama().base_model(input_ids=torch.tensor([IDS[1]]), past_key_values=cache, use_cache=True)
    for own, expected in zip(found.layers, cache.layers, strict=True):
        assert torch.equal(own.keys, expected.keys)
        assert torch.equal(own.values, expected.values)


@torch.no_grad()
def test_a_suffix_sees_special_tokens_and_no_text(base: BaseModel, data: TrainingData) -> None:
    gem = trainee(base, data, tokens=2)
    suffix = torch.tensor([[12, 13, 14]])

    def states(ids: list[int], changed: float = 0.0, text: float = 0.0) -> torch.Tensor:
        found = prefix(gem, [ids])
        gem.special_states(found)
        for layer in found.cache.layers:
            layer.keys[:, :, :-2] += text
            layer.values[:, :, :-2] += text
            layer.values[:, :, -1] += changed
        return gem.suffix_states(found, suffix)

    plain = states(IDS[0])
    assert torch.equal(states(IDS[0], text=1.0), plain)
    assert not torch.allclose(states(IDS[0], changed=1.0), plain)
    assert not torch.allclose(states([9, 4, 5]), plain)  # through the special tokens
    suffix[0, 2] = 15
    assert torch.equal(states(IDS[0])[:, :2], plain[:, :2])


@torch.no_grad()
def test_a_suffix_goes_on_after_the_special_tokens_place(base: BaseModel, data: TrainingData) -> None:
    """With a cache of nothing but the special token's row, the decoder alone gives the same states."""
    gem = trainee(base, data)
    found = prefix(gem, [IDS[0]])
    gem.special_states(found)
    cache = DynamicCache((layer.keys[:, :, -1:], layer.values[:, :, -1:]) for layer in found.cache.layers)
    suffix = torch.tensor([[12, 13]])
    expected = small_llama().base_model(
        input_ids=suffix, past_key_values=cache, position_ids=torch.tensor([[4, 5]]), use_cache=True
    )
    torch.testing.assert_close(gem.suffix_states(found, suffix), expected.last_hidden_state)


@torch.no_grad()
@pytest.mark.parametrize("kept_bytes", [1 << 20, 0])
def test_kept_texts_are_those_computed_anew(base: BaseModel, data: TrainingData, kept_bytes: int) -> None:
    gem = trainee(base, data, kept_bytes=kept_bytes)
    exact = gem.special_states(prefix(gem, IDS))
    for _ in range(2):
        kept = gem.special_states(prefix(gem, [*IDS, IDS[0]], keep=True))
        torch.testing.assert_close(kept[:2], exact, atol=1e-2, rtol=1e-2)
        assert torch.equal(kept[2], kept[0])
    assert isinstance(gem._prefixes, Prefixes)
    assert len(gem._prefixes._kept) == (2 if kept_bytes else 0)


@torch.no_grad()
def test_vectors_are_the_mean_or_all_of_the_special_states(base: BaseModel, data: TrainingData) -> None:
    gem = trainee(base, data, tokens=2)
    ids = [prompt.ids for prompt in gem._builder.build(TEXTS, 64)]
    states = gem.special_states(prefix(gem, ids))
    torch.testing.assert_close(gem.encode(TEXTS), states.mean(1))
    gem._recipe = GemRecipe(tokens=2, combine="concat")
    torch.testing.assert_close(gem.encode(TEXTS), torch.cat([states[:, 0], states[:, 1]], 1))


def test_next_token_prediction_trains_special_tokens(base: BaseModel, data: TrainingData) -> None:
    gem = trainee(base, data, tokens=2, ntp_steps=1)
    gem.loss(0).backward()
    assert gem.parameters()["log_scale"].grad is None
    assert gem._special.grad is not None
    assert gem._special.grad.abs().min() > 0
    gem.loss(1).backward()
    assert gem.parameters()["log_scale"].grad is not None


def test_texts_are_repeated_or_cut_in_two(base: BaseModel, data: TrainingData) -> None:
    gem = trainee(base, data)
    whole = base.tokenizer(TEXTS)["input_ids"]
    seen = set()
    for seed in range(20):
        prefixes, suffixes = gem._split(TEXTS, random.Random(seed))
        for ids, before, after in zip(whole, prefixes, suffixes, strict=True):
            assert (before == ids and after == ids) or (before + after == ids and len(after) >= 2)
            seen.add(before == ids)
    assert seen == {True, False}
