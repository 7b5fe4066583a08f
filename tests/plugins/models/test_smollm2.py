"""The real built-in model against transformers, and against token ids that others published for SmolLM2."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

# fmt: off
SYSTEM_PROMPT = [
    1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407, 19712,
    8182, 2, 198,
]
# Made with the tokenizer of HuggingFaceTB/SmolLM2-*-Instruct and with llama.cpp.
PUBLISHED_IDS = {
    "Hello world": [19556, 905],
    "  leading spaces": [216, 2899, 5600],
    "Write a haiku about the ocean.\n": [19161, 253, 421, 30614, 563, 260, 5065, 30, 198],
    "The quick brown fox jumps over the lazy dog": [504, 2365, 6354, 16438, 27003, 690, 260, 23790, 2767],
    "Quelle est la capitale de la France ? Réponds en une phrase.": [
        65, 2726, 290, 1264, 2618, 47765, 1121, 367, 2618, 4649, 9148, 428, 2756, 96, 19870, 430, 16520, 8715,
        30,
    ],
    "<|im_start|><|im_end|><|endoftext|>": [1, 2, 0],
}
# fmt: on

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(smollm2)


def test_it_says_that_the_capital_of_france_is_paris(
    smollm2: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    prompt = tokenizer.apply_chat_template(
        QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**prompt, max_new_tokens=30, do_sample=False)[0]
    answer = output[prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert len(answer) < 30


def test_the_weights_are_those_that_transformers_reads_from_the_gguf(
    smollm2: Path, smollm2_gguf: Path
) -> None:
    reference = AutoModelForCausalLM.from_pretrained(
        smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32
    ).state_dict()
    converted = load_file(smollm2 / "model.safetensors")
    assert torch.equal(reference.pop("lm_head.weight"), reference["model.embed_tokens.weight"])
    assert converted.keys() == reference.keys()
    for name, weight in reference.items():
        assert torch.equal(converted[name], weight.bfloat16()), name


def test_the_configuration_is_that_of_smollm2(smollm2: Path) -> None:
    config = json.loads((smollm2 / "config.json").read_text())
    expected = {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "max_position_embeddings": 8192,
        "num_attention_heads": 9,
        "num_hidden_layers": 30,
        "num_key_value_heads": 3,
        "pad_token_id": 2,
        "rms_norm_eps": 1e-05,
        "rope_parameters": {"rope_theta": 100000.0, "rope_type": "default"},
        "tie_word_embeddings": True,
        "vocab_size": 49152,
    }
    assert {key: config[key] for key in expected} == expected


def test_a_chat_is_chatml_with_the_system_prompt_of_smollm2(tokenizer: PreTrainedTokenizerFast) -> None:
    text = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, tokenize=False)
    assert text == (
        "<|im_start|>system\n"
        "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\n"
        "What is the capital of France?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    question = [1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198]
    assert tokenizer(text).input_ids == [*SYSTEM_PROMPT, *question, 1, 520, 9531, 198]


@pytest.mark.parametrize(("text", "ids"), PUBLISHED_IDS.items())
def test_token_ids_are_the_published_ones(
    tokenizer: PreTrainedTokenizerFast, text: str, ids: list[int]
) -> None:
    assert tokenizer(text).input_ids == ids


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "\n\n\t  indented\r\n    twice  \n",
        "1234567890 3.14 1,000 x2y",
        "Größe, français, español, Żółć",
        "Привет, мир! Ώ Ελλάδα",
        "你好,世界。こんにちは 안녕하세요",
        "مرحبا بالعالم שלום नमस्ते",
        "👩‍👩‍👧 🇫🇷 e\u0301 \u00a0 \u200b",
        "def f(x):\n\treturn x**2  # <|not_special|>",
        "don't we'LL I'm",
    ],
)
def test_text_survives_encoding_and_decoding(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_digits_are_tokens_of_their_own(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.tokenize("in 2024") == ["in", "Ġ", "2", "0", "2", "4"]


def test_the_vocabulary_has_17_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) == 49152
    added = tokenizer.added_tokens_decoder
    assert sorted(added) == list(range(17))
    assert all(token.special for token in added.values())
    assert tokenizer.decode([*range(17), 19556], skip_special_tokens=True) == "Hello"
