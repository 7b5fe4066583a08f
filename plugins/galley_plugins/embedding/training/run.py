"""One run of training, from a model's name to an adapter's folder."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any, Protocol

from galley_plugins.embedding.adapter import SETTINGS, AdapterError, AdapterSettings, saving
from galley_plugins.embedding.training.base import BaseModel
from galley_plugins.embedding.training.data import TrainingData, spread
from galley_plugins.embedding.training.loop import Schedule, spearman, train
from galley_plugins.training_checkpoint import Checkpoint, CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

    from galley_plugins.embedding.training.loop import Reporter, Trainee

DISTRIBUTION = "galley-serve"


@dataclass(frozen=True)
class RunOptions:
    """What every method's run has.

    Attributes:
        data: folder with sts/ and cls/.
        out: the adapter's folder.
        steps: of the optimizer.
        batch: pairs of a step.
        rank: of LoRA.
        lr: the highest learning rate.
        dev_pairs: of STS-B's development pairs, how many choose among steps.
        evaluations: how often they are scored.
        max_seconds: after which training ends with what it has.
        resume: go on from the checkpoint beside `out`, if there is one.
    """

    data: Path
    out: Path
    steps: int
    batch: int
    rank: int
    lr: float
    seed: int = 0
    dev_pairs: int = 150
    evaluations: int = 3
    max_seconds: float = 1800.0
    resume: bool = False


class Recipe(Protocol):
    """How a method is trained."""

    @property
    def method(self) -> str:
        """As an adapter names it."""

    def trainee(self, base: BaseModel, data: TrainingData, batch: int, rank: int, seed: int) -> Trainee:
        """The method, with its weights as training begins."""


@dataclass(frozen=True)
class Figures:
    """What a run came to.

    Attributes:
        best_step: whose values were kept.
        seconds: of all of it.
        dev: Spearman's correlation times 100 on the development pairs that chose among steps.
        test: the same on all of STS-B's test pairs.
    """

    method: str
    out: str
    steps: int
    best_step: int
    seconds: float
    dev: float
    test: float


def run(place: Any, recipe: Recipe, options: RunOptions, reporter: Reporter) -> Figures:
    """Train an adapter and write it; test pairs are scored at the end alone.

    Args:
        place: folder or hub id of the model.

    Raises:
        AdapterError: `out` holds something else.
        CheckpointError: there is a checkpoint that is not asked for, or of another run.
        DataError: a data file is missing or wrong.
        TrainingError: training fails.
    """
    from accelerate.utils import set_seed

    _check_out(options)
    begun = time.monotonic()
    data = TrainingData.read(options.data)
    set_seed(options.seed)
    base = BaseModel.load(place)
    describe = base.describe()
    trainee = recipe.trainee(base, data, options.batch, options.rank, options.seed)
    settings = {
        "method": recipe.method,
        "base": asdict(describe),
        "data": data.digest,
        **{name: value for name, value in asdict(options).items() if name not in _FREE},
        **_plain(recipe),
    }
    checkpoint = Checkpoint(_checkpoint_folder(options.out), settings)
    schedule = Schedule(
        options.steps, options.lr, evaluations=options.evaluations, max_seconds=options.max_seconds
    )
    dev = spread(data.dev, options.dev_pairs)
    progress = train(trainee, schedule, dev, checkpoint, reporter, resume=options.resume)
    figures = Figures(
        method=recipe.method,
        out=str(options.out),
        steps=progress.step,
        best_step=max(progress.scores, key=lambda step: progress.scores[step]),
        seconds=round(time.monotonic() - begun, 1),
        dev=round(max(progress.scores.values()), 2),
        test=round(spearman(trainee, data.test), 2),
    )
    training = {
        **{name: value for name, value in settings.items() if name not in ("method", "base")},
        "scores": {str(step): round(score, 2) for step, score in progress.scores.items()},
        **{name: value for name, value in asdict(figures).items() if name not in ("method", "out", "steps")},
    }
    adapter = AdapterSettings(
        recipe.method, describe, metadata.version(DISTRIBUTION), trainee.options, trainee.sizes, training
    )
    with saving(options.out, adapter, trainee.tensors()) as folder:
        trainee.add_files(folder)
    checkpoint.remove()
    return figures


_FREE = ("data", "out", "max_seconds", "resume")  # options that a run may go on with others of


def _plain(recipe: Any) -> dict[str, Any]:
    return {
        name: value if isinstance(value, int | float | str) else str(value)
        for name, value in asdict(recipe).items()
    }


def _checkpoint_folder(out: Path) -> Path:
    return out.with_name(f".{out.name}.checkpoint")


def _check_out(options: RunOptions) -> None:
    """Refuse early what would fail after training."""
    out = options.out
    if out.exists() and not (out / SETTINGS).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise AdapterError(f"--out: {out}: found other files, expected an adapter to replace, or nothing")
    found = Checkpoint(_checkpoint_folder(out), {}).latest()
    if found is not None and not options.resume:
        raise CheckpointError(f"found the checkpoint {found}, expected --resume to go on, or the folder gone")
