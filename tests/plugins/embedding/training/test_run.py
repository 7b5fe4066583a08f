from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from galley_plugins.embedding.adapter import AdapterError, load_settings, load_tensors
from galley_plugins.embedding.training.causal2vec import Causal2VecRecipe
from galley_plugins.embedding.training.gem import GemRecipe
from galley_plugins.embedding.training.nv_embed import NvEmbedRecipe
from galley_plugins.embedding.training.run import RunOptions, run
from galley_plugins.training_checkpoint import CheckpointError
from tests.plugins.embedding.training.test_loop import Interrupt

if TYPE_CHECKING:
    from pathlib import Path

STEPS = 6
METHODS = ("gem", "causal2vec", "nv-embed")


@pytest.fixture
def options(data_folder: Path, tmp_path: Path) -> RunOptions:
    return RunOptions(data_folder, tmp_path / "out" / "adapter", STEPS, 3, 2, 1e-2, evaluations=3)


@pytest.fixture
def recipes(encoder_folder: Path) -> dict[str, Any]:
    return {
        "gem": GemRecipe(tokens=2, combine="concat", ntp_steps=2, class_share=0.3),
        "causal2vec": Causal2VecRecipe(encoder_folder, class_share=0.3),
        "nv-embed": NvEmbedRecipe(latents=4, heads=2, head_size=8, first_steps=2),
    }


@pytest.mark.parametrize("method", METHODS)
def test_a_run_writes_an_adapter_and_resumes_to_the_same(
    method: str, recipes: dict[str, Any], options: RunOptions, model_folder: Path, tmp_path: Path
) -> None:
    recipe = recipes[method]
    figures = run(model_folder, recipe, options, Interrupt())
    settings = load_settings(options.out)
    assert settings.method == method == figures.method
    assert settings.base.hidden_size == 32
    assert settings.training["steps"] == STEPS
    assert settings.training["test"] == figures.test
    assert -100 <= figures.test <= 100
    tensors = load_tensors(options.out, settings.base)
    assert [path.name for path in options.out.parent.iterdir()] == ["adapter"]

    parts = replace(options, out=tmp_path / "parts" / "adapter")
    with pytest.raises(KeyboardInterrupt):
        run(model_folder, recipe, parts, Interrupt(after=5))
    with pytest.raises(CheckpointError, match="expected --resume to go on"):
        run(model_folder, recipe, parts, Interrupt())
    with pytest.raises(CheckpointError, match=r"with rank = 2, expected 3"):
        run(model_folder, recipe, replace(parts, rank=3, resume=True), Interrupt())
    again = run(model_folder, recipe, replace(parts, resume=True), Interrupt())
    assert (again.dev, again.test, again.best_step) == (figures.dev, figures.test, figures.best_step)
    resumed = load_tensors(parts.out, settings.base)
    assert resumed.keys() == tensors.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(resumed[name], tensor, atol=1e-4, rtol=1e-3)


def test_a_seed_decides(
    recipes: dict[str, Any], options: RunOptions, model_folder: Path, tmp_path: Path
) -> None:
    found = []
    for place, seed in enumerate((3, 3, 4)):
        chosen = replace(options, out=tmp_path / f"adapter{place}", seed=seed, steps=3, evaluations=1)
        run(model_folder, recipes["nv-embed"], chosen, Interrupt())
        found.append(load_tensors(chosen.out, load_settings(chosen.out).base))
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
    assert any(not torch.equal(value, found[2][name]) for name, value in found[0].items())


def test_sizes_and_options_are_those_that_serving_reads(
    recipes: dict[str, Any], options: RunOptions, model_folder: Path
) -> None:
    expected = {
        "gem": ({"tokens": 2, "combine": "concat"}, {"prompt": "plain"}),
        "causal2vec": ({"parts": "unit"}, {}),
        "nv-embed": ({"latents": 4, "heads": 2}, {}),
    }
    names = {
        "gem": "special",
        "causal2vec": "projection.2.weight",
        "nv-embed": "latent_attention_model.latents",
    }
    for method, (sizes, chosen) in expected.items():
        run(model_folder, recipes[method], replace(options, steps=3), Interrupt())
        settings = load_settings(options.out)
        assert (settings.sizes, settings.options) == (sizes, chosen)
        tensors = load_tensors(options.out, settings.base)
        assert {name for name in tensors if name.startswith("layers.1.mlp.down_proj")} == {
            "layers.1.mlp.down_proj.A",
            "layers.1.mlp.down_proj.B",
        }
        assert names[method] in tensors
        assert "log_scale" not in tensors
    assert not (options.out / "encoder").exists()  # the last method's adapter is nothing else
    json.loads((options.out / "galley_embedding.json").read_text())


def test_a_folder_with_other_files_is_refused_before_training(
    recipes: dict[str, Any], options: RunOptions, model_folder: Path
) -> None:
    options.out.mkdir(parents=True)
    (options.out / "notes.txt").write_text("mine")
    with pytest.raises(AdapterError, match="found other files, expected an adapter to replace, or nothing"):
        run(model_folder, recipes["gem"], options, Interrupt(after=1))
