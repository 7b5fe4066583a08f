"""How matrices are quantized, read from plain values."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

SERVED_AS = "galley"
"""Name of the method in vLLM, and in checkpoints that only Galley reads."""

METHODS = ("rtn", "finequant", "easyquant", "finequant+easyquant")
CHANNEL = 0
"""A group size: one group for each output channel, all of the input dimension."""


@dataclass(frozen=True)
class QuantizationOptions:
    """
    Attributes:
        method: `rtn` rounds to the nearest, with one group size; `finequant` chooses the group size of each
            matrix; `easyquant` keeps outliers apart and optimises the ranges of the rest; the last does both.
        bits: of a code, 4 or 8.
        group_size: inputs that share a scale, where the method does not choose; 0 is a whole channel.
        group_sizes: what it chooses from, each half of the last or less.
        shrink: of two group sizes the smaller is taken where its mean range is below so much of the larger's.
        sigma: weights so many standard deviations from the matrix's mean are outliers.
        steps: of the optimisation of ranges, at the most.
        learning_rate: of its Adam, for the ratio of a scale to the largest weight's.
    """

    method: Literal["rtn", "finequant", "easyquant", "finequant+easyquant"] = "finequant+easyquant"
    bits: Literal[4, 8] = 4
    group_size: int = CHANNEL
    group_sizes: tuple[int, ...] = (128, 64, 32)
    shrink: float = 0.93
    sigma: float = 3.0
    steps: int = 100
    learning_rate: float = 0.01

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method: found {self.method!r}, expected {', '.join(METHODS)}")
        if self.bits not in (4, 8):
            raise ValueError(f"bits: found {self.bits!r}, expected 4 or 8")
        for size in (self.group_size, *self.group_sizes):
            if isinstance(size, bool) or not isinstance(size, int) or size < 0 or size % 8:
                raise ValueError(f"group size: found {size!r}, expected a multiple of 8, or 0 for a channel")
        if 0 in self.group_sizes or list(self.group_sizes) != sorted(set(self.group_sizes), reverse=True):
            raise ValueError(
                f"group_sizes: found {list(self.group_sizes)}, expected smaller and smaller ones"
            )
        for name, low, high in (("shrink", 0, 1), ("sigma", 0, 100), ("learning_rate", 0, 1)):
            value = getattr(self, name)
            if not low < value <= high:
                raise ValueError(f"{name}: found {value!r}, expected more than {low}, at most {high}")
        if self.steps < 1:
            raise ValueError(f"steps: found {self.steps!r}, expected at least 1")

    @property
    def chooses_groups(self) -> bool:
        return self.method.startswith("finequant")

    @property
    def keeps_outliers(self) -> bool:
        return self.method.endswith("easyquant")

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> QuantizationOptions:
        """
        Raises:
            ValueError: an option is unknown or wrong, by name.
        """
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"unknown option {', '.join(unknown)}")
        values = dict(values)
        if "group_sizes" in values:
            values["group_sizes"] = tuple(values["group_sizes"])
        return cls(**values)

    def to_values(self) -> dict[str, Any]:
        return {**asdict(self), "group_sizes": list(self.group_sizes)}
