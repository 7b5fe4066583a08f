"""Targets, the loss and its gradient, and runs that are the same whenever they are interrupted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from galley_plugins.memory.building import training
from galley_plugins.memory.building.datastore import HELD_KEYS, HELD_LIKELIHOODS, HELD_VALUES, KEYS, VALUES
from galley_plugins.memory.building.mixture import mixture
from galley_plugins.memory.building.neighbours import Neighbours
from galley_plugins.memory.building.stages import Stage
from galley_plugins.memory.building.teacher import OFFSETS, PROBS, TOKENS, write_teacher
from galley_plugins.memory.building.training import (
    HeldOut,
    Places,
    Schedule,
    TrainingError,
    following_columns,
    train,
)
from galley_plugins.memory.network import MemoryNetwork, Sizes
from galley_plugins.training_checkpoint import Checkpoint
from tests.plugins.memory.conftest import HIDDEN, VOCABULARY

if TYPE_CHECKING:
    from pathlib import Path

CPU = torch.device("cpu")
COLUMNS = torch.arange(VOCABULARY)


@pytest.fixture(scope="module")
def teacher_stage(datastore_stage: Stage, tmp_path_factory: pytest.TempPathFactory) -> Stage:
    stage = Stage(tmp_path_factory.mktemp("memory") / "teacher", {})
    keys = datastore_stage.read(KEYS, "float16", HIDDEN)
    write_teacher(stage, datastore_stage, Neighbours(keys), width=HIDDEN, k=20, temperature=None, floor=1e-5)
    return stage


@pytest.fixture
def places(datastore_stage: Stage, teacher_stage: Stage) -> Places:
    return Places(datastore_stage, teacher_stage, HIDDEN, None, CPU)


@pytest.fixture
def held_out(datastore_stage: Stage) -> HeldOut:
    return HeldOut(datastore_stage, HIDDEN, None)


def network(seed: int = 0, outputs: int = VOCABULARY) -> MemoryNetwork:
    return MemoryNetwork(Sizes("llama", HIDDEN, HIDDEN, 24, 1, outputs)).initialize(seed)


def dense(teacher: Stage, rows: list[int]) -> np.ndarray:
    """[rows, vocabulary] of the teacher."""
    offsets, tokens = teacher.read(OFFSETS, "int64").tolist(), teacher.read(TOKENS, "int32").tolist()
    probs = teacher.read(PROBS, "float16").astype(np.float64)
    found = np.zeros((len(rows), VOCABULARY))
    for row, place in enumerate(rows):
        for item in range(offsets[place], offsets[place + 1]):
            found[row, tokens[item]] += probs[item]
    return found


ROWS = [0, 3, 4, 50, 199, 200]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_targets_are_the_teacher_and_the_following_token(
    alpha: float, places: Places, datastore_stage: Stage, teacher_stage: Stage
) -> None:
    values = datastore_stage.read(VALUES, "int32")[ROWS]
    expected = alpha * dense(teacher_stage, ROWS)
    expected[range(len(ROWS)), values] += 1 - alpha
    found = places.targets(np.array(ROWS), VOCABULARY, alpha)
    assert np.allclose(found, expected, atol=1e-6)
    assert np.allclose(found.sum(1), 1, atol=5e-3)


def test_without_a_teacher_the_following_token_is_all(datastore_stage: Stage) -> None:
    places = Places(datastore_stage, None, HIDDEN, None, CPU)
    values = torch.from_numpy(datastore_stage.read(VALUES, "int32")[ROWS].astype(np.int64))
    found = places.targets(np.array(ROWS), VOCABULARY, 0.7)
    assert torch.equal(found, functional.one_hot(values, VOCABULARY).float())


def test_columns_hold_the_tokens_that_the_corpus_has(datastore_stage: Stage, teacher_stage: Stage) -> None:
    known = np.unique(datastore_stage.read(VALUES, "int32"))
    assert len(known) < VOCABULARY
    columns = torch.from_numpy(known.astype(np.int64))
    narrow = Places(datastore_stage, teacher_stage, HIDDEN, columns, CPU)
    wide = Places(datastore_stage, teacher_stage, HIDDEN, None, CPU)
    rows = np.arange(len(narrow))
    assert torch.equal(narrow.targets(rows, len(known), 0.4), wide.targets(rows, VOCABULARY, 0.4)[:, columns])


def test_tokens_that_a_network_does_not_know_are_minus_one() -> None:
    found = following_columns(np.array([1, 2, 5, 6, 99], np.int32), torch.tensor([2, 5, 7]))
    assert found.tolist() == [-1, 0, 1, -1, -1]


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_the_gradient_is_that_of_divergence_and_cross_entropy(
    alpha: float, places: Places, datastore_stage: Stage, teacher_stage: Stage
) -> None:
    rows = torch.tensor(ROWS)
    states = torch.from_numpy(datastore_stage.read(KEYS, "float16", HIDDEN)[ROWS]).float()
    values = torch.from_numpy(datastore_stage.read(VALUES, "int32")[ROWS].astype(np.int64))
    plain = network(3)
    log_probs = torch.log_softmax(plain(states), -1)
    teacher = torch.from_numpy(dense(teacher_stage, ROWS)).float()
    divergence = functional.kl_div(log_probs, teacher, reduction="batchmean")
    loss = alpha * divergence + (1 - alpha) * functional.nll_loss(log_probs, values)
    expected = torch.autograd.grad(loss, list(plain.parameters()))

    trained = network(3)
    parameters = dict(trained.named_parameters())
    optimizer = torch.optim.SGD(parameters.values(), lr=0.0)
    schedule = Schedule(alpha=alpha, lr=1e-9, batch=len(ROWS), epochs=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_rows", lambda *given: rows.numpy())
        patch.setattr(training, "MOST_GRADIENT", 1e9)
        found = training._step(trained, parameters, optimizer, places, schedule, 0, 10)
    entropy = float(torch.special.entr(teacher).sum() / len(ROWS))  # what the divergence takes off
    assert found == pytest.approx(float(loss.detach()) + alpha * entropy, rel=1e-4)
    for value, gradient in zip(trained.parameters(), expected, strict=True):
        assert value.grad is not None
        assert torch.allclose(value.grad, gradient, atol=1e-5)


def test_the_rate_rises_for_a_twentieth_and_falls_to_nothing() -> None:
    schedule = Schedule(lr=2.0)
    rates = [schedule.rate(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(2.0 / 5)
    assert max(rates) == rates[4] == pytest.approx(2.0 * 0.96)
    assert rates[50] == pytest.approx(1.0)
    assert rates[99] == pytest.approx(0.02)


def test_each_epoch_reads_each_place_once_in_an_order_of_its_own() -> None:
    schedule = Schedule(batch=7, epochs=2, seed=4)
    assert schedule.steps(30) == 10
    batches = [training._rows(30, schedule, step) for step in range(10)]
    for epoch in (batches[:5], batches[5:]):
        assert sorted(np.concatenate(epoch).tolist()) == list(range(30))
    assert batches[0].tolist() != batches[5].tolist()
    assert batches[0].tolist() != training._rows(30, Schedule(batch=7, seed=5), 0).tolist()


RUN = Schedule(alpha=0.4, lr=1e-2, batch=64, epochs=3, seed=1)


def ended(folder: Path, places: Places, held_out: HeldOut, schedule: Schedule = RUN, seed: int = 0, **more: Any) -> tuple[MemoryNetwork, Any]:  # fmt: skip
    trained = network(seed)
    progress = train(trained, places, held_out, schedule, Checkpoint(folder, {}), **more)
    return trained, progress


def bits(trained: MemoryNetwork) -> dict[str, bytes]:
    return {name: value.detach().numpy().tobytes() for name, value in trained.named_parameters()}


def test_a_seed_gives_the_same_bits_and_a_run_that_was_interrupted_goes_on_to_them(
    places: Places, held_out: HeldOut, tmp_path: Path
) -> None:
    first, progress = ended(tmp_path / "first", places, held_out)
    assert progress.step == RUN.steps(len(places))
    second, _ = ended(tmp_path / "second", places, held_out)
    assert bits(first) == bits(second)
    assert bits(ended(tmp_path / "other", places, held_out, seed=1)[0]) != bits(first)
    for after in (1, progress.step // 2, progress.step - 1):

        def trained(step: int, loss: float, after: int = after) -> None:
            if step > after:
                raise KeyboardInterrupt

        folder = tmp_path / f"after-{after}"
        with pytest.raises(KeyboardInterrupt):
            ended(folder, places, held_out, trained=trained)
        steps: list[int] = []
        again, resumed = ended(folder, places, held_out, trained=lambda step, loss: steps.append(step))  # noqa: B023
        assert bits(again) == bits(first)
        assert resumed.scores == progress.scores
        assert steps[0] > after - 3  # a score, and so a checkpoint, every third step
        assert steps[-1] == progress.step


def test_training_predicts_the_held_out_text_better_and_keeps_the_best(
    places: Places, held_out: HeldOut, datastore_stage: Stage, tmp_path: Path
) -> None:
    before = held_out.score(network())
    scored: list[tuple[int, float]] = []
    trained, progress = ended(
        tmp_path, places, held_out, scored=lambda step, mix: scored.append((step, mix.nats))
    )
    after = held_out.score(trained)
    assert after.nats == min(nats for _, nats in scored) < before.nats
    assert scored == [(step, -score) for step, score in progress.scores.items()]
    # The mix by hand, in float64
    states = torch.from_numpy(np.array(datastore_stage.read(HELD_KEYS, "float16", HIDDEN))).double()
    following = torch.from_numpy(datastore_stage.read(HELD_VALUES, "int32").astype(np.int64))
    with torch.no_grad():
        probs = torch.softmax(trained.double()(states), -1)
    chosen = probs[range(len(following)), following].numpy()
    plain = datastore_stage.read(HELD_LIKELIHOODS, "float32").astype(np.float64)
    expected = -np.log((1 - after.weight) * np.exp(plain) + after.weight * chosen).mean()
    assert after.nats == pytest.approx(expected, abs=1e-5)
    assert mixture(plain, chosen).weight == pytest.approx(after.weight, abs=1e-3)


class Scores(HeldOut):
    """As listed, whatever the network."""

    def __init__(self, nats: list[float]) -> None:
        self.nats = nats

    def score(self, trained: MemoryNetwork, weight: float | None = None) -> Any:
        mix = mixture(np.zeros(1), np.ones(1))
        return type(mix)(0.5, self.nats.pop(0), 1.0)


def test_training_ends_early_where_scores_get_no_better(places: Places, tmp_path: Path) -> None:
    schedule = Schedule(batch=64, epochs=50, scores=1, patience=3)
    nats = [3.0, 2.0, 2.5, 2.0, 2.1, 1.0]
    weights: list[bytes] = []
    trained = network()
    progress = train(
        trained,
        places,
        Scores(nats),
        schedule,
        Checkpoint(tmp_path, {}),
        scored=lambda step, mix: weights.append(trained.lm_head.weight.detach().numpy().tobytes()),
    )
    assert list(progress.scores.values()) == [-3.0, -2.0, -2.5, -2.0, -2.1]
    assert nats == [1.0]
    assert trained.lm_head.weight.detach().numpy().tobytes() == weights[1]
    # Ended is ended: the same run goes no further.
    again = train(network(), places, Scores([]), schedule, Checkpoint(tmp_path, {}))
    assert again.step == progress.step


@pytest.mark.parametrize("epochs", [1, 3])
def test_a_diverging_run_is_refused(places: Places, held_out: HeldOut, epochs: int, tmp_path: Path) -> None:
    schedule = Schedule(lr=1e37, batch=1000, epochs=epochs)
    with pytest.raises(
        TrainingError, match=r"step \d: found a loss of \S+, expected a number; try a lower lr"
    ):
        ended(tmp_path, places, held_out, schedule)


def test_a_tied_head_stays_the_models(places: Places, held_out: HeldOut, tmp_path: Path) -> None:
    head = network(7).lm_head.weight.detach().clone()
    trained = MemoryNetwork(Sizes("llama", HIDDEN, HIDDEN, 24, 1, VOCABULARY)).initialize(0, head)
    before = trained.layers[0].mlp["down_proj"].weight.detach().clone()
    train(trained, places, held_out, RUN, Checkpoint(tmp_path, {}), trains_head=False)
    assert torch.equal(trained.lm_head.weight, head)
    assert not torch.equal(trained.layers[0].mlp["down_proj"].weight, before)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"alpha": 1.1}, "alpha: found 1.1"),
        ({"alpha": -0.1}, "alpha: found -0.1"),
        ({"lr": 0.0}, "lr: found 0.0, expected a number above 0"),
        ({"batch": 0}, "batch: found 0"),
        ({"epochs": -1}, "epochs: found -1"),
        ({"patience": 0}, "patience: found 0"),
    ],
)
def test_wrong_options_are_refused_by_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule(**values)
