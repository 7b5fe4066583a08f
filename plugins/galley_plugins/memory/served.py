"""What serving knows of a memory: an MLP, a retriever's index, or whatever else gives logits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from galley_plugins.memory.requests import check_shares

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from galley_plugins.memory.checkpoint import Base
    from galley_plugins.memory.network import MemoryNetwork
    from galley_plugins.memory.options import MemoryOptions


class UnsuitableMemoryError(ValueError):
    """A memory cannot be mixed with this model; the message says why."""


class Memory(Protocol):
    """
    Attributes:
        layer: the decoder layer whose MLP's input it reads, from 0.
        weight: its share of the mix where neither the configuration nor a request says.
        columns: int64 [columns], token ids that its logits are for; None for the whole vocabulary.
    """

    @property
    def layer(self) -> int: ...

    @property
    def weight(self) -> float: ...

    @property
    def columns(self) -> torch.Tensor | None: ...

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """[rows, columns] of [rows, hidden], the inputs of that MLP."""
        ...


@dataclass(frozen=True)
class MlpMemory:
    """`Memory` of a network."""

    layer: int
    weight: float
    columns: torch.Tensor | None
    network: MemoryNetwork

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.network(states)
        return logits


@dataclass(frozen=True)
class NamedMemory:
    """
    Attributes:
        share: its share of the mix where a request does not say.
    """

    name: str
    share: float
    memory: Memory

    def report(self) -> dict[str, Any]:
        """What the status page shows."""
        return {"name": self.name, "layer": self.memory.layer, "weight": self.share}


def load_memory(
    options: MemoryOptions, model: Path, base: Base, device: torch.device, dtype: torch.dtype
) -> Memory:
    """A memory beside a model.

    Args:
        model, base: its folder, and what is known of it.

    Raises:
        ValueError: it was made for another model, with both hashes, or is damaged.
    """
    from galley_plugins.memory.checkpoint import load_served
    from galley_plugins.memory.packed import pack

    if options.method == "knn-lm":
        from galley_plugins.memory.knn import KnnLm

        return KnnLm(Path(options.path), base, device)
    settings, network, columns = load_served(options.path, model, device, dtype, base)
    if device.type == "cpu":
        pack(network)
    return MlpMemory(settings.layer, settings.weight, columns, network)


def _folder(model_config: Any) -> Path:
    folder = Path(model_config.model)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model_config.model, revision=model_config.revision, local_files_only=True))


def check_memories(options: Sequence[MemoryOptions], model: Path | str) -> None:
    """Compare memories with the model that they are to be mixed with, before anything is loaded.

    Args:
        model: a folder; of a model that is still to be fetched nothing is known yet.

    Raises:
        UnsuitableMemoryError: one was made for another model, is none, or all shares together exceed 1.
    """
    from galley_plugins.memory.checkpoint import Base

    if not Path(model).is_dir():
        return
    try:
        base = Base.of(Path(model))
        shares = {}
        for each in options:
            own = _own_weight(each, base)
            shares[each.name] = own if each.weight is None else each.weight
        check_shares(shares, "memory")
    except (ValueError, OSError) as error:
        raise UnsuitableMemoryError(str(error)) from None


def _own_weight(options: MemoryOptions, base: Base) -> float:
    """What a folder says, once it is known to belong to the model."""
    from galley_plugins.memory.checkpoint import check_base, memory_folder

    if options.method == "knn-lm":
        from galley_plugins.memory.knn import KnnLm

        return KnnLm.check(Path(options.path), base).weight
    return check_base(memory_folder(Path(options.path)), base).weight


def load_memories(
    options: Sequence[MemoryOptions], model_config: Any, device: torch.device, dtype: torch.dtype
) -> tuple[NamedMemory, ...]:
    """Memories beside a model that is served.

    Raises:
        ValueError: one was made for another model or is damaged, or all shares together exceed 1.
    """
    from galley_plugins.memory.checkpoint import Base

    model = _folder(model_config)
    base = Base.of(model)
    found = []
    for each in options:
        memory = load_memory(each, model, base, device, dtype)
        share = memory.weight if each.weight is None else each.weight
        found.append(NamedMemory(each.name, float(share), memory))
    check_shares({each.name: each.share for each in found}, "memory")
    return tuple(found)
