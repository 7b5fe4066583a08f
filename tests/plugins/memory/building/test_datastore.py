"""Keys are what a plain forward of transformers has at the layer's MLP, values the tokens that follow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from galley_plugins.memory.building import datastore
from galley_plugins.memory.building.datastore import (
    HELD_KEYS,
    HELD_LIKELIHOODS,
    HELD_VALUES,
    KEYS,
    VALUES,
    read_states,
)
from galley_plugins.memory.building.stages import Stage
from galley_plugins.memory.building.states import StateReader
from galley_plugins.memory.building.tokens import HELD_OUT, TOKENS, TRAIN
from tests.plugins.memory.building.conftest import CONTEXT, LAYER, contents
from tests.plugins.memory.conftest import HIDDEN, VOCABULARY

if TYPE_CHECKING:
    from pathlib import Path

CPU = torch.device("cpu")


class Plain:
    """A model of transformers, and what the MLP of one layer was given."""

    def __init__(self, folder: Path, layer: int) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.taken: list[torch.Tensor] = []
        layers = getattr(self.model.base_model, "layers", None) or self.model.base_model.h
        layers[layer].mlp.register_forward_hook(lambda module, given, out: self.taken.append(given[0]))

    @torch.no_grad()
    def __call__(self, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Of one text by itself: states [tokens - 1, hidden], and log-probabilities of tokens 1 to the last."""
        logits = self.model(torch.tensor([ids])).logits[0, :-1]
        likelihoods = torch.log_softmax(logits.double(), -1)[range(len(ids) - 1), ids[1:]]
        return self.taken.pop()[0, :-1].numpy(), likelihoods.numpy()


def expected(
    tokens: Stage, spans: str, plain: Plain, context: int
) -> tuple[np.ndarray, list[int], np.ndarray]:
    """Document by document, window by window."""
    ids = tokens.read(TOKENS, "int32").tolist()
    keys, values, likelihoods = [], [], []
    for start, stop in tokens.read(spans, "int64", 2).tolist():
        for begin in range(start, stop - 1, context):
            text = ids[begin : min(begin + context, stop - 1) + 1]
            states, found = plain(text)
            keys.append(states)
            values += text[1:]
            likelihoods.append(found)
    return np.concatenate(keys), values, np.concatenate(likelihoods)


@pytest.mark.parametrize("context", [CONTEXT, 1000])
def test_entries_are_those_of_transformers(
    context: int, tokens_stage: Stage, reader: StateReader, model_folder: Path, tmp_path: Path
) -> None:
    stage = Stage(tmp_path / "datastore", {})
    advanced: list[int] = []
    read_states(stage, tokens_stage, reader, context, advanced.append)
    plain = Plain(model_folder, LAYER)
    keys, values, _ = expected(tokens_stage, TRAIN, plain, context)
    assert np.allclose(stage.read(KEYS, "float16", HIDDEN), keys, rtol=2e-3, atol=1e-4)
    assert stage.read(VALUES, "int32").tolist() == values
    keys, values, likelihoods = expected(tokens_stage, HELD_OUT, plain, context)
    assert np.allclose(stage.read(HELD_KEYS, "float16", HIDDEN), keys, rtol=2e-3, atol=1e-4)
    assert stage.read(HELD_VALUES, "int32").tolist() == values
    assert np.allclose(stage.read(HELD_LIKELIHOODS, "float32"), likelihoods, atol=1e-4)
    result = tokens_stage.result
    assert stage.result == {"layer": LAYER, "width": HIDDEN, "entries": result["entries"]}
    assert sum(advanced) == result["entries"] + result["heldout_entries"]


def test_the_last_layer_is_minus_one(model_folder: Path) -> None:
    reader = StateReader(model_folder, -1, CPU)
    assert reader.layer == 3
    plain = Plain(model_folder, 3)
    ids = [2, 5, 7, 3]
    states, likelihoods = plain(ids)
    both = reader.states_and_likelihoods(torch.tensor([ids[:-1]]), torch.tensor([ids[1:]]))
    for found in (reader.states(torch.tensor([ids[:-1]])), both[0]):
        assert np.allclose(found[0].numpy(), states, atol=1e-5)
    assert np.allclose(both[1][0].numpy(), likelihoods, atol=1e-4)


def test_a_model_of_the_gpt2_family_is_read(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=3, n_head=2, n_positions=32)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    reader = StateReader(tmp_path / "gpt2", 1, CPU)
    ids = [2, 5, 7, 3]
    states, _ = Plain(tmp_path / "gpt2", 1)(ids)
    assert np.allclose(reader.states(torch.tensor([ids[:-1]]))[0].numpy(), states, atol=1e-5)


@pytest.mark.parametrize("layer", [4, -5])
def test_a_layer_that_is_not_there_is_refused(model_folder: Path, layer: int) -> None:
    with pytest.raises(ValueError, match=f"layer: found {layer}, expected -4 to 3"):
        StateReader(model_folder, layer, CPU)


class Ends:
    """A reader that ends the run at a forward."""

    def __init__(self, reader: StateReader, left: int) -> None:
        self.reader, self.left = reader, left
        self.width, self.layer, self.device = reader.width, reader.layer, reader.device

    def states(self, ids: torch.Tensor) -> torch.Tensor:
        self._count()
        return self.reader.states(ids)

    def states_and_likelihoods(self, *given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self._count()
        return self.reader.states_and_likelihoods(*given)

    def _count(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("after", [3, 20, 40])
def test_an_interrupted_reading_goes_on_to_the_same_bytes(
    after: int, tokens_stage: Stage, datastore_stage: Stage, reader: StateReader, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(datastore, "NOTED", 20)
    stage = Stage(tmp_path / "datastore", {})
    with pytest.raises(KeyboardInterrupt):
        read_states(stage, tokens_stage, Ends(reader, after), CONTEXT)  # type: ignore[arg-type]
    assert not stage.done
    forwards: Any = Ends(reader, 1000)
    advanced: list[int] = []
    read_states(stage, tokens_stage, forwards, CONTEXT, advanced.append)
    assert contents(stage) == contents(datastore_stage)
    assert sum(advanced) == tokens_stage.result["entries"] + tokens_stage.result["heldout_entries"]
    if after > 20:  # 20 entries are no more than 20 forwards
        again: Any = Ends(reader, 1000)
        read_states(Stage(tmp_path / "again", {}), tokens_stage, again, CONTEXT)
        assert forwards.left >= again.left + after - 20


def test_states_beyond_half_precision_are_cut(
    tokens_stage: Stage, reader: StateReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = reader.states
    monkeypatch.setattr(reader, "states", lambda ids: own(ids) * 1e8)
    stage = Stage(tmp_path / "datastore", {})
    read_states(stage, tokens_stage, reader, CONTEXT)
    keys = stage.read(KEYS, "float16", HIDDEN)
    assert np.isfinite(keys).all()
    assert np.abs(keys).max() == np.finfo(np.float16).max
