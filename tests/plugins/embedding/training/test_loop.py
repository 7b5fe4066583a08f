from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch

from galley_plugins.embedding.evaluation.data import Pairs
from galley_plugins.embedding.training.loop import Schedule, TrainingError, spearman, train
from galley_plugins.training_checkpoint import Checkpoint, CheckpointError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

DEV = Pairs(["0", "0", "0"], ["1", "2", "3"], [5.0, 3.0, 1.0])


class Plane:
    """Texts are numbers; a weight above 1/2 puts larger ones further from 0, one below nearer to it."""

    def __init__(self, wish: float = 1.0) -> None:
        self.sizes: dict[str, object] = {}
        self.options: dict[str, object] = {}
        self.weight = torch.nn.Parameter(torch.tensor([0.8, 0.0]))
        self.wish = wish
        self.steps: list[int] = []

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return {"weight": self.weight}

    def rate(self, name: str) -> float:
        return 2.0

    def loss(self, step: int) -> torch.Tensor:
        self.steps.append(step)
        return (self.weight[0] - self.wish) ** 2 + (self.weight[1] - step) ** 2

    def encode(self, texts: Sequence[str]) -> torch.Tensor:
        right = float(self.weight[0])
        heights = [right * int(text) + (1 - right) * (4 - int(text)) if int(text) else 0.0 for text in texts]
        return torch.tensor([[1.0, height] for height in heights])

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"weight": self.weight.detach()}

    def add_files(self, folder: Path) -> None:
        pass


class Interrupt:
    """Ends a run after so many steps."""

    def __init__(self, after: int | None = None) -> None:
        self.after = after
        self.scores: list[int] = []

    def trained(self, step: int, loss: float) -> None:
        if step == self.after:
            raise KeyboardInterrupt

    def scored(self, step: int, score: float) -> None:
        self.scores.append(step)


def run(
    trainee: Any, folder: Path, *, after: int | None = None, resume: bool = False, **schedule: Any
) -> Any:
    settings = {"lr": 0.1, "steps": 12}
    values = {"steps": 12, "lr": 0.1, "warmup": 2, "evaluations": 4, **schedule}
    return train(
        trainee, Schedule(**values), DEV, Checkpoint(folder, settings), Interrupt(after), resume=resume
    )


def test_the_learning_rate_rises_and_falls() -> None:
    schedule = Schedule(steps=100, lr=1.0, warmup=10)
    assert schedule.rate(0) == pytest.approx(0.1)
    assert schedule.rate(50) == pytest.approx(0.5)
    assert schedule.rate(99) == pytest.approx(0.05)
    rates = [schedule.rate(step) for step in range(100)]
    assert max(rates) == schedule.rate(9) == pytest.approx(0.5 * (1 + math.cos(0.09 * math.pi)))


@pytest.mark.parametrize(
    ("steps", "evaluations", "expected"), [(12, 4, [3, 6, 9, 12]), (10, 3, [4, 7, 10]), (2, 5, [1, 2])]
)
def test_scores_are_spread_over_the_steps(steps: int, evaluations: int, expected: list[int]) -> None:
    schedule = Schedule(steps, 1.0, evaluations=evaluations)
    assert [done for done in range(1, steps + 1) if schedule.scored(done)] == expected


def test_scores_of_pairs_by_hand() -> None:
    """Cosines fall with the second number, as the scores do."""
    assert spearman(Plane(), DEV) == pytest.approx(100)
    assert spearman(Plane(), Pairs(DEV.first, DEV.second, [1.0, 3.0, 5.0])) == pytest.approx(-100)


def test_the_best_score_is_kept_although_training_goes_on(tmp_path: Path) -> None:
    """Training goes for a weight that turns the order around."""
    trainee = Plane(wish=0.0)
    progress = run(trainee, tmp_path / "checkpoint", lr=0.5)
    assert progress.step == 12
    assert progress.scores[0] == pytest.approx(100)
    assert progress.scores[12] == pytest.approx(-100)
    assert trainee.weight[0].item() == pytest.approx(0.8)


def test_a_run_that_was_interrupted_ends_like_one_that_was_not(tmp_path: Path) -> None:
    whole, parts = Plane(), Plane()
    expected = run(whole, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(parts, tmp_path / "parts", after=8)
    parts = Plane()
    found = run(parts, tmp_path / "parts", resume=True)
    assert parts.steps == list(range(6, 12))
    assert torch.equal(whole.weight, parts.weight)
    assert found.scores == expected.scores
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["step-00000012"]


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    run(Plane(), tmp_path / "checkpoint")
    trainee = Plane()
    checkpoint = Checkpoint(tmp_path / "checkpoint", {"lr": 0.2, "steps": 12})
    with pytest.raises(CheckpointError, match=r"found a run with lr = 0\.1, expected 0\.2"):
        train(trainee, Schedule(12, 0.2), DEV, checkpoint, Interrupt(), resume=True)


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    run(Plane(), tmp_path / "checkpoint")
    path = tmp_path / "checkpoint" / "step-00000012" / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="cannot be read"):
        run(Plane(), tmp_path / "checkpoint", resume=True)


def test_training_ends_when_its_time_is_over(tmp_path: Path) -> None:
    progress = run(Plane(), tmp_path / "checkpoint", max_seconds=1e-9)
    assert progress.step == 1
    assert set(progress.scores) == {0, 1}


def test_a_loss_that_is_no_number_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(
        TrainingError, match="step 0: found a loss of nan, expected a number; try a lower --lr"
    ):
        run(Plane(wish=math.nan), tmp_path / "checkpoint")
