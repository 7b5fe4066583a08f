"""What `memory:` of the configuration may say; read in each process of the engine."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    from collections.abc import Sequence

Method = Literal["mlp", "knn-lm"]
METHODS = get_args(Method)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


@dataclass(frozen=True)
class MemoryOptions:
    """One memory that is mixed into the model's next-token distribution.

    Attributes:
        path: its folder, or that of the build.
        method: mlp, or knn-lm for the build's datastore itself.
        name: what requests call it.
        weight: its share of the mix, 0 to 1, where a request does not say; None is the one in its folder.
    """

    path: str
    name: str = "memory"
    weight: float | None = None
    method: Method = "mlp"

    def __post_init__(self) -> None:
        if not isinstance(self.path, str) or not self.path:
            raise ValueError(f"memory.path: found {self.path!r}, expected a folder")
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise ValueError(
                f"memory.name: found {self.name!r}, expected letters, digits, _ and - (64 at most), starting "
                "with one of the first two"
            )
        if self.method not in METHODS:
            raise ValueError(f"memory.method: found {self.method!r}, expected {', '.join(METHODS)}")
        number = isinstance(self.weight, int | float) and not isinstance(self.weight, bool)
        if self.weight is not None and not (number and 0 <= self.weight <= 1):
            raise ValueError(f"memory.weight: found {self.weight!r}, expected a number from 0 to 1")

    @classmethod
    def from_values(cls, values: Any) -> tuple[MemoryOptions, ...]:
        """Build from plain values, as JSON carries them: one mapping, or a list of them.

        Raises:
            ValueError: an option is unknown, missing or wrong, or two memories have one name.
        """
        listed: Sequence[Any] = values if isinstance(values, list | tuple) else [values]
        known = [entry.name for entry in fields(cls)]
        memories = []
        for each in listed:
            if not isinstance(each, dict):
                raise ValueError(f"memory: found {type(each).__name__}, expected {', '.join(known)}")
            unknown = sorted(set(each) - set(known))
            if unknown:
                raise ValueError(f"memory: unknown option {', '.join(unknown)}, expected {', '.join(known)}")
            if "path" not in each:
                raise ValueError("memory.path: missing")
            memories.append(cls(**each))
        names = [memory.name for memory in memories]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"memory.name: found {', '.join(twice)} twice, expected another name for each")
        return tuple(memories)
