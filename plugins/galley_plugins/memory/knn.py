"""kNN-LM over the datastore of a build: the retriever that a memory imitates, with the same interface.

kNN-LM (arXiv 1911.00172): p(y) is the sum of softmax(-d / T) over the nearest keys that y followed. It
searches at each token, so it is for evaluation and small corpora.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from galley_plugins.memory.building.datastore import KEYS, VALUES
from galley_plugins.memory.building.neighbours import Neighbours
from galley_plugins.memory.building.stages import StageError, opened
from galley_plugins.memory.building.teacher import QUERIES, distributions, probabilities

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from galley_plugins.memory.building.stages import Stage
    from galley_plugins.memory.checkpoint import Base


@dataclass(frozen=True)
class KnnBuild:
    """What is read of a build.

    Attributes:
        weight: its share of the mix, that suited the held-out text.
    """

    datastore: Stage
    index: Stage
    teacher: Stage
    weight: float


class KnnLm:
    """
    Args:
        build: folder of a build, as far as its teacher.
        base: the model that is mixed with it.

    Attributes:
        layer, weight, columns: as of `served.Memory`.
        temperature, k: that suited the build's held-out text, and neighbours of a place.

    Raises:
        StageError: as `check`.
    """

    def __init__(self, build: Path, base: Base, device: torch.device) -> None:
        found = self.check(build, base)
        self.layer = int(found.datastore.result["layer"])
        self.weight = found.weight
        self.temperature = float(found.teacher.result["temperature"])
        self.k = int(found.teacher.result["k"])
        self._values = found.datastore.read(VALUES, "int32")
        self._known = np.unique(self._values)
        self.columns = torch.from_numpy(self._known.astype(np.int64)).to(device)
        keys = found.datastore.read(KEYS, "float16", base.hidden_size)
        self.neighbours = Neighbours.of(found.index, keys, device)

    @staticmethod
    def check(build: Path, base: Base) -> KnnBuild:
        """
        Raises:
            StageError: the build is not whole so far, or of another model or tokenizer, with both hashes.
        """
        stages = {name: opened(build / name) for name in ("tokens", "datastore", "index", "teacher")}
        missing = [name for name, stage in stages.items() if stage is None]
        if missing:
            raise StageError(
                f"memory: {build}: found no whole {', '.join(missing)}, expected a build with them"
            )
        tokens, datastore, index, teacher = (stage for stage in stages.values() if stage is not None)
        for name, stage in (("model", datastore), ("tokenizer", tokens)):
            if stage.settings[name] != getattr(base, name):
                raise StageError(
                    f"memory: {build} was built for another {name}: found hash {stage.settings[name]}, the "
                    f"{name} here has {getattr(base, name)}"
                )
        return KnnBuild(datastore, index, teacher, float(teacher.result["knn"]["weight"]))

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """float32 [rows, columns]: log-probabilities, minus infinity where no neighbour was followed by it.

        Args:
            states: [rows, hidden], the inputs of the layer's MLP.
        """
        distances, entries = self.neighbours.search(states.float().cpu().numpy(), self.k)
        counts, tokens, probs = distributions(distances, self._values[entries], self.temperature)
        found = np.full((len(counts), len(self._known)), -np.inf, np.float32)
        with np.errstate(divide="ignore"):
            found[np.repeat(np.arange(len(counts)), counts), np.searchsorted(self._known, tokens)] = np.log(
                probs
            )
        return torch.from_numpy(found).to(self.columns.device)

    def following(self, keys: NDArray[Any], tokens: NDArray[np.int32]) -> NDArray[np.float64]:
        """[places]: what it gives the tokens that follow."""
        found = []
        for start in range(0, len(keys), QUERIES):
            distances, entries = self.neighbours.search(keys[start : start + QUERIES], self.k)
            there = tokens[start : start + QUERIES]
            found.append(probabilities(distances, self._values[entries], there, self.temperature))
        return np.concatenate(found)
