from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from galley_plugins.memory.building.datastore import (
    HELD_KEYS,
    HELD_LIKELIHOODS,
    HELD_VALUES,
    KEYS,
    VALUES,
)
from galley_plugins.memory.building.neighbours import Neighbours, build_index
from galley_plugins.memory.building.stages import Stage, StageError
from galley_plugins.memory.building.teacher import write_teacher
from galley_plugins.memory.checkpoint import Base
from galley_plugins.memory.knn import KnnLm

if TYPE_CHECKING:
    from pathlib import Path

BASE = Base(4, 2, 100, "model-hash", "tokenizer-hash")
CPU = torch.device("cpu")
ENTRIES = 40


@pytest.fixture
def build(tmp_path: Path) -> Path:
    """A datastore of random keys, followed by tokens 10, 20, 30 and 40, as far as its teacher."""
    rng = np.random.default_rng(3)
    tokens = Stage(tmp_path / "tokens", {"tokenizer": BASE.tokenizer})
    tokens.begin()
    tokens.finish({})
    datastore = Stage(tmp_path / "datastore", {"model": BASE.model}, tokens)
    datastore.begin()
    for name, values in (
        (KEYS, rng.standard_normal((ENTRIES, 4)).astype(np.float16)),
        (VALUES, rng.choice([10, 20, 30, 40], ENTRIES).astype(np.int32)),
        (HELD_KEYS, rng.standard_normal((8, 4)).astype(np.float16)),
        (HELD_VALUES, rng.choice([10, 20], 8).astype(np.int32)),
        (HELD_LIKELIHOODS, np.full(8, -3.0, np.float32)),
    ):
        values.tofile(datastore.folder / name)
    datastore.finish({"layer": 1, "width": 4, "entries": ENTRIES})
    keys = datastore.read(KEYS, "float16", 4)
    index = Stage(tmp_path / "index", {}, datastore)
    build_index(index, keys, "flat")
    teacher = Stage(tmp_path / "teacher", {}, index)
    write_teacher(
        teacher, datastore, Neighbours.of(index, keys, CPU), width=4, k=6, temperature=2.0, floor=0.0
    )
    return tmp_path


def test_it_says_what_the_nearest_states_were_followed_by(build: Path) -> None:
    memory = KnnLm(build, BASE, CPU)
    assert (memory.layer, memory.k, memory.temperature) == (1, 6, 2.0)
    assert memory.columns.tolist() == [10, 20, 30, 40]
    keys = np.fromfile(build / "datastore" / KEYS, np.float16).reshape(-1, 4).astype(np.float64)
    values = np.fromfile(build / "datastore" / VALUES, np.int32)
    states = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    found = memory.logits(states).exp().numpy()
    following = memory.following(states.numpy(), np.full(5, 20, np.int32))
    for row, state in enumerate(states.double().numpy()):
        distances = ((keys - state) ** 2).sum(1)
        nearest = np.argsort(distances)[:6]
        shares = np.exp(-distances[nearest] / 2.0)
        expected = [shares[values[nearest] == token].sum() / shares.sum() for token in (10, 20, 30, 40)]
        assert found[row] == pytest.approx(expected, abs=1e-5)
        assert following[row] == pytest.approx(expected[1], abs=1e-5)


@pytest.mark.parametrize("name", ["model", "tokenizer"])
def test_a_build_of_another_model_is_refused_with_both_hashes(build: Path, name: str) -> None:
    other = Base(**{**vars(BASE), name: "another-hash"})
    with pytest.raises(StageError, match=f"another {name}: found hash {name}-hash.*another-hash"):
        KnnLm(build, other, CPU)


def test_a_build_that_is_not_whole_is_refused(build: Path) -> None:
    (build / "teacher" / "stage.json").unlink()
    with pytest.raises(StageError, match="no whole teacher"):
        KnnLm.check(build, BASE)
