from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner

from galley_plugins.embedding.__main__ import app
from galley_plugins.embedding.adapter import load_settings

if TYPE_CHECKING:
    from pathlib import Path

CHECKED = [
    (["gem", "--combine", "sum"], "'sum' is not one of 'mean', 'concat'"),
    (["gem", "--ntp-steps", "400"], "found 400, expected fewer than the 400 steps"),
    (["gem", "--lr", "0"], "--lr: found 0.0, expected more than 0"),
    (["gem", "--max-minutes", "-1"], "--max-minutes: found -1.0, expected more than 0"),
    (["causal2vec", "--parts", "both"], "'both' is not one of 'unit', 'raw'"),
    (["causal2vec", "--encoder", "/nowhere"], "found no /nowhere/config.json"),
    (["nv-embed", "--first-steps", "999"], "--first-steps: found 999, expected fewer than"),
]


@pytest.mark.parametrize(("arguments", "problem"), CHECKED)
def test_wrong_values_are_refused(
    arguments: list[str], problem: str, data_folder: Path, tmp_path: Path
) -> None:
    more = ["--model", "builtin:none", "--out", str(tmp_path / "adapter"), "--data", str(data_folder)]
    ran = CliRunner().invoke(app, ["train", *arguments, *more], env={"COLUMNS": "200"})
    assert ran.exit_code == 2
    assert problem in ran.output


def test_figures_are_the_one_line_of_stdout(model_folder: Path, data_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    places = ["--model", str(model_folder), "--data", str(data_folder), "--out", str(out)]
    sizes = ["--steps", "3", "--ntp-steps", "1", "--batch", "3", "--rank", "2"]
    ran = CliRunner().invoke(app, ["train", "gem", *places, *sizes])
    assert ran.exit_code == 0, ran.output
    (line,) = ran.stdout.splitlines()
    figures = json.loads(line)
    assert figures["method"] == "gem"
    assert figures["steps"] == 3
    assert figures["test"] == load_settings(out).training["test"]
    assert "step 3 of 3: loss" in ran.stderr
