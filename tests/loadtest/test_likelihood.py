"""Greedy answers and their scores, of a small Llama of random weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from loadtest.likelihood import Answer, greedy_answers, mean, scores, until_end

END = 3


class Words:
    """A tokenizer whose words are numbers."""

    def apply_chat_template(self, messages: Any, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [1, *map(int, messages[0]["content"].split()), 2]}


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(9)
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.5, eos_token_id=END,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@torch.inference_mode()
def one_by_one(model: Any, prompt: list[int], tokens: int) -> Answer:
    """The most likely token, again and again, without a cache."""
    written: list[int] = []
    while len(written) < tokens and END not in written:
        written.append(int(model(torch.tensor([prompt + written])).logits[0, -1].argmax()))
    return Answer(prompt, written)


def test_answers_are_what_each_text_gets_alone(model: Any) -> None:
    texts = ["4 5 6 7 8 9", "10", "11 12 13", "14 15", "16 17 18 19 20 21 22"]
    told: list[int] = []
    found = greedy_answers(model, Words(), texts, tokens=12, batch=2, advance=told.append)
    assert found == [one_by_one(model, [1, *map(int, text.split()), 2], 12) for text in texts]
    assert told == [2, 2, 1]


def test_only_what_was_written_is_scored(model: Any) -> None:
    answer = one_by_one(model, [1, 4, 5, 2], 6)
    (row,) = scores(model, [answer])
    with torch.inference_mode():
        logits = model(torch.tensor([answer.prompt + answer.written])).logits[0].log_softmax(-1)
    expected = [float(logits[3 + place, token]) for place, token in enumerate(answer.written)]
    assert row == pytest.approx(expected, abs=1e-5)
    assert expected == pytest.approx(logits[3:-1].amax(-1).tolist())  # greedy: the likeliest each time


def test_an_answer_ends_with_its_first_stop() -> None:
    assert until_end([5, 6, END, 7, END], {END}) == [5, 6, END]
    assert until_end([5, 6], {END}) == [5, 6]


def test_the_mean_is_over_tokens() -> None:
    assert mean([[-1.0, -2.0, -3.0], [-4.0]]) == -2.5
