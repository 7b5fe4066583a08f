"""Checkpoints compared on a text, with a small Llama of random weights; expected values by transformers alone."""

from __future__ import annotations

import json
import math
import random
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from galley_plugins.quantization.__main__ import app
from galley_plugins.quantization.checkpoint import quantize_checkpoint
from galley_plugins.quantization.layout import read_quantized
from galley_plugins.quantization.plan import Plan
from tests.support.small_llama import VOCABULARY, small_llama

if TYPE_CHECKING:
    from pathlib import Path

WORDS = [f"w{number}" for number in range(VOCABULARY)]
CONTEXT = 32
runner = CliRunner()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain checkpoint, two quantized ones and a text."""
    folder = tmp_path_factory.mktemp("comparison")
    small_llama().to(torch.bfloat16).save_pretrained(folder / "plain")
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder / "plain")
    for name, values in {
        "q4": {"method": "easyquant", "group_size": 32},
        "q8": {"method": "rtn", "bits": 8},
    }.items():
        quantize_checkpoint(folder / "plain", folder / name, Plan.from_values(values))
    chosen = random.Random(11).choices(WORDS, k=5 * CONTEXT + 3)
    (folder / "text.txt").write_text(" ".join(chosen))
    return folder


def run(folder: Path, *arguments: str) -> Any:
    places = [str(folder / argument) if (folder / argument).exists() else argument for argument in arguments]
    return runner.invoke(app, ["perplexity", *places, "--context", str(CONTEXT)])


@torch.inference_mode()
def expected(model: Any, folder: Path, windows: int) -> float:
    """By the loss that transformers computes."""
    ids = [WORDS.index(word) for word in (folder / "text.txt").read_text().split()][: windows * CONTEXT]
    batch = torch.tensor(ids).view(windows, CONTEXT)
    return math.exp(float(model(batch, labels=batch).loss))


def test_checkpoints_stand_beside_one_another(folder: Path) -> None:
    result = run(folder, "text.txt", "plain", "q8", "q4", "--json")
    assert result.exit_code == 0, result.output
    plain, eight, four = json.loads(result.stdout)["models"]
    model: Any = LlamaForCausalLM.from_pretrained(folder / "plain", dtype=torch.float32)
    assert plain["perplexity"] == pytest.approx(expected(model, folder, 5), rel=1e-5)
    assert (plain["bits_per_weight"], plain["ratio"]) == (16, 1)
    for row, name in ((eight, "q8"), (four, "q4")):
        state = model.state_dict()
        weights: dict[str, Any] = {
            module: found
            for module, found in read_quantized(folder / name)
            if not isinstance(found, torch.Tensor)
        }
        assert len(weights) == 14
        for module, found in weights.items():
            state[f"{module}.weight"].copy_(found.dequantize())
        assert row["perplexity"] == pytest.approx(expected(model, folder, 5), rel=1e-5)
        assert row["ratio"] == pytest.approx(row["perplexity"] / plain["perplexity"])
    assert 8 < eight["bits_per_weight"] < 8.3  # a scale of 16 bits for each channel of 64 or 96 inputs
    assert four["bits_per_weight"] > 4 + 16 / 32


def test_bits_are_those_that_quantizing_reports(folder: Path, tmp_path: Path) -> None:
    arguments = ["quantize", str(folder / "plain"), str(tmp_path / "out"), "--json"]
    reported = json.loads(runner.invoke(app, [*arguments, "--sigma", "2"]).stdout)["bits_per_weight"]
    row = json.loads(run(folder, "text.txt", str(tmp_path / "out"), "--windows", "1", "--json").stdout)
    assert row["models"][0]["bits_per_weight"] == pytest.approx(reported)


def test_windows_and_a_table(folder: Path) -> None:
    result = run(folder, "text.txt", "plain", "--windows", "2")
    assert result.exit_code == 0, result.output
    model: Any = LlamaForCausalLM.from_pretrained(folder / "plain", dtype=torch.float32)
    assert f"{expected(model, folder, 2):.3f}" in result.stdout
    assert "bits a weight" in result.stdout


def copy_of(plain: Path, out: Path, change: str) -> None:
    """The checkpoint with something wrong."""
    out.mkdir()
    for path in plain.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    if change == "tensor":
        tensors = load_file(plain / "model.safetensors")
        del tensors["model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, out / "model.safetensors", {"format": "pt"})
    elif change == "tokenizer":
        described = json.loads((out / "tokenizer.json").read_text())
        described["model"]["vocab"] = {
            word: 47 - number for word, number in described["model"]["vocab"].items()
        }
        (out / "tokenizer.json").write_text(json.dumps(described))
    else:
        config = json.loads((out / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
        (out / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("tensor", "lacks model.layers.1.mlp.up_proj.weight, expected all weights of LlamaForCausalLM"),
        ("tokenizer", "found other tokens of the text than under"),
        ("method", "found a checkpoint that Galley did not quantize"),
    ],
)
def test_a_checkpoint_that_cannot_be_compared_is_refused(
    folder: Path, tmp_path: Path, change: str, message: str
) -> None:
    copy_of(folder / "plain", tmp_path / "other", change)
    result = run(folder, "text.txt", "plain", str(tmp_path / "other"), "--windows", "1")
    assert result.exit_code == 2
    assert message in result.stderr
    assert str(tmp_path / "other") in result.stderr


def test_a_text_or_a_context_that_does_not_fit_is_refused(folder: Path, tmp_path: Path) -> None:
    long = " ".join(WORDS * 4)
    (tmp_path / "long.txt").write_text(long)
    (tmp_path / "bytes.txt").write_bytes(b"w1 \xff")
    for arguments, message in (
        (["none.txt", "plain"], "none.txt"),
        ([str(tmp_path / "bytes.txt"), "plain"], "found invalid start byte at byte 3, expected UTF-8 text"),
        (["text.txt", "plain", "--windows", "6"], "found 163 tokens, expected 6 windows of 32"),
        (["text.txt", "./nothing"], "nothing does not exist"),
        (["text.txt", "builtin:nothing"], "no built-in model is called"),
    ):
        result = run(folder, *arguments)
        assert result.exit_code == 2
        assert message in result.stderr
    result = runner.invoke(
        app, ["perplexity", str(tmp_path / "long.txt"), str(folder / "plain"), "--context", "65"]
    )
    assert result.exit_code == 2
    assert "context: found 65, expected at most 64" in result.stderr
