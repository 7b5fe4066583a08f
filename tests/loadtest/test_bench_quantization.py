"""The benchmark's own work; no engine and no peer."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch

from galley_plugins.quantization.options import QuantizationOptions
from loadtest import bench_quantization as bench
from loadtest import llmcompressor_peer, quantization_choices
from loadtest import quantization_speed as speed
from loadtest import worker_starts as starts
from loadtest.llmcompressor_peer import PeerOptions, PeerResult
from loadtest.turns import Wave

if TYPE_CHECKING:
    from pathlib import Path


def test_the_model_gets_what_the_codes_stand_for_and_bits_are_weighted_by_size() -> None:
    torch.manual_seed(3)
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(64, 32), "b": torch.nn.Linear(128, 32)})
    originals = {name: module.weight.detach().clone() for name, module in model.items()}
    row = quantization_choices.measure(model, originals, QuantizationOptions("rtn"))
    assert row["bits"] == pytest.approx(4 + 16 * 64 / (32 * 64 + 32 * 128), abs=1e-4)  # one scale each row
    assert row["matrices_by_group_size"] == {"channel": 2}
    changed = sum(
        float((model[name].weight.detach() - old).square().sum()) for name, old in originals.items()
    )
    energy = sum(float(old.square().sum()) for old in originals.values())
    assert row["relative_error"] == pytest.approx(math.sqrt(changed / energy), abs=1e-4)
    assert 0 < row["relative_error"] < 0.15


def test_a_peers_weights_stand_beside_easyquants_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(4)
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(64, 32)})
    originals = {"a": model["a"].weight.detach().clone()}
    asked: list[Any] = []

    def quantized(folder: Any, options: PeerOptions, sequences: Any) -> PeerResult:
        asked.append((options, sequences))
        return PeerResult(12.0, 20.0, 1, {"a": originals["a"] * 1.1})

    monkeypatch.setattr(llmcompressor_peer, "quantized", quantized)
    row = quantization_choices.measure_peer(model, originals, PeerOptions("gptq", 32), [[1, 2], [3, 4]])
    assert asked == [(PeerOptions("gptq", 32), [[1, 2], [3, 4]])]
    assert row["relative_error"] == pytest.approx(0.1, abs=1e-5)
    assert torch.equal(model["a"].weight, originals["a"] * 1.1)
    assert (row["bits"], row["seconds"], row["sequences"], row["sequence_tokens"]) == (4.5, 12, 2, 2)
    assert len(row["easyquant_seconds"]) == 2
    assert row["over_easyquant"] > 1
    figures = quantization_choices.figures_of("gptq_g32", {**row, "perplexity": 9.0})
    assert figures["seconds_over_easyquant_gptq_g32"] == row["over_easyquant"]
    row = quantization_choices.measure_peer(model, originals, PeerOptions("rtn"), [])
    assert row["bits"] == 4.25  # one scale for 64 inputs
    assert "over_easyquant" not in row
    with pytest.raises(ValueError, match="found weights of 0 modules, expected 1"):
        quantization_choices.put(model, originals, {})


def test_data_and_choices_are_checked_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GALLEY_DATA", raising=False)
    monkeypatch.setenv("GALLEY_CACHE_DIR", str(tmp_path / "cache"))

    def refused(*arguments: str) -> str:
        with pytest.raises(SystemExit):
            bench.read_options(list(arguments))
        return capsys.readouterr().err

    data = ("--data", str(tmp_path))
    assert "expected a folder with lm/wikitext2_test.txt" in refused()
    assert "expected a folder with lm/wikitext2_test.txt" in refused(*data)
    assert "--choices: found awq, expected some of int8" in refused("--choices", "awq")
    assert "--only: found sped, expected some of perplexity, seconds" in refused("--only", "sped")
    (tmp_path / "lm").mkdir()
    (tmp_path / bench.WIKITEXT).write_text("words")
    assert "expected a folder with spec/specbench.jsonl" in refused(*data)
    gptq = ("--only", "perplexity", "--choices", "gptq_g64")
    assert "expected a folder with lm/wikitext2_valid.txt" in refused(*data, *gptq)
    (tmp_path / bench.CALIBRATION).write_text("words")
    assert "is not there: `python loadtest/quantization_peers.py` makes it" in refused(*data, *gptq)
    assert "--windows: found 0, expected at least 1" in refused(*data, *gptq, "--windows", "0")


def test_records_are_called_by_what_they_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GALLEY_DATA", raising=False)
    for path in (bench.WIKITEXT, bench.SPEC_BENCH):
        (tmp_path / path).parent.mkdir()
        (tmp_path / path).write_text("words")
    data = ("--data", str(tmp_path))
    options = bench.read_options([*data, "--quick"])
    assert (options.windows, options.choices, options.repeats) == (1, list(bench.QUICK_CHOICES), 3)
    assert (options.only, options.record) == (["perplexity", "speed"], "quick")
    options = bench.read_options(["--only", "seconds"])
    assert (options.record, options.repeats, options.data) == ("seconds", 3, None)
    options = bench.read_options([*data, "--only", "likelihood,speed", "--record", "mine"])
    assert (options.only, options.record) == (["likelihood", "speed"], "mine")


def test_ratios_compare_waves_of_the_same_prompts() -> None:
    waves = [
        Wave(server, load, repeat, seconds=seconds, tokens=100, prompt_tokens=10)
        for load in ("b1", "c8")
        for repeat, slow in enumerate((1, 4, 2))  # the machine slows down and recovers: ratios do not care
        for server, seconds in (
            (speed.BASE, 10.0 * slow),
            (speed.PEER, 4.0 * slow),
            (speed.OURS, 5.0 * slow),
            (speed.DRAFTING, 2.0 * slow),
            (speed.COMPILED, 8.0 * slow),
            (speed.CALIBRATED, 6.25 * slow),
            (speed.CALIBRATED_DRAFTING, 2.5 * slow),
        )
    ]
    figures = speed.figures_of(waves)
    assert figures["int4_speedup_b1"] == figures["int4_speedup_c8"] == 2.0
    assert figures["int4_hybrid_speedup_b1"] == 5.0
    assert figures["over_llamacpp_c8"] == 2.0
    assert figures["int4_over_llamacpp_b1"] == 0.8
    assert figures["int4_over_compiled_c8"] == 1.6
    assert figures["calibrated_over_compiled_b1"] == 1.28
    assert figures["calibrated_over_llamacpp_c8"] == 1.6
    assert figures["calibrated_over_int4_c8"] == 0.8
    assert figures["tokens_per_second_vllm_bf16_b1"] == 5.0
    assert "over_llamacpp_b1" not in speed.figures_of([wave for wave in waves if wave.server != speed.PEER])


def test_starts_are_compared_within_a_repeat() -> None:
    runs = [
        {"start": name, "seconds": seconds * slow, "answer_seconds": 1.0, "repeat": repeat}
        for repeat, slow in enumerate((1, 3, 2))
        for name, seconds in ((starts.EAGER, 10.0), (starts.COLD, 40.0), (starts.WARM, 12.0))
    ]
    assert starts.figures_of(runs) == {
        "start_seconds_eager": 20.0,
        "start_seconds_cold": 80.0,
        "start_seconds_warm": 24.0,
        "start_warm_over_eager": 1.2,
    }
