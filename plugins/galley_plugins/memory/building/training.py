"""Training of a memory's network.

MLP Memory (arXiv 2508.01832, section 3.2): alpha KL(teacher || memory) + (1 - alpha) cross-entropy with the
token that follows, AdamW without decay, a linear schedule. Both terms are one cross-entropy with a mixed
target. What is kept is the network whose mix with the model predicts the held-out text best.
"""

from __future__ import annotations

import functools
import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from galley_plugins.memory.building.datastore import (
    HELD_KEYS,
    HELD_LIKELIHOODS,
    HELD_VALUES,
    KEYS,
    VALUES,
)
from galley_plugins.memory.building.mixture import Mixture, mixture
from galley_plugins.memory.building.teacher import OFFSETS, PROBS, TOKENS, spread
from galley_plugins.training_checkpoint import Progress

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from galley_plugins.memory.building.stages import Stage
    from galley_plugins.memory.network import MemoryNetwork
    from galley_plugins.training_checkpoint import Checkpoint

MOST_GRADIENT = 1.0  # its norm, over all parameters
SCORED_ROWS = 2048  # at once
MOST_SCORED = 1 << 14  # held-out places of a score while training


class TrainingError(ValueError):
    """A run cannot go on."""


@dataclass(frozen=True)
class Schedule:
    """How a network is trained.

    Attributes:
        alpha: share of the teacher in the target.
        lr: after a twentieth of the steps; it falls to 0 along a line.
        batch: places of a step.
        epochs: readings of the datastore.
        scores: how often an epoch is scored.
        patience: scores in a row that may be no better before training ends.
        seed: of the order of places.
    """

    alpha: float = 0.2
    lr: float = 5e-4
    batch: int = 1024
    epochs: int = 2
    scores: int = 4
    patience: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha: found {self.alpha}, expected 0 to 1")
        for name in ("lr", "batch", "epochs", "scores", "patience"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: found {getattr(self, name)}, expected a number above 0")

    def steps(self, places: int) -> int:
        return self.epochs * -(-places // self.batch)

    def rate(self, step: int, steps: int) -> float:
        return self.lr * min((step + 1) / max(steps // 20, 1), 1.0) * (1 - step / steps)


class Places:
    """What is learned from: states, the tokens that follow, and what the teacher says there.

    Args:
        columns: int64 [outputs], the tokens that the network knows; None for all.
        teacher: None where only the tokens that follow are learned.
    """

    def __init__(
        self,
        datastore: Stage,
        teacher: Stage | None,
        width: int,
        columns: torch.Tensor | None,
        device: torch.device,
    ) -> None:
        self._keys = datastore.read(KEYS, "float16", width)
        self._values = datastore.read(VALUES, "int32")
        self._device = device
        self._columns = None if columns is None else columns.numpy()
        self._teacher = None
        if teacher is not None:
            self._teacher = tuple(
                teacher.read(name, dtype)
                for name, dtype in ((OFFSETS, "int64"), (TOKENS, "int32"), (PROBS, "float16"))
            )

    def __len__(self) -> int:
        return len(self._values)

    def states(self, rows: NDArray[np.int64]) -> torch.Tensor:
        """float32 [rows, width]"""
        return torch.from_numpy(self._keys[rows]).to(self._device).float()

    def targets(self, rows: NDArray[np.int64], outputs: int, alpha: float) -> torch.Tensor:
        """float32 [rows, outputs]: alpha of the teacher's distribution, the rest on the following token."""
        target = torch.zeros(len(rows) * outputs, device=self._device)
        if self._teacher is None:
            alpha = 0.0
        else:
            offsets, tokens, probs = self._teacher
            counts = offsets[rows + 1] - offsets[rows]
            owners = np.repeat(np.arange(len(rows)), counts)
            within = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
            items = np.repeat(offsets[rows], counts) + within
            places = owners * outputs + self._column(tokens[items])
            target[torch.from_numpy(places).to(self._device)] = alpha * torch.from_numpy(
                probs[items].astype(np.float32)
            ).to(self._device)
        following = torch.from_numpy(np.arange(len(rows)) * outputs + self._column(self._values[rows]))
        target[following.to(self._device)] += 1 - alpha
        return target.view(len(rows), outputs)

    def _column(self, tokens: NDArray[np.int32]) -> NDArray[np.int64]:
        if self._columns is None:
            return tokens.astype(np.int64)
        return np.searchsorted(self._columns, tokens)


class HeldOut:
    """The held-out text, which a network is scored by."""

    def __init__(
        self, datastore: Stage, width: int, columns: torch.Tensor | None, most: int | None = None
    ) -> None:
        values = datastore.read(HELD_VALUES, "int32")
        rows = spread(len(values), most or len(values))
        self._keys = datastore.read(HELD_KEYS, "float16", width)[rows]
        self._following = following_columns(values[rows], columns)
        self._likelihoods = np.array(datastore.read(HELD_LIKELIHOODS, "float32")[rows])

    def score(self, network: MemoryNetwork, weight: float | None = None) -> Mixture:
        """The mix at its best share, or at `weight`."""
        return mixture(
            self._likelihoods, following_probabilities(network, self._keys, self._following), weight
        )


def following_columns(tokens: NDArray[np.int32], columns: torch.Tensor | None) -> NDArray[np.int64]:
    """Where tokens are among a network's outputs; -1 where it does not know one."""
    if columns is None:
        return tokens.astype(np.int64)
    known = columns.numpy()
    places = np.searchsorted(known, tokens).clip(max=len(known) - 1)
    return np.where(known[places] == tokens, places, -1)


@torch.inference_mode()
def following_probabilities(
    network: MemoryNetwork, states: NDArray[np.float16], columns: NDArray[np.int64]
) -> NDArray[np.float64]:
    """[places]: what a network gives the tokens that follow, 0 to those it does not know.

    Args:
        states: [places, width].
        columns: [places], as `following_columns` gives them.
    """
    device = next(network.parameters()).device
    found = []
    for start in range(0, len(states), SCORED_ROWS):
        rows = torch.from_numpy(np.ascontiguousarray(states[start : start + SCORED_ROWS])).to(device).float()
        places = torch.from_numpy(columns[start : start + SCORED_ROWS]).to(device)
        log_probs = torch.log_softmax(network(rows), -1)
        chosen = log_probs.gather(1, places.clamp(min=0)[:, None])[:, 0].double().exp()
        found.append(torch.where(places < 0, 0.0, chosen).cpu().numpy())
    return np.concatenate(found)


def train(
    network: MemoryNetwork,
    places: Places,
    held_out: HeldOut,
    schedule: Schedule,
    checkpoint: Checkpoint,
    *,
    trains_head: bool = True,
    trained: Callable[[int, float], None] = lambda step, loss: None,
    scored: Callable[[int, Mixture], None] = lambda step, mix: None,
) -> Progress:
    """Train, going on from the checkpoint, and leave the network with the values that scored best.

    On a CPU a seed gives the same bits every time, with the same number of threads.

    Args:
        trained: told after each step, with its loss in nats.
        scored: told how the mix predicts the held-out text.

    Raises:
        TrainingError: the loss is no number any more.
    """
    parameters = dict(network.named_parameters())
    if not trains_head:
        parameters.pop("lm_head.weight").requires_grad_(False)
    optimizer = torch.optim.AdamW(parameters.values(), lr=schedule.lr, weight_decay=0.0)
    progress = checkpoint.load(parameters, optimizer) or Progress()
    steps = schedule.steps(len(places))
    every = max(steps // (schedule.epochs * schedule.scores), 1)
    begun = time.monotonic() - progress.seconds
    while progress.step < steps and not _settled(progress, schedule.patience):
        loss = _step(network, parameters, optimizer, places, schedule, progress.step, steps)
        progress.step += 1
        trained(progress.step, loss)
        if progress.step % every == 0 or progress.step == steps:
            mix = held_out.score(network)
            _finite(progress.step, mix.nats)
            if -mix.nats > max(progress.scores.values(), default=-np.inf):
                progress.best = {name: value.detach().cpu().clone() for name, value in parameters.items()}
            progress.scores[progress.step] = -mix.nats
            progress.seconds = time.monotonic() - begun
            checkpoint.save(progress, parameters, optimizer)
            scored(progress.step, mix)
    with torch.no_grad():
        for name, value in parameters.items():
            value.copy_(progress.best[name])
    return progress


def _finite(step: int, loss: float) -> None:
    if not math.isfinite(loss):
        raise TrainingError(f"step {step}: found a loss of {loss}, expected a number; try a lower lr")


def _settled(progress: Progress, patience: int) -> bool:
    """The last scores are all no better than one before."""
    if not progress.scores:
        return False
    best = max(progress.scores, key=lambda step: progress.scores[step])
    return sum(step > best for step in progress.scores) >= patience


def _step(
    network: MemoryNetwork,
    parameters: dict[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    places: Places,
    schedule: Schedule,
    step: int,
    steps: int,
) -> float:
    rows = _rows(len(places), schedule, step)
    for group in optimizer.param_groups:
        group["lr"] = schedule.rate(step, steps)
    states = places.states(rows)
    with torch.autocast(states.device.type, torch.bfloat16, enabled=states.device.type == "cuda"):
        logits: Any = network(states)
    target = places.targets(rows, logits.shape[1], schedule.alpha)
    loss = -(target * torch.log_softmax(logits.float(), -1)).sum() / len(rows)
    _finite(step, loss.item())
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters.values(), MOST_GRADIENT)
    optimizer.step()
    return float(loss.item())


def _rows(places: int, schedule: Schedule, step: int) -> NDArray[np.int64]:
    """The places of a step: each epoch has an order of its own, which the seed gives."""
    epoch, within = divmod(step, -(-places // schedule.batch))
    order = _order(places, schedule.seed, epoch)
    return np.sort(order[within * schedule.batch : (within + 1) * schedule.batch])


@functools.lru_cache(maxsize=1)
def _order(places: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(places)
