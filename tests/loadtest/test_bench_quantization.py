from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch

from galley_plugins.quantization.options import QuantizationOptions
from loadtest import bench_quantization as bench

if TYPE_CHECKING:
    from pathlib import Path


class Uniform(torch.nn.Module):
    """Knows nothing: every one of eight tokens is as likely."""

    def forward(self, ids: torch.Tensor) -> Any:
        return type("Output", (), {"logits": torch.zeros(*ids.shape, 8)})


def test_a_model_that_knows_nothing_is_as_perplexed_as_there_are_tokens() -> None:
    assert bench.perplexity(Uniform(), [[0, 1, 2], [3, 4]]) == pytest.approx(8)


def test_the_model_gets_what_the_codes_stand_for_and_bits_are_weighted_by_size() -> None:
    torch.manual_seed(3)
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(64, 32), "b": torch.nn.Linear(128, 32)})
    originals = {name: module.weight.detach().clone() for name, module in model.items()}
    row = bench.measure(model, originals, QuantizationOptions("rtn"))
    assert row["bits"] == pytest.approx(4 + 16 * 64 / (32 * 64 + 32 * 128), abs=1e-4)  # one scale each row
    assert row["matrices_by_group_size"] == {"channel": 2}
    changed = sum(
        float((model[name].weight.detach() - old).square().sum()) for name, old in originals.items()
    )
    energy = sum(float(old.square().sum()) for old in originals.values())
    assert row["relative_error"] == pytest.approx(math.sqrt(changed / energy), abs=1e-4)
    assert 0 < row["relative_error"] < 0.15


def test_data_and_choices_are_checked_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GALLEY_DATA", raising=False)
    for arguments, message in (
        ([], "expected a folder with lm/wikitext2_test.txt"),
        (["--data", str(tmp_path)], "expected a folder with lm/wikitext2_test.txt"),
        (["--choices", "gptq"], "--choices: found gptq, expected some of int8"),
    ):
        with pytest.raises(SystemExit):
            bench.read_options(arguments)
        assert message in capsys.readouterr().err
    (tmp_path / "lm").mkdir()
    (tmp_path / bench.WIKITEXT).write_text("words")
    options = bench.read_options(["--data", str(tmp_path), "--quick"])
    assert (options.windows, options.choices) == (1, list(bench.QUICK_CHOICES))
