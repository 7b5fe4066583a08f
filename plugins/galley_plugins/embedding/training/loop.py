"""The loop that every method trains in: steps, scores on development pairs, the best of which is kept."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from galley_plugins.embedding.evaluation.metrics import sts_spearman
from galley_plugins.training_checkpoint import Progress

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from galley_plugins.embedding.evaluation.data import Pairs
    from galley_plugins.training_checkpoint import Checkpoint

ENCODED = 64  # texts that are encoded at once to be scored
MOST_GRADIENT = 1.0  # its norm, over all parameters


class TrainingError(ValueError):
    """A run cannot go on."""


class Trainee(Protocol):
    """A method with what it trains."""

    sizes: dict[str, object]
    options: dict[str, object]

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """What is trained, by name."""

    def rate(self, name: str) -> float:
        """A parameter's learning rate, as a multiple of the run's."""

    def loss(self, step: int) -> torch.Tensor:
        """Of the step's batch; follows from the seed and the step."""

    def encode(self, texts: Sequence[str]) -> torch.Tensor:
        """[texts, dimensions], not normalised."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """As an adapter stores them."""

    def add_files(self, folder: Path) -> None:
        """Write what an adapter has beside its tensors."""


class Reporter(Protocol):
    """Told how a run goes."""

    def trained(self, step: int, loss: float) -> None:
        """So many steps are done; the last one's loss."""

    def scored(self, step: int, score: float) -> None:
        """The development pairs were scored after so many steps."""


@dataclass(frozen=True)
class Schedule:
    """When what happens.

    Attributes:
        steps: of the optimizer.
        lr: learning rate after `warmup` steps; it falls to a twentieth along a cosine.
        evaluations: how often the development pairs are scored, beside the beginning.
        max_seconds: after which training ends with what it has.
    """

    steps: int
    lr: float
    warmup: int = 10
    evaluations: int = 3
    max_seconds: float = math.inf

    def rate(self, step: int) -> float:
        left = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.lr * min(1.0, (step + 1) / self.warmup) * max(left, 0.05)

    def scored(self, done: int) -> bool:
        """The development pairs are scored after so many steps."""
        return done * self.evaluations // self.steps > (done - 1) * self.evaluations // self.steps


def train(
    trainee: Trainee,
    schedule: Schedule,
    dev: Pairs,
    checkpoint: Checkpoint,
    reporter: Reporter,
    *,
    resume: bool,
) -> Progress:
    """Train, and leave the trainee with the values that scored best on `dev`.

    Raises:
        CheckpointError: the checkpoint is of another run, or damaged.
        TrainingError: the loss is not a number any more.
    """
    parameters = trainee.parameters()
    optimizer = optimizer_of(trainee)
    progress = checkpoint.load(parameters, optimizer) if resume else None
    if progress is None:
        progress = Progress()
        _score(trainee, dev, progress, reporter)
    begun = time.monotonic() - progress.seconds
    while progress.step < schedule.steps and progress.seconds < schedule.max_seconds:
        loss = _step(trainee, optimizer, schedule, progress.step)
        progress.step += 1
        progress.seconds = time.monotonic() - begun
        reporter.trained(progress.step, loss)
        if schedule.scored(progress.step) or progress.seconds >= schedule.max_seconds:
            _score(trainee, dev, progress, reporter)
            progress.seconds = time.monotonic() - begun
            checkpoint.save(progress, parameters, optimizer)
    with torch.no_grad():
        for name, value in parameters.items():
            value.copy_(progress.best[name])
    return progress


def optimizer_of(trainee: Trainee) -> torch.optim.Optimizer:
    """Adam with a group for each learning rate."""
    groups: dict[float, list[torch.nn.Parameter]] = {}
    for name, value in trainee.parameters().items():
        groups.setdefault(trainee.rate(name), []).append(value)
    return torch.optim.Adam([{"params": values, "multiple": multiple} for multiple, values in groups.items()])


def spearman(trainee: Trainee, pairs: Pairs) -> float:
    """Of the pairs' cosines with their scores, times 100."""
    texts = [*pairs.first, *pairs.second]
    order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
    found: torch.Tensor | None = None
    with torch.no_grad():
        for start in range(0, len(order), ENCODED):
            places = order[start : start + ENCODED]
            rows = trainee.encode([texts[place] for place in places]).float().cpu()
            if found is None:
                found = torch.empty(len(texts), rows.shape[1])
            found[places] = rows
    assert found is not None
    vectors = found.numpy()
    return sts_spearman(vectors[: len(pairs)], vectors[len(pairs) :], pairs)


def _step(trainee: Trainee, optimizer: torch.optim.Optimizer, schedule: Schedule, step: int) -> float:
    for group in optimizer.param_groups:
        group["lr"] = schedule.rate(step) * group["multiple"]
    optimizer.zero_grad(set_to_none=True)
    loss = trainee.loss(step)
    if not torch.isfinite(loss):
        raise TrainingError(
            f"step {step}: found a loss of {loss.item()}, expected a number; try a lower --lr"
        )
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trainee.parameters().values(), MOST_GRADIENT)
    optimizer.step()
    return loss.item()


def _score(trainee: Trainee, dev: Pairs, progress: Progress, reporter: Reporter) -> None:
    score = spearman(trainee, dev)
    if not progress.scores or not score <= max(progress.scores.values()):
        progress.best = {name: value.detach().cpu().clone() for name, value in trainee.parameters().items()}
    progress.scores[progress.step] = score
    reporter.scored(progress.step, score)
