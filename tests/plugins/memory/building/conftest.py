from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from galley_plugins.memory.building.corpus import Corpus
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
from galley_plugins.memory.building.tokens import tokenize
from tests.plugins.memory.conftest import word_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

CONTEXT = 16
LAYER = 2


@pytest.fixture(scope="session")
def reader(model_folder: Path) -> StateReader:
    return StateReader(model_folder, LAYER, torch.device("cpu"))


@pytest.fixture(scope="session")
def tokens_stage(corpus_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Stage:
    stage = Stage(tmp_path_factory.mktemp("memory") / "tokens", {})
    tokenize(stage, Corpus(corpus_file), 0.2, word_tokenizer())
    return stage


@pytest.fixture(scope="session")
def datastore_stage(
    tokens_stage: Stage, reader: StateReader, tmp_path_factory: pytest.TempPathFactory
) -> Stage:
    stage = Stage(tmp_path_factory.mktemp("memory") / "datastore", {})
    read_states(stage, tokens_stage, reader, CONTEXT)
    return stage


def stored(folder: Path, keys: Any, values: Any, held: tuple[Any, Any, Any]) -> Stage:
    """A datastore of given arrays; `held` are the keys, values and log-probabilities of the held-out text."""
    stage = Stage(folder, {})
    stage.begin()
    for name, dtype, rows in (
        (KEYS, "float16", keys),
        (VALUES, "int32", values),
        (HELD_KEYS, "float16", held[0]),
        (HELD_VALUES, "int32", held[1]),
        (HELD_LIKELIHOODS, "float32", held[2]),
    ):
        rows = np.asarray(rows, dtype)
        stage.array(name, dtype, rows.shape)[...] = rows
    stage.finish({})
    return stage


def contents(stage: Stage) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in stage.folder.iterdir() if path.suffix != ".json"}
