"""A memory's folder: read back as it was written, refused where it is not one of this model."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from galley_plugins.memory import checkpoint
from galley_plugins.memory.checkpoint import (
    SETTINGS,
    WEIGHTS,
    Base,
    MemoryFileError,
    MemorySettings,
    check_base,
    load_network,
    load_served,
    load_settings,
    memory_folder,
    model_hash,
    output_rows,
    save_memory,
)
from galley_plugins.memory.network import Sizes
from galley_plugins.quantization.checkpoint import quantize_checkpoint
from galley_plugins.quantization.options import QuantizationOptions
from galley_plugins.quantization.plan import Plan
from galley_plugins.quantization.source import CheckpointError
from tests.plugins.memory.conftest import HIDDEN, LAYERS, VOCABULARY, WORDS, save_model
from tests.plugins.memory.reference import plain_forward, random_tensors

if TYPE_CHECKING:
    from pathlib import Path

SIZES = Sizes("llama", HIDDEN, HIDDEN, 24, 2, VOCABULARY, 1e-3)
TENSORS = random_tensors("llama", HIDDEN, HIDDEN, 24, 2, VOCABULARY)
STATES = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def base(model_folder: Path) -> Base:
    return Base.of(model_folder)


@pytest.fixture
def settings(base: Base) -> MemorySettings:
    return MemorySettings(SIZES, 2, 0.3, base, "1.2", {"hash": "h", "tokens": 5}, {"mix": {"nats": 1.5}})


@pytest.fixture
def folder(settings: MemorySettings, tmp_path: Path) -> Path:
    save_memory(tmp_path / "memory", settings, TENSORS)
    return tmp_path / "memory"


def change(folder: Path, **values: Any) -> None:
    found = json.loads((folder / SETTINGS).read_text())
    (folder / SETTINGS).write_text(json.dumps({**found, **values}))


def test_the_base_is_said_by_sizes_and_hashes(base: Base) -> None:
    assert (base.hidden_size, base.layers, base.vocabulary) == (HIDDEN, LAYERS, VOCABULARY)
    assert len(base.model) == len(base.tokenizer) == 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_memory_is_read_back_as_it_was_written(
    dtype: torch.dtype, settings: MemorySettings, base: Base, tmp_path: Path
) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in TENSORS.items()}
    save_memory(tmp_path / "memory", settings, tensors)
    assert load_settings(tmp_path / "memory") == settings == check_base(tmp_path / "memory", base)
    network, columns = load_network(tmp_path / "memory", settings)
    assert columns is None
    expected = plain_forward("llama", tensors, STATES, 1e-3)
    assert torch.allclose(network(STATES).double(), expected, atol=1e-4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["memory"]
    assert memory_folder(tmp_path) == memory_folder(tmp_path / "memory") == tmp_path / "memory"


def test_a_memory_is_served_beside_its_model(
    folder: Path, settings: MemorySettings, model_folder: Path
) -> None:
    found, network, columns = load_served(folder.parent, model_folder, torch.device("cpu"), torch.bfloat16)
    assert found == settings
    assert columns is None
    assert network.lm_head.weight.dtype == torch.bfloat16


def test_a_newer_memory_takes_the_place_of_the_older(folder: Path, settings: MemorySettings) -> None:
    (folder / "more").write_text("x")
    save_memory(folder, replace(settings, weight=0.5), TENSORS)
    assert load_settings(folder).weight == 0.5
    assert sorted(path.name for path in folder.iterdir()) == [SETTINGS, WEIGHTS]


def test_a_folder_of_something_else_is_not_overwritten(settings: MemorySettings, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(MemoryFileError, match="mine: found other files, expected a memory to replace"):
        save_memory(tmp_path / "mine", settings, TENSORS)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_writing_that_fails_leaves_the_older_memory(
    folder: Path, settings: MemorySettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*given: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", fails)
    with pytest.raises(OSError, match="No space"):
        save_memory(folder, replace(settings, weight=0.9), TENSORS)
    assert load_settings(folder) == settings
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_memory_of_another_model_is_refused_with_both_hashes(
    folder: Path, base: Base, tmp_path: Path
) -> None:
    other = Base.of(save_model(tmp_path / "model", seed=6))
    assert other.tokenizer == base.tokenizer
    with pytest.raises(
        MemoryFileError,
        match=f"another model: found hash {base.model}, the model here has {other.model}",
    ):
        check_base(folder, other)


def test_a_memory_of_another_tokenizer_is_refused_with_both_hashes(
    folder: Path, base: Base, tmp_path: Path
) -> None:
    words = [*WORDS[1:], WORDS[0]]
    other = Base.of(save_model(tmp_path / "model", words=words))
    assert other.model == base.model
    with pytest.raises(
        MemoryFileError,
        match=f"another tokenizer: found hash {base.tokenizer}, the tokenizer here has {other.tokenizer}",
    ):
        check_base(folder, other)


def test_a_model_and_its_quantized_form_have_one_hash(model_folder: Path, base: Base, tmp_path: Path) -> None:
    quantize_checkpoint(
        model_folder, tmp_path / "quantized", Plan(QuantizationOptions("finequant", group_sizes=(16,)))
    )
    assert Base.of(tmp_path / "quantized") == base
    assert torch.equal(output_rows(tmp_path / "quantized", None), output_rows(model_folder, None))


def test_the_hash_follows_norms_and_their_names(model_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(model_folder, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][0] += 0.01
    save_file(tensors, file)
    assert model_hash(tmp_path / "model") != model_hash(model_folder)
    save_file({name: tensor for name, tensor in tensors.items() if "norm" not in name}, file)
    with pytest.raises(CheckpointError, match="found no norm among its tensors"):
        model_hash(tmp_path / "model")


def test_output_rows_are_the_heads_or_the_embeddings(model_folder: Path, tmp_path: Path) -> None:
    tensors = load_file(model_folder / "model.safetensors")
    assert torch.equal(output_rows(model_folder, None), tensors["lm_head.weight"].float())
    columns = torch.tensor([3, 5], dtype=torch.int32)
    assert torch.equal(output_rows(model_folder, columns), tensors["lm_head.weight"][[3, 5]].float())
    tied = save_model(tmp_path / "tied", tied=True)
    tensors = load_file(tied / "model.safetensors")
    assert "lm_head.weight" not in tensors
    assert torch.equal(output_rows(tied, None), tensors["model.embed_tokens.weight"].float())


def test_a_head_that_is_quantized_is_not_taken_for_the_embeddings(model_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(model_folder, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight_packed"] = tensors.pop("lm_head.weight").to(torch.int32)
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"found lm_head\.weight_packed, expected lm_head\.weight"):
        output_rows(tmp_path / "model", None)


def test_without_a_head_the_models_own_is_read(
    settings: MemorySettings, model_folder: Path, tmp_path: Path
) -> None:
    headless = {name: tensor for name, tensor in TENSORS.items() if name != "lm_head.weight"}
    columns = torch.tensor([1, 5, 9], dtype=torch.int32)
    own = replace(settings, sizes=replace(SIZES, outputs=3))
    save_memory(tmp_path / "memory", own, {**headless, "columns": columns})
    network, known = load_network(tmp_path / "memory", own, model_folder)
    assert known is not None
    assert known.tolist() == [1, 5, 9]
    assert torch.equal(network.lm_head.weight, output_rows(model_folder, columns))
    with pytest.raises(MemoryFileError, match=r"lacks lm_head\.weight, and no model was given"):
        load_network(tmp_path / "memory", own)


GATE = "layers.1.mlp.gate_proj.weight"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({GATE: None}, rf"{GATE}: found nothing, expected \[24, 32\]"),
        ({GATE: torch.zeros(32, 24)}, rf"{GATE}: found \[32, 24\], expected \[24, 32\]"),
        ({GATE: torch.full((24, 32), torch.nan)}, f"{GATE}: found values that are no finite numbers"),
        ({GATE: torch.full((24, 32), torch.inf)}, f"{GATE}: found values that are no finite numbers"),
        ({"b": torch.ones(1), "a": torch.ones(1)}, "found tensors that it does not know: a, b"),
        ({"columns": torch.tensor([1, 2])}, r"columns: found \[2\], expected 64 rising numbers from 0 to 63"),
        ({"columns": torch.arange(64).flip(0)}, "columns: .*rising"),
        ({"columns": torch.arange(1, 65)}, "columns: .*rising numbers from 0 to 63"),
        ({"columns": torch.arange(-1, 63)}, "columns: .*rising numbers from 0 to 63"),
    ],
)
def test_wrong_tensors_are_refused_by_name(
    changed: dict[str, Any], message: str, settings: MemorySettings, tmp_path: Path
) -> None:
    tensors = {name: tensor for name, tensor in {**TENSORS, **changed}.items() if tensor is not None}
    save_memory(tmp_path / "memory", settings, tensors)
    with pytest.raises(MemoryFileError, match=message):
        load_network(tmp_path / "memory", settings)


def test_fewer_outputs_than_tokens_need_columns(settings: MemorySettings, tmp_path: Path) -> None:
    own = replace(settings, sizes=replace(SIZES, outputs=3))
    save_memory(tmp_path / "memory", own, {**TENSORS, "lm_head.weight": TENSORS["lm_head.weight"][:3]})
    with pytest.raises(
        MemoryFileError, match="columns: found nothing, expected 3 rising numbers from 0 to 63"
    ):
        load_network(tmp_path / "memory", own)


@pytest.mark.parametrize("size", [0, 7, 500])
def test_a_truncated_file_is_refused(folder: Path, settings: MemorySettings, size: int) -> None:
    os.truncate(folder / WEIGHTS, size)
    with pytest.raises(MemoryFileError, match=r"the weights in .* cannot be read"):
        load_network(folder, settings)
    (folder / WEIGHTS).unlink()
    with pytest.raises(MemoryFileError, match=r"the weights in .* cannot be read"):
        load_network(folder, settings)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"format": 2}, "found format 2, expected 1"),
        ({"format": None}, "found format None, expected 1"),
        ({"sizes": 5}, f"{SETTINGS}: .*expected sizes, layer, weight"),
        ({"sizes": {"family": "llama"}}, f"{SETTINGS}: .*missing"),
        ({"more": 1}, "unexpected keyword argument 'more'"),
        ({"base": {"model": "x"}}, "missing"),
        ({"weight": 1.5}, "weight: found 1.5, expected 0 to 1"),
        ({"weight": "half"}, "weight: found 'half'"),
        ({"layer": 1.5}, "layer: found 1.5, expected a number"),
    ],
)
def test_wrong_settings_are_refused(values: dict[str, Any], message: str, folder: Path) -> None:
    change(folder, **values)
    with pytest.raises(MemoryFileError, match=message):
        load_settings(folder)


@pytest.mark.parametrize("layer", [-1, LAYERS])
def test_a_layer_that_the_model_lacks_is_refused(layer: int, folder: Path, base: Base) -> None:
    change(folder, layer=layer)
    with pytest.raises(MemoryFileError, match=f"layer: found {layer}, expected 0 to {LAYERS - 1}"):
        check_base(folder, base)


@pytest.mark.parametrize(
    ("text", "message"), [("{", "is not JSON"), ("[]", "found list, expected an object")]
)
def test_damaged_settings_are_refused(text: str, message: str, folder: Path) -> None:
    (folder / SETTINGS).write_text(text)
    with pytest.raises(MemoryFileError, match=message):
        load_settings(folder)


def test_a_folder_that_is_no_memory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MemoryFileError, match=r"galley_memory\.json cannot be read: No such file"):
        load_settings(tmp_path)


# The authors' folders


def released(folder: Path, family: str, tensors: Any, inputs: int = HIDDEN, **config: Any) -> Path:
    generator = folder / "knn_generator"
    generator.mkdir(parents=True)
    (folder / "mlp_memory_config.json").write_text(json.dumps({"layer_position": -1, "is_train": False}))
    if family == "gpt2":
        sizes = {"model_type": "gpt2", "n_embd": HIDDEN, "n_layer": 2, "layer_norm_epsilon": 1e-3}
    else:
        sizes = {"model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": 24,
                 "num_hidden_layers": 2, "rms_norm_eps": 1e-3}  # fmt: skip
    (generator / "config.json").write_text(json.dumps({**sizes, "vocab_size": VOCABULARY, **config}))
    torch.save(tensors, generator / "pytorch_model.bin")
    return folder


@pytest.mark.parametrize("inputs", [HIDDEN, 20])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_authors_folders_are_read(family: str, inputs: int, base: Base, tmp_path: Path) -> None:
    hidden = 24 if family == "llama" else 4 * HIDDEN
    tensors = random_tensors(family, inputs, HIDDEN, hidden, 2, VOCABULARY)
    folder = released(tmp_path / "released", family, tensors)
    settings = check_base(folder, replace(base, hidden_size=inputs))
    assert (settings.layer, settings.weight, settings.base) == (LAYERS - 1, 0.25, None)
    assert (settings.sizes.family, settings.sizes.inputs, settings.sizes.blocks) == (family, inputs, 2)
    network, columns = load_network(folder, settings)
    states = torch.randn(5, inputs, generator=torch.Generator().manual_seed(3))
    expected = plain_forward(family, tensors, states, 1e-3)
    assert columns is None
    assert torch.allclose(network(states).double(), expected, atol=1e-4)


def test_the_authors_weights_may_be_safetensors(base: Base, tmp_path: Path) -> None:
    folder = released(tmp_path / "released", "llama", {})
    save_file(TENSORS, folder / "knn_generator" / "model.safetensors")
    network, _ = load_network(folder, check_base(folder, base))
    assert torch.allclose(network(STATES).double(), plain_forward("llama", TENSORS, STATES, 1e-3), atol=1e-4)


@pytest.mark.parametrize("changed", [{"hidden_size": HIDDEN + 1}, {"vocabulary": VOCABULARY + 1}])
def test_the_authors_folder_of_a_model_of_other_sizes_is_refused(
    changed: dict[str, int], base: Base, tmp_path: Path
) -> None:
    folder = released(tmp_path / "released", "llama", TENSORS)
    said = f"reads states of {HIDDEN} and knows {VOCABULARY} tokens, the model here has"
    with pytest.raises(MemoryFileError, match=said):
        check_base(folder, replace(base, **changed))


class Evil:
    """Makes a folder where it is unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("unpickled",)


