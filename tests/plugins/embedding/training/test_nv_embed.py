from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from galley_plugins.embedding.latent_attention import LatentAttention
from galley_plugins.embedding.training.nv_embed import NvEmbedRecipe
from tests.plugins.embedding.training.conftest import disturb, small_llama

if TYPE_CHECKING:
    from galley_plugins.embedding.training.base import BaseModel
    from galley_plugins.embedding.training.data import TrainingData
    from galley_plugins.embedding.training.nv_embed import NvEmbed

TEXTS = ["a man runs .", "the old dog sleeps slowly here .", "cat"]


def trainee(base: BaseModel, data: TrainingData) -> NvEmbed:
    recipe = NvEmbedRecipe(latents=6, heads=2, head_size=8, first_steps=1, class_share=0.0)
    return recipe.trainee(base, data, batch=3, rank=4, seed=0)


def bidirectional(ids: list[int], decoder: torch.nn.Module) -> torch.Tensor:
    mask = torch.zeros(1, 1, len(ids), len(ids))
    return decoder(input_ids=torch.tensor([ids]), attention_mask=mask).last_hidden_state[0]


@torch.no_grad()
def test_training_begins_with_the_mean_over_a_decoder_that_sees_everything(
    base: BaseModel, data: TrainingData
) -> None:
    vectors = trainee(base, data).encode(TEXTS)
    decoder = small_llama().base_model
    for text, vector in zip(TEXTS, vectors, strict=True):
        states = bidirectional(base.tokenizer(text)["input_ids"] + [1], decoder)
        torch.testing.assert_close(vector, states.mean(0), atol=1e-5, rtol=1e-4)
    changed = bidirectional([3, 4, 5], decoder)[0] - bidirectional([3, 4, 6], decoder)[0]
    assert changed.abs().max() > 0.01


@torch.no_grad()
def test_each_vector_is_that_of_its_text_alone(base: BaseModel, data: TrainingData) -> None:
    found = trainee(base, data)
    disturb(found)
    vectors = found.encode(TEXTS)
    tensors = found.tensors()
    merged = small_llama().base_model
    for name in tensors:
        if name.endswith(".A"):
            layer = merged.get_submodule(name.removesuffix(".A"))
            layer.weight += tensors[name.removesuffix("A") + "B"] @ tensors[name]
    own = {name: value for name, value in tensors.items() if not name.startswith("layers.")}
    head = LatentAttention.from_tensors(own, heads=2)
    for text, vector in zip(TEXTS, vectors, strict=True):
        states = bidirectional(base.tokenizer(text)["input_ids"] + [1], merged)
        torch.testing.assert_close(vector, head(states).mean(0), atol=1e-4, rtol=1e-4)


def test_both_stages_train_everything(base: BaseModel, data: TrainingData) -> None:
    found = trainee(base, data)
    disturb(found)
    for step in (0, 1):
        for value in found.parameters().values():
            value.grad = None
        found.loss(step).backward()
        assert all(value.grad is not None for value in found.parameters().values())
