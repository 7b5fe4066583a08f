import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from galley_plugins.models.conversion import convert
from galley_plugins.models.errors import ConversionError
from galley_plugins.models.weights import to_bf16


@pytest.mark.parametrize("tied", [True, False])
def test_every_tensor_is_the_dequantized_one_in_bf16(write_tiny, tmp_path: Path, tied: bool) -> None:
    tiny = write_tiny(tmp_path / "tiny.gguf", tied=tied)
    convert(tiny.path, tmp_path)
    converted = load_file(tmp_path / "model.safetensors")
    assert converted.keys() == tiny.weights.keys()
    for name, values in tiny.weights.items():
        assert torch.equal(converted[name], torch.from_numpy(values).bfloat16()), name


@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_those_of_transformers_on_the_same_gguf(write_tiny, tmp_path: Path, tied: bool) -> None:
    write_tiny(tmp_path / "tiny.gguf", tied=tied)
    out = tmp_path / "out"
    out.mkdir()
    convert(tmp_path / "tiny.gguf", out)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    for parameter in reference.parameters():
        parameter.data = parameter.data.bfloat16().float()
    ids = torch.arange(40).reshape(2, 20) * 5
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, reference(ids).logits, atol=1e-5, rtol=1e-5)


def test_the_configuration_follows_the_metadata(write_tiny, tmp_path: Path) -> None:
    convert(write_tiny(tmp_path / "tiny.gguf").path, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["rms_norm_eps"] == 1e-5
    assert config["rope_parameters"]["rope_theta"] == 50000.0
    assert config["max_position_embeddings"] == 64
    assert config["tie_word_embeddings"] is True
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }


def test_the_tokenizer_merges_splits_digits_and_keeps_special_tokens(write_tiny, tmp_path: Path) -> None:
    tiny = write_tiny(tmp_path / "tiny.gguf")
    convert(tiny.path, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.tokenize("hello 12<|im_end|>") == ["hello", "Ġ", "1", "2", "<|im_end|>"]
    assert tokenizer.chat_template == tiny.chat_template
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)


def test_progress_counts_the_bytes_of_the_weights(write_tiny, tmp_path: Path) -> None:
    tiny = write_tiny(tmp_path / "tiny.gguf")
    calls: list[tuple[int, int]] = []
    convert(tiny.path, tmp_path, lambda done, total: calls.append((done, total)))
    expected = sum(2 * values.size for values in tiny.weights.values())
    assert calls == sorted(calls)
    assert calls[-1] == (expected, expected)
    assert {total for _, total in calls} == {expected}


def test_rounding_to_bf16_is_that_of_torch() -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32)
    bits[:50_000] = bits[:50_000] & 0xFFFF0000 | 0x8000  # halfway between two values
    values = bits.view(np.float32)
    values = values[np.isfinite(values)]
    expected = torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(to_bf16(values), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"changes": {"general.architecture": "qwen2"}}, "general.architecture is 'qwen2', expected 'llama'"),
        ({"changes": {"tokenizer.ggml.pre": "llama-bpe"}}, "tokenizer.ggml.pre is 'llama-bpe'"),
        ({"skip": "blk.1.ffn_up.weight"}, r"blk.1.ffn_up.weight has shape None, expected \(160, 128\)"),
        ({"extra": "blk.0.attn_q.bias"}, r"blk.0.attn_q.bias has shape \(128,\), expected None"),
    ],
)
def test_what_it_does_not_know_is_refused(write_tiny, tmp_path: Path, options: dict, message: str) -> None:
    write_tiny(tmp_path / "tiny.gguf", **options)
    with pytest.raises(ConversionError, match=message):
        convert(tmp_path / "tiny.gguf", tmp_path)


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"not a model" * 100)
    with pytest.raises(ConversionError, match=r"x.gguf is not a readable GGUF file"):
        convert(tmp_path / "x.gguf", tmp_path)
