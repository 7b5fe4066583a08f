from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from galley_plugins.quantization import checkpoint
from galley_plugins.quantization.__main__ import app
from galley_plugins.quantization.comparison import load
from galley_plugins.quantization.sensitivity import own_text
from tests.support.small_checkpoint import make_small_checkpoint
from tests.support.small_llama import small_llama

runner = CliRunner()


@pytest.fixture
def model(tmp_path: Path) -> str:
    make_small_checkpoint(tmp_path / "model")
    return str(tmp_path / "model")


def test_a_report_lists_every_matrix(model: str, tmp_path: Path) -> None:
    arguments = ["quantize", model, str(tmp_path / "out"), "--method", "easyquant", "--group-size", "32"]
    arguments += ["--keep", "*.layers.0.*", "--rule", '*.down_proj={"bits": 8}', "--json"]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    matrices = {row["name"]: row for row in report["matrices"]}
    assert len(matrices) == 8  # the rule comes after what is kept
    assert matrices["model.layers.0.mlp.down_proj"]["bits"] == 8
    assert matrices["model.layers.1.mlp.up_proj"]["bits"] == 4
    assert 4 < report["bits_per_weight"] < 8
    assert "8 matrices" in result.stderr


def test_a_budget_of_bits_is_kept(model: str, tmp_path: Path) -> None:
    arguments = ["quantize", model, str(tmp_path / "out"), "--target-bits", "5.8", "--json"]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert 5 < json.loads(result.stdout)["bits_per_weight"] <= 5.8


@pytest.fixture
def llama(tmp_path: Path) -> str:
    small_llama().save_pretrained(tmp_path / "llama")
    return str(tmp_path / "llama")


def divergence(model: str, folder: Path) -> float:
    """Kullback-Leibler, in nats a token, over text that the model writes."""
    original, quantized = load(Path(model)).model, load(folder).model
    text = own_text(original, texts=64, tokens=24, seed=5)
    with torch.inference_mode():
        before, after = (each(text).logits.double().log_softmax(-1) for each in (original, quantized))
    return float((before.exp() * (before - after)).sum(-1).mean())


@pytest.mark.parametrize("options", [["--method", "easyquant", "--group-size", "32"], ["--target-bits", "6"]])
def test_text_of_its_own_leaves_the_model_nearer_to_itself(
    llama: str, tmp_path: Path, options: list[str]
) -> None:
    bits = {}
    for name, more in (("plain", []), ("calibrated", ["--self-calibrate"])):
        arguments = ["quantize", llama, str(tmp_path / name), *options, *more, "--json"]
        result = runner.invoke(app, arguments)
        assert result.exit_code == 0, result.output
        bits[name] = json.loads(result.stdout)["bits_per_weight"]
    assert bits["calibrated"] == pytest.approx(bits["plain"], abs=0.06)
    assert divergence(llama, tmp_path / "calibrated") < 0.9 * divergence(llama, tmp_path / "plain")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calibrated", "llama", "plain"]


def test_a_calibrated_run_that_was_stopped_goes_on(
    llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["quantize", llama, str(tmp_path / "out"), "--method", "easyquant", "--self-calibrate"]
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "quantize_together", lambda *_, **__: 1 / 0)
        assert isinstance(runner.invoke(app, arguments).exception, ZeroDivisionError)
    kept = tmp_path / "out.calibration"
    before = kept.stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint._Parts, "finish", lambda *_: 1 / 0)
        assert isinstance(runner.invoke(app, arguments).exception, ZeroDivisionError)
    assert kept.stat().st_mtime_ns == before
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert not kept.exists()
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--self-calibrate", "--method", "finequant"], "--self-calibrate: found finequant, expected easyq"),
        (["--bits", "3"], "bits: found 3, expected 4 or 8"),
        (["--rule", "*.down_proj"], "expected PATTERN=JSON"),
        (["--keep", "*.w2"], "*.w2: matches none"),
        (["--target-bits", "1"], "target bits: found 1.0, expected at least"),
    ],
)
def test_bad_options_end_it_with_a_reason(
    model: str, tmp_path: Path, options: list[str], message: str
) -> None:
    result = runner.invoke(app, ["quantize", model, str(tmp_path / "out"), *options])
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    result = runner.invoke(app, ["quantize", str(tmp_path / "empty"), str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "expected safetensors files" in result.stderr
