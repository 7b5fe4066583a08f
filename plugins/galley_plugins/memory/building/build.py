"""A memory from a corpus: tokens, datastore, index, teacher, training, and its share of the mix.

Each stage is a folder of the build; see `stages`. What is there and fits is not made again.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from galley_plugins.memory.building.corpus import Corpus
from galley_plugins.memory.building.datastore import KEYS, VALUES, read_states
from galley_plugins.memory.building.neighbours import Neighbours, build_index, kind_of
from galley_plugins.memory.building.stages import Stage, StageError, alone, explained
from galley_plugins.memory.building.states import StateReader
from galley_plugins.memory.building.teacher import write_teacher
from galley_plugins.memory.building.tokens import tokenize
from galley_plugins.memory.building.training import MOST_SCORED, HeldOut, Places, Schedule, train
from galley_plugins.memory.checkpoint import (
    MEMORY,
    SETTINGS,
    Base,
    MemorySettings,
    load_settings,
    output_rows,
    save_memory,
)
from galley_plugins.memory.network import MemoryNetwork, Sizes
from galley_plugins.registration import DISTRIBUTION
from galley_plugins.training_checkpoint import Checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from galley_plugins.memory.building.mixture import Mixture

STAGES = ("tokens", "datastore", "index", "teacher", "train", "weigh")
NETWORK = "network.safetensors"
ALL_COLUMNS = 0.9  # of a vocabulary: from here on the output layer has a row for each token


@dataclass(frozen=True)
class BuildOptions:
    """How a memory is built.

    Attributes:
        corpus: a file or folder; see `corpus.Corpus`.
        out: folder of the build.
        model: folder of the model.
        layer: whose MLP's input is read; negative ones count from the last.
        context: tokens that the model reads at once.
        held_out: share of the corpus, at its end, or another text.
        index: flat, ivf-pq, or auto for what suits the size.
        neighbours: of a place.
        temperature: of the teacher; None for the best of several.
        floor: probabilities of the teacher below it are left out.
        blocks: of the network.
        hidden: inside a block; None for the model's own.
        head: `own` output layer, which begins as the model's, or `tied`: the model's.
        weight: the memory's share of the mix; None for the best on the held-out text.
        device: auto, cpu or cuda.
    """

    corpus: Path
    out: Path
    model: Path
    layer: int = -1
    context: int = 1024
    held_out: float | Path = 0.1
    text_field: str = "text"
    most_bad: int = 100
    index: str = "auto"
    neighbours: int = 1024
    temperature: float | None = None
    floor: float = 1e-5
    blocks: int = 1
    hidden: int | None = None
    head: str = "own"
    weight: float | None = None
    device: str = "auto"
    schedule: Schedule = field(default_factory=Schedule)

    def __post_init__(self) -> None:
        if isinstance(self.held_out, float) and not 0 < self.held_out < 1:
            raise ValueError(f"held_out: found {self.held_out}, expected a share between 0 and 1")
        if self.index not in ("auto", "flat", "ivf-pq"):
            raise ValueError(f"index: found {self.index!r}, expected auto, flat or ivf-pq")
        if self.head not in ("own", "tied"):
            raise ValueError(f"head: found {self.head!r}, expected own or tied")
        if self.weight is not None and not 0 <= self.weight <= 1:
            raise ValueError(f"weight: found {self.weight}, expected 0 to 1")
        if self.temperature is not None and not self.temperature > 0:
            raise ValueError(f"temperature: found {self.temperature}, expected a number above 0")
        for name in ("context", "neighbours"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name}: found {getattr(self, name)}, expected 2 or more")
        if self.blocks < 0:
            raise ValueError(f"blocks: found {self.blocks}, expected 0 or more")
        if self.hidden is not None and self.hidden < 1:
            raise ValueError(f"hidden: found {self.hidden}, expected 1 or more")


class Reporter(Protocol):
    """Told how a build goes."""

    def stage(self, name: str, total: int | None) -> Callable[[int], None]:
        """A stage begins, of so many units; the result takes those done since its last call."""

    def reused(self, name: str) -> None:
        """A stage is there already."""

    def bad_row(self, what: str) -> None:
        """A row of the corpus is left out."""

    def scored(self, step: int, mix: Mixture) -> None:
        """The network was scored on the held-out text."""


@dataclass(frozen=True)
class Built:
    """A build, as far as it went; memory is None where training has not run."""

    out: Path
    memory: MemorySettings | None = None


class Build:
    """One build.

    Raises:
        ValueError: an option is wrong, by name, or a folder is not what is expected.
    """

    def __init__(self, options: BuildOptions, reporter: Reporter) -> None:
        from transformers import AutoConfig, AutoTokenizer

        self.options = options
        self._reporter = reporter
        out = options.out
        if out.exists() and not (out.is_dir() and (not any(out.iterdir()) or (out / STAGES[0]).is_dir())):
            raise StageError(f"{out}: found other files, expected a build to go on with, or nothing")
        self.device = device_of(options.device)
        self._config = AutoConfig.from_pretrained(options.model).get_text_config()
        self._tokenizer = AutoTokenizer.from_pretrained(options.model)
        self.base = Base.of(options.model, self._tokenizer)
        layers = self.base.layers
        if not -layers <= options.layer < layers:
            raise ValueError(f"layer: found {options.layer}, expected {-layers} to {layers - 1}")
        self.corpus = Corpus(options.corpus, options.text_field, options.most_bad, reporter.bad_row)
        self._held_out = (
            options.held_out
            if isinstance(options.held_out, float)
            else Corpus(options.held_out, options.text_field, options.most_bad, reporter.bad_row)
        )
        self._corpus_hash = self.corpus.digest()
        held: Any = self._held_out if isinstance(self._held_out, float) else self._held_out.digest()
        self.tokens = Stage(
            out / "tokens", {"corpus": self._corpus_hash, "held_out": held, "tokenizer": self.base.tokenizer}
        )
        self.datastore = Stage(
            out / "datastore",
            {
                "model": self.base.model,
                "layer": options.layer % layers,
                "context": options.context,
                "device": self.device.type,
            },
            self.tokens,
        )
        self.index = Stage(out / "index", {"index": options.index}, self.datastore)
        self.teacher = Stage(
            out / "teacher",
            {"neighbours": options.neighbours, "temperature": options.temperature, "floor": options.floor},
            self.index,
        )
        learned = {
            "blocks": options.blocks,
            "hidden": options.hidden,
            "head": options.head,
            **asdict(options.schedule),
        }
        self.training = Stage(out / "train", learned, self.teacher if self._taught else self.datastore)
        self.weighing = Stage(out / "weigh", {"weight": options.weight}, self.training)

    @property
    def _taught(self) -> bool:
        """Nothing is asked of a teacher whose share of the target is 0."""
        return self.options.schedule.alpha > 0

    def run(self, until: str = STAGES[-1]) -> Built:
        """Make what is missing, up to a stage of `STAGES`.

        Raises:
            CorpusError, StageError, TrainingError, CheckpointError: it cannot go on; what is whole stays.
        """
        out = self.options.out
        with explained(out):
            out.mkdir(parents=True, exist_ok=True)
        with alone(out):
            self._make(until)
        if until != STAGES[-1]:
            return Built(out)
        return Built(out, load_settings(out / MEMORY))

    def _make(self, until: str) -> None:
        steps = {
            "tokens": self._tokens,
            "datastore": self._datastore,
            "index": self._index,
            "teacher": self._teacher,
            "train": self._train,
            "weigh": self._weigh,
        }
        for name in STAGES[: STAGES.index(until) + 1]:
            needed = self._taught or name not in ("index", "teacher") or until in ("index", "teacher")
            if needed:
                steps[name]()

    def _reused(self, stage: Stage) -> bool:
        if stage.done:
            self._reporter.reused(stage.folder.name)
            return True
        return False

    def _tokens(self) -> None:
        if self._reused(self.tokens):
            return
        total = self.corpus.size() + (0 if isinstance(self._held_out, float) else self._held_out.size())
        tokenize(
            self.tokens, self.corpus, self._held_out, self._tokenizer, self._reporter.stage("tokens", total)
        )

    def _datastore(self) -> None:
        if self._reused(self.datastore):
            return
        entries = self.tokens.result["entries"] + self.tokens.result["heldout_entries"]
        advance = self._reporter.stage("datastore", entries)
        reader = StateReader(self.options.model, self.options.layer, self.device)
        read_states(self.datastore, self.tokens, reader, self.options.context, advance)

    def _index(self) -> None:
        if self._reused(self.index):
            return
        keys = self._keys()
        kind: Any = kind_of(len(keys)) if self.options.index == "auto" else self.options.index
        build_index(self.index, keys, kind, self._reporter.stage("index", len(keys)))

    def _teacher(self) -> None:
        if self._reused(self.teacher):
            return
        keys = self._keys()
        write_teacher(
            self.teacher,
            self.datastore,
            self.neighbours(),
            width=self.base.hidden_size,
            k=min(self.options.neighbours, len(keys) - 1),
            temperature=self.options.temperature,
            floor=self.options.floor,
            advance=self._reporter.stage("teacher", len(keys)),
        )

    def _train(self) -> None:
        if self._reused(self.training):
            return
        if not self.training.begin():
            self.training.note({"begun": True})  # the checkpoint stays
        network, columns = self._network()
        schedule = self.options.schedule
        teacher = self.teacher if self._taught else None
        width = self.base.hidden_size
        places = Places(self.datastore, teacher, width, columns, self.device)
        checkpoint = Checkpoint(self.training.folder / "checkpoint", {"key": self.training.key})
        advance = self._reporter.stage("train", schedule.steps(len(places)))
        done = 0

        def trained(step: int, loss: float) -> None:
            nonlocal done
            advance(step - done)
            done = step

        path = self.training.folder / f"{NETWORK}.partial"
        with explained(path):
            progress = train(
                network,
                places,
                HeldOut(self.datastore, width, columns, MOST_SCORED),
                schedule,
                checkpoint,
                trains_head=self.options.head == "own",
                trained=trained,
                scored=self._reporter.scored,
            )
            save_file({name: value.cpu() for name, value in network.state_dict().items()}, path)
        scores = {str(step): round(-score, 4) for step, score in progress.scores.items()}
        self.training.finish(
            {"steps": progress.step, "seconds": round(progress.seconds, 1), "heldout_nats": scores}
        )
        checkpoint.remove()

    def _network(self) -> tuple[MemoryNetwork, torch.Tensor | None]:
        """As training begins with it, and its tokens."""
        columns = self._columns()
        head = output_rows(self.options.model, columns)
        width = self.base.hidden_size
        sizes = Sizes(
            "llama",
            width,
            width,
            self.options.hidden or int(getattr(self._config, "intermediate_size", 4 * width)),
            self.options.blocks,
            len(head),
            float(getattr(self._config, "rms_norm_eps", 1e-5)),
        )
        return MemoryNetwork(sizes).initialize(self.options.schedule.seed, head).to(self.device), columns

    def _weigh(self) -> None:
        if self.weighing.done and (self.options.out / MEMORY / SETTINGS).is_file():
            self._reporter.reused("weigh")
            return
        self.weighing.begin()
        held_out = self.tokens.result["heldout_entries"]
        advance = self._reporter.stage("weigh", held_out)
        network, columns = self._network()
        network.load_state_dict(load_file(self.training.folder / NETWORK, device=str(self.device)))
        mix = HeldOut(self.datastore, self.base.hidden_size, columns).score(network, self.options.weight)
        advance(held_out)
        self._save(network, columns, mix)
        self.weighing.finish({"weight": mix.weight, "nats": mix.nats, "plain": mix.plain})

    def _save(self, network: MemoryNetwork, columns: torch.Tensor | None, mix: Mixture) -> None:
        tensors = {name: value.half() for name, value in network.state_dict().items()}
        if self.options.head == "tied":
            del tensors["lm_head.weight"]
        if columns is not None:
            tensors["columns"] = columns.to(torch.int32)
        training = {
            **self.training.settings,
            **self.training.result,
            **({"teacher": self.teacher.result} if self._taught else {}),
            "mix": {"nats": mix.nats, "plain": mix.plain},
        }
        settings = MemorySettings(
            network.sizes,
            self.options.layer % self.base.layers,
            round(mix.weight, 4),
            self.base,
            metadata.version(DISTRIBUTION),
            {"hash": self._corpus_hash, **self.tokens.result},
            training,
        )
        folder = self.options.out / MEMORY
        with explained(folder):
            save_memory(folder, settings, tensors)

    def neighbours(self) -> Neighbours:
        """The datastore's, once the stage `index` has run."""
        return Neighbours.of(self.index, self._keys(), self.device)

    def _keys(self) -> Any:
        return self.datastore.read(KEYS, "float16", self.base.hidden_size)

    def _columns(self) -> torch.Tensor | None:
        """int64 [tokens], those that the corpus has; None for all of the vocabulary where most are there."""
        known = np.unique(self.datastore.read(VALUES, "int32"))
        if len(known) >= ALL_COLUMNS * self.base.vocabulary:
            return None
        return torch.from_numpy(known.astype(np.int64))


def device_of(asked: str) -> torch.device:
    """What `auto`, cpu or cuda is here; raises ValueError for a GPU that is not there."""
    if asked not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device: found {asked!r}, expected auto, cpu or cuda")
    if asked == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: found cuda, and no GPU that torch can use")
    return torch.device("cuda" if asked != "cpu" and torch.cuda.is_available() else "cpu")
