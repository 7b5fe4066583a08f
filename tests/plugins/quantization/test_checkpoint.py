"""Quantized checkpoints are written whole, go on where they were stopped, and are refused where damaged."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file, save_file

from galley_kernels import PackedMatrix
from galley_plugins.quantization import checkpoint
from galley_plugins.quantization.checkpoint import matrices_together, quantize_checkpoint
from galley_plugins.quantization.layout import read_quantized
from galley_plugins.quantization.options import QuantizationOptions
from galley_plugins.quantization.plan import Plan
from galley_plugins.quantization.quantizer import quantize, quantize_together
from galley_plugins.quantization.sensitivity import Sensitivity
from galley_plugins.quantization.source import CheckpointError, Source
from tests.support.small_checkpoint import LAYERS, make_small_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

BOTH = Plan(QuantizationOptions(group_sizes=(64, 32), sigma=2.5))
FINE = Plan(QuantizationOptions("finequant", group_sizes=(64, 32)))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    make_small_checkpoint(tmp_path / "model")
    return tmp_path / "model"


def content(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def test_matrices_come_back_as_they_were_quantized_and_the_rest_unchanged(
    source: Path, tmp_path: Path
) -> None:
    tensors = make_small_checkpoint(source)
    rows = quantize_checkpoint(source, tmp_path / "out", BOTH)
    assert len(rows) == 7 * LAYERS
    found = dict(read_quantized(tmp_path / "out"))
    layer = "model.layers.1.self_attn"
    fused = [tensors[f"{layer}.{part}_proj.weight"] for part in "qkv"]
    for part, matrix in zip("qkv", quantize_together(fused, BOTH.default), strict=True):
        packed = found.pop(f"{layer}.{part}_proj")
        assert isinstance(packed, PackedMatrix)
        assert torch.equal(packed.dequantize(), matrix.dequantize())
    alone = found.pop("model.layers.0.mlp.down_proj")
    assert isinstance(alone, PackedMatrix)
    expected = quantize(tensors["model.layers.0.mlp.down_proj.weight"], BOTH.default)
    assert torch.equal(alone.dequantize(), expected.dequantize())
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.layers.0.input_layernorm.weight"):
        assert torch.equal(found[name], tensors[name])  # type: ignore[arg-type]
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert not (tmp_path / "out.partial").exists()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["hidden_size"] == 64
    assert config["quantization_config"]["quant_method"] == "galley"


def test_the_report_says_what_was_made(source: Path, tmp_path: Path) -> None:
    tensors = make_small_checkpoint(source)
    rows = {row.name: row for row in quantize_checkpoint(source, tmp_path / "out", BOTH)}
    row = rows["model.layers.0.mlp.down_proj"]
    weights = tensors[f"{row.name}.weight"].float()
    matrix = quantize(weights, BOTH.default)
    assert (row.shape, row.bits, row.group_size) == ((64, 160), 4, matrix.group_size)
    assert row.bits_per_weight == matrix.bits_per_weight
    assert row.error == pytest.approx(
        float((matrix.dequantize() - weights).norm() / weights.norm()), rel=1e-6
    )


def test_maps_that_are_fused_share_a_group_size(source: Path, tmp_path: Path) -> None:
    with Source(source) as model:
        groups = matrices_together(model, FINE)
    assert sorted(len(group) for group in groups) == [1, 1, 1, 1, 2, 2, 3, 3]
    sizes = {row.name: row.group_size for row in quantize_checkpoint(source, tmp_path / "out", FINE)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        assert len({sizes[f"{prefix}self_attn.{part}_proj"] for part in "qkv"}) == 1
        assert sizes[f"{prefix}mlp.gate_proj"] == sizes[f"{prefix}mlp.up_proj"]


def test_without_outliers_compressed_tensors_reads_it(source: Path, tmp_path: Path) -> None:
    plan = Plan.from_values(
        {"method": "finequant", "group_sizes": (64, 32)}, [("*.down_proj", {"bits": 8}), ("*.o_proj", None)]
    )
    rows = quantize_checkpoint(source, tmp_path / "out", plan)
    described = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    own = described.pop("galley")
    config = QuantizationConfig.model_validate(described)
    assert config.format == "pack-quantized"
    tensors, matrices = content(tmp_path / "out"), dict(read_quantized(tmp_path / "out"))
    targets = {name: scheme for scheme in config.config_groups.values() for name in scheme.targets}
    assert targets.keys() == {row.name for row in rows} == own["matrices"].keys()
    assert not any(name.endswith("o_proj") for name in targets)
    for name, scheme in targets.items():
        weights = scheme.weights
        assert weights.num_bits == (8 if name.endswith("down_proj") else 4)
        shape = torch.Size(tensors[f"{name}.weight_shape"].tolist())
        codes = unpack_from_int32(tensors[f"{name}.weight_packed"], weights.num_bits, shape)
        scales = tensors[f"{name}.weight_scale"].float().repeat_interleave(weights.group_size, 1)
        assert torch.allclose(codes.float() * scales, matrices[name].dequantize())  # type: ignore[union-attr]


def known(source: Path, loud: str | None = None) -> dict[str, Sensitivity]:
    """Costs of all matrices, one of them much higher than the others."""
    generator = torch.Generator().manual_seed(3)
    found = {}
    with Source(source) as model:
        for names in matrices_together(model, BOTH):
            for name in names:
                rows, columns = model.shape(name)
                module = name.removesuffix(".weight")
                inputs = torch.rand(columns, generator=generator) + 0.5
                found[module] = Sensitivity(inputs, torch.full((rows,), 40.0 if module == loud else 1.0))
    return found


def test_where_costs_are_known_outliers_go_where_they_cost_most(source: Path, tmp_path: Path) -> None:
    loud = "model.layers.1.mlp.down_proj"

    def counts(name: str, sensitivities: dict[str, Sensitivity] | None) -> dict[str, float]:
        rows = quantize_checkpoint(source, tmp_path / name, BOTH, sensitivities=sensitivities)
        found = dict(read_quantized(tmp_path / name))
        for row in rows:
            matrix = found[row.name]
            assert isinstance(matrix, PackedMatrix)
            assert matrix.outliers is not None
            assert len(matrix.outliers.values) == round(row.outlier_share * row.weights)
        return {row.name: row.outlier_share * row.weights for row in rows}

    without, alike, one = (
        counts("without", None),
        counts("alike", known(source)),
        counts("one", known(source, loud)),
    )
    for found in (alike, one):
        assert 0.97 * sum(without.values()) <= sum(found.values()) <= sum(without.values())
    assert one[loud] > 2 * alike[loud]
    assert all(one[name] <= alike[name] for name in one if name != loud)
    described = [
        json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]["calibrated"]
        for name in ("without", "alike", "one")
    ]
    assert described == [False, True, True]


def stop_after(count: int) -> Any:
    def advance(name: str, weights: int) -> None:
        nonlocal count
        count -= 1
        if count < 0:
            raise KeyboardInterrupt

    return advance


@pytest.mark.parametrize("finished", [1, 5, 14])
def test_a_run_that_was_stopped_goes_on(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: int
) -> None:
    monkeypatch.setattr(checkpoint, "PART_BYTES", 4000)
    whole = quantize_checkpoint(source, tmp_path / "whole", BOTH)
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(source, tmp_path / "out", BOTH, advance=stop_after(finished))
    assert not (tmp_path / "out").exists()
    made = []
    own = checkpoint.quantize_together
    monkeypatch.setattr(
        checkpoint, "quantize_together", lambda *given, **more: made.append(1) or own(*given, **more)
    )
    assert sorted(quantize_checkpoint(source, tmp_path / "out", BOTH), key=lambda row: row.name) == sorted(
        whole, key=lambda row: row.name
    )
    assert len(made) <= 8
    assert finished < 10 or len(made) < 8  # some were there
    one, other = content(tmp_path / "whole"), content(tmp_path / "out")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == other.keys()


def test_leftovers_of_another_plan_are_not_used(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "PART_BYTES", 4000)
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(source, tmp_path / "out", BOTH, advance=stop_after(14))
    quantize_checkpoint(source, tmp_path / "out", FINE)
    assert not any(".outlier" in name for name in content(tmp_path / "out"))


def test_a_folder_that_exists_is_left_alone(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="expected a new folder"):
        quantize_checkpoint(source, tmp_path / "out", BOTH)
    assert list((tmp_path / "out").iterdir()) == []


def test_what_cannot_be_quantized_is_named(source: Path, tmp_path: Path) -> None:
    quantize_checkpoint(source, tmp_path / "once", BOTH)
    with pytest.raises(CheckpointError, match="quantized already"):
        quantize_checkpoint(tmp_path / "once", tmp_path / "twice", BOTH)
    with pytest.raises(ValueError, match=r"\*.w1: matches none of the model's 16 matrices"):
        quantize_checkpoint(source, tmp_path / "out", Plan(BOTH.default, (("*.w1", None),)))
    mixed = Plan(BOTH.default, (("*.q_proj", QuantizationOptions("rtn", bits=8)),))
    with pytest.raises(ValueError, match="as vLLM fuses them"):
        quantize_checkpoint(source, tmp_path / "out", mixed)
    shutil.rmtree(tmp_path / "out.partial")
    coarse = Plan(QuantizationOptions("rtn", group_size=128))
    with pytest.raises(ValueError, match=r"model.layers.0.*: found an input dimension of"):
        quantize_checkpoint(source, tmp_path / "out", coarse)
    (source / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="00002-of-00002"):
        quantize_checkpoint(source, tmp_path / "out", BOTH)


Damage = dict[str, torch.Tensor | None]
NAME = "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantized")
    make_small_checkpoint(folder / "model")
    quantize_checkpoint(folder / "model", folder / "out", BOTH)
    return folder / "out"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"weight_scale": None}, "weight_scale is missing"),
        (
            {"weight_scale": torch.full((64, 5), float("nan"), dtype=torch.bfloat16)},
            "weight_scale: found values",
        ),
        ({"weight_scale": torch.ones(64, 3, dtype=torch.bfloat16)}, "weight_packed: found scales"),
        ({"weight_scale": torch.ones(64, 5)}, "weight_scale: found torch.float32, expected torch.bfloat16"),
        ({"weight_packed": torch.zeros(64, 10, dtype=torch.int32)}, "weight_packed: found"),
        ({"outlier_columns": None}, "outlier_columns is missing"),
        (
            {"outlier_starts": torch.zeros(65, dtype=torch.int32)},
            "outlier_starts: found rows that do not fit",
        ),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_the_tensors_name(
    quantized: Path, tmp_path: Path, damage: Damage, message: str
) -> None:
    shutil.copytree(quantized, tmp_path / "out")
    tensors = content(tmp_path / "out")
    for part, value in damage.items():
        tensors.pop(f"{NAME}.{part}")
        if value is not None:
            tensors[f"{NAME}.{part}"] = value
    for file in (tmp_path / "out").glob("*.safetensors"):
        file.unlink()
    (tmp_path / "out" / "model.safetensors.index.json").unlink()
    save_file(tensors, tmp_path / "out" / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{NAME}.{message}"):
        list(read_quantized(tmp_path / "out"))


def test_a_newer_format_and_foreign_checkpoints_are_refused(quantized: Path, tmp_path: Path) -> None:
    shutil.copytree(quantized, tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["format_version"] = 9
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="found format version 9, expected at most 1"):
        list(read_quantized(tmp_path / "out"))
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="Galley did not quantize"):
        list(read_quantized(tmp_path / "out"))
