from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.nn import functional

from galley_plugins.embedding.context_encoder import ContextEncoder, encoder_ids
from galley_plugins.embedding.training.causal2vec import Causal2Vec, Causal2VecRecipe
from galley_plugins.embedding.training.data import ScoredPairs
from tests.plugins.embedding.training.conftest import disturb, small_llama

if TYPE_CHECKING:
    from pathlib import Path

    from galley_plugins.embedding.training.base import BaseModel
    from galley_plugins.embedding.training.data import TrainingData

TEXTS = ["a man runs .", "the old dog sleeps slowly here .", "cat"]


def trainee(base: BaseModel, data: TrainingData, encoder: Path, parts: Any = "unit") -> Causal2Vec:
    return Causal2Vec(base, Causal2VecRecipe(encoder, parts), ScoredPairs(data.train, 4, 0), 4)


@torch.no_grad()
@pytest.mark.parametrize("parts", ["unit", "raw"])
def test_each_vector_is_that_of_its_text_alone(
    base: BaseModel, data: TrainingData, encoder_folder: Path, parts: str
) -> None:
    """What serving does: contextual token, text, end of text; first and last row, LoRA merged into the weights."""
    found = trainee(base, data, encoder_folder, parts)
    disturb(found)
    vectors = found.encode(TEXTS)
    tensors = found.tensors()
    merged = small_llama().base_model
    for name in tensors:
        if name.endswith(".A"):
            layer = merged.get_submodule(name.removesuffix(".A"))
            layer.weight += tensors[name.removesuffix("A") + "B"] @ tensors[name]
    encoder = ContextEncoder.load(encoder_folder, 32, tensors)
    for text, vector in zip(TEXTS, vectors, strict=True):
        ids = torch.tensor(base.tokenizer(text)["input_ids"] + [1])
        context = encoder(encoder_ids(found._encoder_tokenizer, [text]))
        inputs = torch.cat([context, merged.embed_tokens(ids)])[None]
        states = merged(inputs_embeds=inputs).last_hidden_state[0]
        parts_of = [states[0], states[-1]]
        if parts == "unit":
            parts_of = [functional.normalize(part, dim=0) for part in parts_of]
        torch.testing.assert_close(vector, torch.cat(parts_of), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_training_begins_with_the_encoders_own_cosines(
    base: BaseModel, data: TrainingData, encoder_folder: Path
) -> None:
    found = trainee(base, data, encoder_folder)
    summaries = functional.normalize(found._summarized(TEXTS), dim=1)
    rows = functional.normalize(found.encode(TEXTS)[:, :32], dim=1)
    torch.testing.assert_close(rows @ rows.T, summaries @ summaries.T, atol=0.05, rtol=0)


def test_the_encoder_is_not_trained_and_travels_with_the_adapter(
    base: BaseModel, data: TrainingData, encoder_folder: Path, tmp_path: Path
) -> None:
    found = trainee(base, data, encoder_folder)
    found.loss(0).backward()
    assert all(value.grad is None for value in found._encoder.encoder.parameters())
    assert all(value.grad is not None for value in found.parameters().values())
    found.add_files(tmp_path / "adapter")
    copy = ContextEncoder.load(tmp_path / "adapter" / "encoder", 32)
    expected = found._encoder.encoder.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in copy.encoder.state_dict().items())