@pytest.mark.parametrize(
    "content",
    [
        {**TENSORS, "x": Evil()},
        Evil(),
        [TENSORS["norm.weight"]],
        {**TENSORS, "norm.weight": 5},
        {5: torch.ones(1)},
    ],
    ids=["object among tensors", "object", "list", "number", "number as name"],
)
def test_a_pickle_of_anything_but_tensors_is_refused(
    content: Any, base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = released(tmp_path / "released", "llama", content)
    with pytest.raises(MemoryFileError, match=r"the weights in .*released cannot be read"):
        check_base(folder, base)
    assert [path.name for path in tmp_path.iterdir()] == ["released"]


@pytest.mark.parametrize("content", [b"", b"no pickle", b"\x80\x02", b"PK\x03\x04 no archive"])
def test_a_file_that_is_no_pickle_is_refused(content: bytes, base: Base, tmp_path: Path) -> None:
    folder = released(tmp_path / "released", "llama", TENSORS)
    (folder / "knn_generator" / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(MemoryFileError, match=r"the weights in .*released cannot be read"):
        check_base(folder, base)


@pytest.mark.parametrize("position", [None, "last", 1.5])
def test_a_wrong_layer_position_is_refused(position: Any, base: Base, tmp_path: Path) -> None:
    folder = released(tmp_path / "released", "llama", TENSORS)
    (folder / "mlp_memory_config.json").write_text(json.dumps({"layer_position": position}))
    with pytest.raises(MemoryFileError, match=r"layer_position: found .*expected a number"):
        check_base(folder, base)


def test_a_config_without_its_sizes_is_refused(base: Base, tmp_path: Path) -> None:
    folder = released(tmp_path / "released", "llama", TENSORS, hidden_size="wide")
    with pytest.raises(MemoryFileError, match=r"knn_generator/config\.json: .*'wide'"):
        check_base(folder, base)
