"""How an engine quantizes while it loads, and computes with quantized weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from galley_plugins.quantization.options import QuantizationOptions
from galley_plugins.quantization.plan import Plan

ACTIVATIONS = ("integer", "float")


@dataclass(frozen=True)
class ServingOptions:
    """
    Attributes:
        load: how matrices are quantized while they are loaded, by options of `QuantizationOptions`; None
            leaves them as the checkpoint has them.
        rules: other options for some, by patterns over modules' names; None leaves a matrix as it is.
        activations: on a CPU, beside packed weights: `integer` rounds them in blocks (8 bits beside 4-bit
            weights, 16 beside 8-bit ones), `float` leaves them as they are, which is slower.
        output_bits: 8 rounds the output layer's weights on a CPU, where activations are integers; None leaves
            them as they are.
    """

    load: dict[str, Any] | None = None
    rules: dict[str, dict[str, Any] | None] = field(default_factory=dict)
    activations: Literal["integer", "float"] = "integer"
    output_bits: Literal[8] | None = 8

    def __post_init__(self) -> None:
        if self.activations not in ACTIVATIONS:
            raise ValueError(f"activations: found {self.activations!r}, expected {', '.join(ACTIVATIONS)}")
        if self.output_bits not in (8, None):
            raise ValueError(f"output_bits: found {self.output_bits!r}, expected 8 or null")
        if self.rules and self.load is None:
            raise ValueError(
                "rules: found some without a method, expected a method to quantize by while loading"
            )
        self.plan()  # names what is wrong

    def plan(self) -> Plan | None:
        """What becomes of matrices while they are loaded; None for nothing."""
        return None if self.load is None else Plan.from_values(self.load, list(self.rules.items()))

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> ServingOptions:
        """Read flat values: options of the method beside those of this class.

        Raises:
            ValueError: an option is unknown or wrong, by name.
        """
        own = {name.name for name in fields(cls)} - {"load"}
        loading = {name.name for name in fields(QuantizationOptions)}
        unknown = sorted(set(values) - own - loading)
        if unknown:
            raise ValueError(f"unknown option {', '.join(unknown)}")
        method = {name: value for name, value in values.items() if name in loading}
        if method.get("method") is None:
            if set(method) - {"method"}:
                raise ValueError(
                    f"{', '.join(sorted(set(method) - {'method'}))}: found without a method, expected one to "
                    "quantize by while loading"
                )
            method = {}
        return cls(load=method or None, **{name: values[name] for name in own if name in values})

    def to_values(self) -> dict[str, Any]:
        values = asdict(self)
        return {**(values.pop("load") or {}), **values}
