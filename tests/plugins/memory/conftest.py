"""A random Llama of four layers, its tokenizer of whole words, and a corpus that repeats itself."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import faiss
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TEXT = "a the man dog cat runs sleeps eats plays reads red blue slowly here now . not two big old"
WORDS = TEXT.split()
HIDDEN, LAYERS, VOCABULARY = 32, 4, 64


def word_tokenizer(words: list[str] = WORDS) -> PreTrainedTokenizerFast:
    vocabulary = {word: place for place, word in enumerate(["<unk>", "<eos>", *words])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>")


def save_model(folder: Path, seed: int = 5, *, words: list[str] = WORDS, tied: bool = False) -> Path:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config)
    for name, value in model.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.uniform_(value, 0.5, 1.5)
    model.save_pretrained(folder)
    word_tokenizer(words).save_pretrained(folder)
    return folder


def sentences(count: int, seed: int = 0) -> list[str]:
    """Of a chain in which each word is followed by one of three."""
    random = np.random.default_rng(seed)
    texts = []
    for _ in range(count):
        places = [int(random.integers(len(WORDS)))]
        for _ in range(int(random.integers(0, 40))):
            places.append((3 * places[-1] + int(random.choice(3, p=[0.7, 0.2, 0.1]))) % len(WORDS))
        texts.append(" ".join(WORDS[place] for place in places))
    return texts


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Of tensors as small as these, several threads only wait for each other."""
    before, torch_before = faiss.omp_get_max_threads(), torch.get_num_threads()
    faiss.omp_set_num_threads(1)
    torch.set_num_threads(1)
    yield
    faiss.omp_set_num_threads(before)
    torch.set_num_threads(torch_before)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("memory") / "model")


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty documents of 1 to 40 tokens."""
    path = tmp_path_factory.mktemp("memory") / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in sentences(60)))
    return path
