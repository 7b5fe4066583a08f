"""A run's state on disk, from which it goes on after an interruption.

A checkpoint is a folder of safetensors and JSON. A newer one is written whole before the older one goes.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from galley_plugins.models.store import sync

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch

_TENSORS, _STATE = "state.safetensors", "state.json"
_VALUE, _BEST = "value", "best"


class CheckpointError(ValueError):
    """A checkpoint is damaged, in the way, or of a run with other settings."""


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        step: steps done.
        seconds: they took.
        scores: of the development pairs, by the number of steps done before.
        best: the trained values that had the best score.
    """

    step: int = 0
    seconds: float = 0.0
    scores: dict[int, float] = field(default_factory=dict)
    best: dict[str, torch.Tensor] = field(default_factory=dict)


class Checkpoint:
    """Checkpoints of one run.

    Args:
        folder: holds nothing else.
        settings: what the run's result depends on, as JSON has it.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self._folder = folder
        self._settings = json.loads(json.dumps(settings))

    def latest(self) -> Path | None:
        """The newest one, if there is any."""
        return max(self._folder.glob("step-*"), default=None)

    def save(
        self,
        progress: Progress,
        parameters: Mapping[str, torch.nn.Parameter],
        optimizer: torch.optim.Optimizer,
    ) -> None:
        """Write one in place of the last."""
        tensors = {f"{_VALUE}/{name}": value.detach().cpu() for name, value in parameters.items()}
        tensors |= {f"{_BEST}/{name}": value for name, value in progress.best.items()}
        for name, value in parameters.items():
            for key, moment in optimizer.state.get(value, {}).items():
                tensors[f"{key}/{name}"] = moment.detach().cpu()
        state = {
            "settings": self._settings,
            "step": progress.step,
            "seconds": progress.seconds,
            "scores": list(progress.scores.items()),
        }
        older = list(self._folder.glob("*")) if self._folder.is_dir() else []
        temporary = self._folder / ".writing"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_file(tensors, temporary / _TENSORS)
        (temporary / _STATE).write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
        for path in temporary.iterdir():
            sync(path)
        place = self._folder / f"step-{progress.step:08}"
        if place in older:
            shutil.rmtree(place)
        temporary.rename(place)
        sync(self._folder)
        for path in older:
            shutil.rmtree(path, ignore_errors=True)

    def load(
        self, parameters: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> Progress | None:
        """Take up the newest one; None if there is none.

        Raises:
            CheckpointError: it is damaged or of other settings.
        """
        place = self.latest()
        if place is None:
            return None
        try:
            state = json.loads((place / _STATE).read_text(encoding="utf-8"))
            tensors = load_file(place / _TENSORS)
        except (OSError, ValueError, SafetensorError) as error:
            raise CheckpointError(f"{place} cannot be read: {error}") from None
        self._refuse_others(place, state["settings"])
        by_kind: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in tensors.items():
            kind, name = key.split("/", 1)
            by_kind.setdefault(kind, {})[name] = tensor
        values, best = by_kind.pop(_VALUE), by_kind.pop(_BEST, {})
        for name, parameter in parameters.items():
            parameter.data.copy_(values[name])
            moments = {kind: found[name] for kind, found in by_kind.items() if name in found}
            if moments:
                optimizer.state[parameter] = {
                    kind: value if kind == "step" else value.to(parameter.device)
                    for kind, value in moments.items()
                }
        scores = {int(step): float(score) for step, score in state["scores"]}
        return Progress(state["step"], state["seconds"], scores, best)

    def remove(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def _refuse_others(self, place: Path, found: dict[str, Any]) -> None:
        for name in sorted({*found, *self._settings}):
            if found.get(name) != self._settings.get(name):
                raise CheckpointError(
                    f"{place}: found a run with {name} = {found.get(name)!r}, expected "
                    f"{self._settings.get(name)!r}; remove the folder to start anew"
                )
