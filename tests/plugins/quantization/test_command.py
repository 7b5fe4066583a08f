from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner

from galley_plugins.quantization.__main__ import app
from tests.support.small_checkpoint import make_small_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

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


@pytest.mark.parametrize(
    ("options", "message"),
    [
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
