"""A random Llama of two layers, an encoder as small, and data to train them on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from galley_plugins.embedding.training.base import BaseModel
from galley_plugins.embedding.training.data import TrainingData

if TYPE_CHECKING:
    from pathlib import Path

TEXT = "a the man dog cat runs sleeps eats plays reads red blue slowly here now . not two big old"
WORDS = TEXT.split()
PAIRS = [
    ("a man runs .", "the man runs .", 5.0),
    ("a dog sleeps here .", "the dog sleeps .", 4.4),
    ("two big dog eats", "big dog eats now", 4.0),
    ("the cat plays .", "a cat runs .", 3.0),
    ("a man reads now", "the man sleeps now", 2.0),
    ("the red cat", "the blue dog", 1.0),
    ("old man eats slowly", "a cat not here", 0.0),
    ("a blue dog", "a man reads .", 0.4),
]
CLASSES = {
    "animals": ["a dog", "the cat", "two dog"],
    "people": ["a man", "the old man"],
    "x": ["red", "blue"],
}


def small_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: place for place, word in enumerate(["<unk>", "<eos>", *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>", model_max_length=64
    )


def small_llama() -> LlamaForCausalLM:
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture
def base() -> BaseModel:
    return BaseModel(small_llama(), small_tokenizer())


@pytest.fixture
def model_folder(tmp_path: Path, base: BaseModel) -> Path:
    folder = tmp_path / "model"
    base.language_model.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def encoder_folder(tmp_path: Path) -> Path:
    torch.manual_seed(6)
    config = BertConfig(
        vocab_size=64, hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    folder = tmp_path / "encoder"
    BertModel(config).save_pretrained(folder)
    small_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def data_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    (folder / "sts").mkdir(parents=True)
    (folder / "cls").mkdir()
    for split in ("train", "dev", "test"):
        lines = [f"{first},{second},{score}\n" for first, second, score in PAIRS]
        (folder / "sts" / f"stsb_en_{split}.csv").write_text("".join(lines))
    lines = [f"{text},{label}\n" for label, texts in CLASSES.items() for text in texts]
    (folder / "cls" / "train.csv").write_text("text,category\n" + "".join(lines))
    return folder


@pytest.fixture
def data(data_folder: Path) -> TrainingData:
    return TrainingData.read(data_folder)


def disturb(trainee: Any) -> None:
    """Move what is trained away from its beginning, where LoRA adds nothing."""
    draw = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for value in trainee.parameters().values():
            value.add_(0.1 * torch.randn(value.shape, generator=draw))
