"""The exact search is a brute force in float64; the index finds most of what that finds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from galley_plugins.memory.building import neighbours
from galley_plugins.memory.building.neighbours import INDEX, Neighbours, build_index, kind_of
from galley_plugins.memory.building.stages import Stage, StageError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

CPU = torch.device("cpu")


def brute_force(
    queries: NDArray[np.floating], keys: NDArray[np.floating], k: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    wide = queries.astype(np.float64)[:, None] - keys.astype(np.float64)[None]
    distances = (wide**2).sum(-1)
    entries = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(distances, entries, 1), entries


def drawn(rows: int, width: int, seed: int = 0) -> NDArray[np.float16]:
    return np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float16)


@pytest.mark.parametrize("block_rows", [1, 7, 64, 300])
@pytest.mark.parametrize("method", ["_by_blocks", "_on_device"])
def test_the_exact_search_is_a_brute_force(
    method: str, block_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, queries = drawn(300, 24), drawn(50, 24, 1)
    monkeypatch.setattr(neighbours, "BLOCK_BYTES", 4 * 24 * block_rows)
    found = getattr(Neighbours(keys), method)(queries.astype(np.float32), 10)
    distances, entries = brute_force(queries, keys, 10)
    assert found[1].tolist() == entries.tolist()
    assert np.allclose(found[0], distances, rtol=1e-5)
    assert (np.diff(found[0], axis=1) >= 0).all()


@pytest.mark.parametrize("method", ["_by_blocks", "_on_device"])
@pytest.mark.parametrize("block_rows", [2, 100])
def test_where_entries_are_few_the_rest_is_infinitely_far(
    method: str, block_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, queries = drawn(5, 8), drawn(3, 8, 1).astype(np.float32)
    monkeypatch.setattr(neighbours, "BLOCK_BYTES", 4 * 8 * block_rows)
    distances, entries = getattr(Neighbours(keys), method)(queries, 9)
    assert distances.shape == entries.shape == (3, 9)
    expected = brute_force(queries, keys, 5)
    assert entries[:, :5].tolist() == expected[1].tolist()
    assert np.allclose(distances[:, :5], expected[0], rtol=1e-5)
    assert (entries[:, 5:] == -1).all()
    assert np.isinf(distances[:, 5:]).all()


def test_a_key_is_nearest_to_itself() -> None:
    keys = drawn(200, 16)
    distances, entries = Neighbours(keys).search(keys, 1)
    assert entries[:, 0].tolist() == list(range(200))
    assert np.allclose(distances, 0, atol=1e-4)


def test_a_flat_index_is_the_datastore_itself(tmp_path: Path) -> None:
    keys = drawn(20, 8)
    stage = Stage(tmp_path / "index", {})
    build_index(stage, keys, "flat")
    assert stage.result == {"kind": "flat", "entries": 20}
    assert [path.name for path in stage.folder.iterdir()] == ["stage.json"]
    found = Neighbours.of(stage, keys, CPU).search(keys[:4], 3)
    assert found[1].tolist() == brute_force(keys[:4], keys, 3)[1].tolist()


def clustered(rows: int, width: int) -> NDArray[np.float16]:
    random = np.random.default_rng(3)
    centres = 4 * random.standard_normal((rows // 20, width))
    own = centres[random.integers(0, len(centres), rows)]
    return (own + random.standard_normal((rows, width))).astype(np.float16)


def test_an_index_finds_most_neighbours_of_clustered_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbours, "BLOCK_BYTES", 4 * 16 * 700)
    keys = clustered(2000, 16)
    advanced: list[int] = []
    stage = Stage(tmp_path / "index", {})
    build_index(stage, keys, "ivf-pq", advanced.append)
    # 2000 / 64 centroids, a byte for each of the 16 numbers of a key, probes of all
    assert stage.result == {
        "kind": "ivf-pq", "entries": 2000, "centroids": 31, "code_bytes": 16, "probes": 31,
    }  # fmt: skip
    assert sum(advanced) == 2000
    assert (stage.folder / INDEX).is_file()
    distances, entries = Neighbours.of(stage, keys, CPU).search(keys[:200], 10)
    expected = brute_force(keys[:200], keys, 10)
    shared = [len(set(a) & set(b)) for a, b in zip(entries.tolist(), expected[1].tolist(), strict=True)]
    assert sum(shared) / 2000 > 0.9
    assert float(distances.mean()) == pytest.approx(float(expected[0].mean()), rel=0.05)


def test_an_index_gives_as_many_as_are_asked_for(tmp_path: Path) -> None:
    keys = clustered(300, 8)
    stage = Stage(tmp_path / "index", {})
    build_index(stage, keys, "ivf-pq")
    assert stage.result["centroids"] == 4
    distances, entries = Neighbours.of(stage, keys, CPU).search(keys[:5], 400)
    assert (np.sort(entries, axis=1)[:, 100:] == np.arange(300)).all()
    assert (entries[:, 300:] == -1).all()
    assert np.isinf(distances[:, 300:]).all()


@pytest.mark.parametrize(("width", "code"), [(576, 64), (60, 60), (130, 26), (67, 1)])
def test_a_code_has_a_width_that_divides_a_key(tmp_path: Path, width: int, code: int) -> None:
    stage = Stage(tmp_path / "index", {})
    build_index(stage, drawn(260, width), "ivf-pq")
    assert stage.result["code_bytes"] == code


def test_too_few_keys_for_a_code_are_refused(tmp_path: Path) -> None:
    stage = Stage(tmp_path / "index", {})
    with pytest.raises(StageError, match="index: found 255 entries, expected 256 or more for ivf-pq"):
        build_index(stage, drawn(255, 8), "ivf-pq")
    assert not stage.done


def test_the_index_is_the_kind_that_suits_the_size() -> None:
    assert kind_of(1) == kind_of(999_999) == "flat"
    assert kind_of(1_000_000) == "ivf-pq"
