"""kNN-LM's distributions by hand and in float64, and what is written of them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from galley_plugins.memory.building import teacher
from galley_plugins.memory.building.datastore import HELD_KEYS, HELD_LIKELIHOODS, HELD_VALUES, KEYS, VALUES
from galley_plugins.memory.building.neighbours import Neighbours
from galley_plugins.memory.building.stages import Stage
from galley_plugins.memory.building.teacher import (
    OFFSETS,
    PROBS,
    TEMPERATURES,
    TOKENS,
    distributions,
    probabilities,
    spread,
    write_teacher,
)
from tests.plugins.memory.building.conftest import contents, stored
from tests.plugins.memory.conftest import HIDDEN

if TYPE_CHECKING:
    from pathlib import Path

INFINITE = math.inf


def rows_of(counts: Any, tokens: Any, probs: Any) -> list[dict[int, float]]:
    ends = np.cumsum(counts)
    return [
        dict(zip(tokens[end - count : end].tolist(), probs[end - count : end].tolist(), strict=True))
        for count, end in zip(counts, ends, strict=True)
    ]


def reference(
    distances: list[float], tokens: list[int], temperature: float, floor: float
) -> dict[int, float]:
    """Term by term, in float64."""
    least = min(distances)
    weights = [0.0 if least == INFINITE else math.exp((least - far) / temperature) for far in distances]
    found: dict[int, float] = {}
    for token, weight in zip(tokens, weights, strict=True):
        found[token] = found.get(token, 0.0) + weight / (sum(weights) or 1)
    kept = {token: share for token, share in found.items() if share > floor}
    return {token: share / sum(kept.values()) for token, share in kept.items()}


def test_a_distribution_by_hand() -> None:
    # exp(-d / 2) halves with each 2 ln 2: weights 4, 2, 2, 1 of 9.
    step = 2 * math.log(2)
    distances = np.array([[0, step, step, 2 * step]], np.float32)
    found = rows_of(*distributions(distances, np.array([[7, 3, 7, 5]], np.int32), 2.0))
    assert found == [pytest.approx({3: 2 / 9, 5: 1 / 9, 7: 6 / 9})]
    found = rows_of(*distributions(distances, np.array([[7, 3, 7, 5]], np.int32), 2.0, floor=0.12))
    assert found == [pytest.approx({3: 2 / 8, 7: 6 / 8})]


places = st.lists(
    st.lists(
        st.tuples(st.floats(0, 300, width=32) | st.just(INFINITE), st.integers(0, 6)), min_size=5, max_size=5
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=40)
@given(places, st.sampled_from(TEMPERATURES), st.sampled_from([0.0, 0.011, 0.3]))
def test_distributions_are_those_of_float64(
    rows: list[list[tuple[float, int]]], temperature: float, floor: float
) -> None:
    distances = np.array([[pair[0] for pair in row] for row in rows], np.float32)
    tokens = np.array([[pair[1] for pair in row] for row in rows], np.int32)
    counts, ids, probs = distributions(distances, tokens, temperature, floor)
    assert counts.sum() == len(ids) == len(probs)
    for found, far, followers in zip(
        rows_of(counts, ids, probs), distances.tolist(), tokens.tolist(), strict=True
    ):
        expected = reference(far, followers, temperature, floor)
        assert list(found) == sorted(found)
        every = found.keys() | expected.keys()
        if floor == 0:
            assert [found.get(token, 0) for token in every] == pytest.approx(
                [expected.get(token, 0) for token in every], abs=1e-6
            )
        elif found.keys() == expected.keys():  # else a share is at the floor itself
            assert found == pytest.approx(expected, abs=1e-5)
        if found:
            assert sum(found.values()) == pytest.approx(1, abs=1e-5)
    following = tokens[:, 0]
    chosen = probabilities(distances, tokens, following, temperature)
    everything = [
        reference(*row, temperature, 0.0) for row in zip(distances.tolist(), tokens.tolist(), strict=True)
    ]
    expected_shares = [row.get(int(token), 0.0) for row, token in zip(everything, following, strict=True)]
    assert chosen.tolist() == pytest.approx(expected_shares, abs=1e-6)


def test_places_of_no_neighbours_have_no_distribution() -> None:
    counts, ids, probs = distributions(np.empty((3, 0), np.float32), np.empty((3, 0), np.int32), 1.0)
    assert (counts.tolist(), len(ids), len(probs)) == ([0, 0, 0], 0, 0)
    far = np.full((1, 3), np.inf, np.float32)
    assert distributions(far, np.zeros((1, 3), np.int32), 1.0)[0].tolist() == [0]
    assert probabilities(far, np.zeros((1, 3), np.int32), np.zeros(1, np.int32), 1.0).tolist() == [0]


def line(folder: Path, held: tuple[Any, Any, Any] = ([[0.0], [9.0]], [1, 2], [-1.0, -1.0])) -> Stage:
    """Keys on a line, two of them the same."""
    return stored(folder, [[0.0], [1.0], [1.0], [4.0], [9.0]], [1, 2, 3, 1, 2], held)


def written(stage: Stage) -> list[dict[int, float]]:
    offsets = stage.read(OFFSETS, "int64")
    assert offsets[0] == 0
    return rows_of(np.diff(offsets), stage.read(TOKENS, "int32"), stage.read(PROBS, "float16"))


def write(stage: Stage, datastore: Stage, width: int = 1, **options: Any) -> None:
    keys = datastore.read(KEYS, "float16", width)
    given = {"k": 2, "temperature": 3.0, "floor": 0.0, **options}
    write_teacher(stage, datastore, Neighbours(keys), width=width, **given)


def test_a_place_is_no_neighbour_of_itself_wherever_it_is(tmp_path: Path) -> None:
    # The twins at 1 are at distance 0 from each other: one finds itself first, the other second.
    stage = Stage(tmp_path / "teacher", {})
    write(stage, line(tmp_path / "datastore"))
    near, far = math.exp(-0 / 3), math.exp(-1 / 3)
    expected = [
        {2: 0.5, 3: 0.5},
        {3: near / (near + far), 1: far / (near + far)},
        {2: near / (near + far), 1: far / (near + far)},
        {2: 0.5, 3: 0.5},  # 9 and 9 away
    ]
    assert written(stage)[:4] == [pytest.approx(row, abs=1e-3) for row in expected]
    assert stage.result["k"] == 2
    assert stage.result["temperature"] == 3.0
    assert stage.result["kept"] == 10


def test_a_place_that_the_search_does_not_find_loses_its_farthest_neighbour() -> None:
    distances = np.array([[0, 1, 2], [0, 1, 2]], np.float32)
    entries = np.array([[4, 1, 0], [7, 8, 9]])
    found = teacher._without(distances, entries, np.array([1, 2]))
    assert found[0].tolist() == [[0, 2], [0, 1]]
    assert found[1].tolist() == [[4, 0], [7, 8]]


def test_all_neighbours_of_a_corpus_are_those_of_float64(datastore_stage: Stage, tmp_path: Path) -> None:
    stage = Stage(tmp_path / "teacher", {})
    write(stage, datastore_stage, HIDDEN, k=20, temperature=4.0, floor=1e-3)
    keys = datastore_stage.read(KEYS, "float16", HIDDEN).astype(np.float64)
    values = datastore_stage.read(VALUES, "int32")
    distances = ((keys[:, None] - keys[None]) ** 2).sum(-1)
    np.fill_diagonal(distances, np.inf)
    found = written(stage)
    compared = 0
    for place in range(0, len(keys), 7):
        order = np.argsort(distances[place])
        if distances[place][order[20]] - distances[place][order[19]] < 1e-3:
            continue  # which of several equally far ones is taken is open
        compared, order = compared + 1, order[:20]
        expected = reference(distances[place][order].tolist(), values[order].tolist(), 4.0, 1e-3)
        assert found[place] == pytest.approx(expected, abs=2e-3)
        assert sum(found[place].values()) == pytest.approx(1, abs=5e-3)
    assert compared > 10


def held_out_of(datastore: Stage, k: int, temperature: float) -> float:
    """Nats of kNN-LM's best mix on the held-out text, in float64 and over a grid of shares; some
    places have several equally far neighbours, of which any may be taken."""
    keys = datastore.read(KEYS, "float16", HIDDEN).astype(np.float64)
    values = datastore.read(VALUES, "int32").tolist()
    plain = np.exp(datastore.read(HELD_LIKELIHOODS, "float32").astype(np.float64))
    shares = []
    for key, token in zip(
        datastore.read(HELD_KEYS, "float16", HIDDEN).astype(np.float64),
        datastore.read(HELD_VALUES, "int32").tolist(),
        strict=True,
    ):
        distances = ((keys - key) ** 2).sum(-1)
        order = np.argsort(distances, kind="stable")[:k]
        row = reference(distances[order].tolist(), [values[place] for place in order], temperature, 0.0)
        shares.append(row.get(token, 0.0))
    other = np.array(shares)
    return min(
        float(-np.log((1 - share) * plain + share * other).mean()) for share in np.linspace(0, 0.999, 500)
    )


def test_the_temperature_is_the_one_that_suits_the_held_out_text(
    datastore_stage: Stage, tmp_path: Path
) -> None:
    stage = Stage(tmp_path / "teacher", {})
    write(stage, datastore_stage, HIDDEN, k=20, temperature=None)
    nats = {temperature: held_out_of(datastore_stage, 20, temperature) for temperature in TEMPERATURES}
    assert stage.result["temperature"] == min(nats, key=lambda temperature: nats[temperature])
    assert stage.result["knn"]["nats"] == pytest.approx(min(nats.values()), abs=2e-3)
    likelihoods = datastore_stage.read(HELD_LIKELIHOODS, "float32")
    assert stage.result["knn"]["plain"] == pytest.approx(-float(likelihoods.mean()), abs=1e-5)
    given = Stage(tmp_path / "given", {})
    write(given, datastore_stage, HIDDEN, k=20, temperature=5.0)
    assert given.result["temperature"] == 5.0
    assert given.result["knn"]["nats"] == pytest.approx(held_out_of(datastore_stage, 20, 5.0), abs=2e-3)


class Ends(Neighbours):
    """Ends the run at a search."""

    left = 0

    def search(self, queries: Any, k: int) -> Any:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return super().search(queries, k)


@pytest.mark.parametrize("searches", [1, 6, 9, 15])
def test_an_interrupted_teacher_goes_on_to_the_same_bytes(
    searches: int, datastore_stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher, "QUERIES", 50)
    keys = datastore_stage.read(KEYS, "float16", HIDDEN)
    options: dict[str, Any] = {"width": HIDDEN, "k": 9, "temperature": None, "floor": 1e-5}
    whole = Stage(tmp_path / "whole", {})
    write_teacher(whole, datastore_stage, Neighbours(keys), **options)
    stage = Stage(tmp_path / "teacher", {})
    ending = Ends(keys)
    ending.left = searches
    with pytest.raises(KeyboardInterrupt):
        write_teacher(stage, datastore_stage, ending, **options)
    assert not stage.done
    if searches > 6:  # what was written behind the last note does not count
        with (stage.folder / f"{TOKENS}.partial").open("ab") as file:
            file.write(b"half of a row")
    advanced: list[int] = []
    write_teacher(stage, datastore_stage, Neighbours(keys), **options, advance=advanced.append)
    assert contents(stage) == contents(whole)
    assert stage.result == whole.result
    assert sum(advanced) == len(keys)


def test_the_end_of_a_run_while_it_finishes_loses_nothing(
    datastore_stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, stage = Stage(tmp_path / "whole", {}), Stage(tmp_path / "teacher", {})
    write(whole, datastore_stage, HIDDEN)
    own = Stage._files  # named when all files have their last names

    def ended(self: Stage) -> Any:
        if not list(self.folder.glob("*.partial")):
            raise KeyboardInterrupt
        return own(self)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # noqa: PT012
        patch.setattr(Stage, "_files", ended)
        write(stage, datastore_stage, HIDDEN)
    write(stage, datastore_stage, HIDDEN)
    assert contents(stage) == contents(whole)


def test_a_corpus_of_one_entry_has_no_neighbours(tmp_path: Path) -> None:
    datastore = stored(tmp_path / "datastore", [[0.0]], [1], ([[0.0]], [1], [-1.0]))
    stage = Stage(tmp_path / "teacher", {})
    write(stage, datastore, k=0, temperature=None)
    assert written(stage) == [{}]
    assert stage.result["knn"]["weight"] == 0


@given(st.integers(1, 500), st.integers(1, 50))
def test_places_are_spread_evenly(count: int, most: int) -> None:
    found = spread(count, most)
    assert len(found) == min(count, most)
    assert found[0] == 0
    assert found[-1] == count - 1 or most == 1
    steps = np.diff(found)
    assert len(steps) == 0 or (steps.min() >= 1 and steps.max() - steps.min() <= 1)


def test_softmax_is_that_of_torch() -> None:
    distances = np.array([[1.0, 4.0, 2.5]], np.float32)
    expected = torch.softmax(torch.tensor([[-1.0, -4.0, -2.5]]).double() / 7, 1)
    assert np.allclose(teacher._softmax(distances, 7.0), expected, atol=1e-7)
