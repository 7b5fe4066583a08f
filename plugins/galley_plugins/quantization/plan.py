"""Which of a model's matrices are quantized, and how each: patterns over the names of tensors."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from galley_plugins.quantization.options import QuantizationOptions

if TYPE_CHECKING:
    from collections.abc import Iterable

SUFFIX = ".weight"
OUTPUT_LAYER, EMBEDDINGS = "lm_head", "embed_tokens"

# Maps that vLLM keeps as one matrix: of these a name's last part is replaced by what they are together.
FUSED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "gate_proj": "gate_up_proj"}
FUSED["up_proj"] = FUSED["gate_proj"]


@dataclass(frozen=True)
class Plan:
    """
    Attributes:
        default: of every linear map that no rule names.
        rules: patterns (`*` and `?`) over the names of modules, and what their matrices become: None is left
            as it is. The last one that matches counts.
        output_layer: whether the output layer is quantized too, where it has weights of its own.
    """

    default: QuantizationOptions
    rules: tuple[tuple[str, QuantizationOptions | None], ...] = ()
    output_layer: bool = False

    def options_of(self, module: str) -> QuantizationOptions | None:
        """What becomes of the module's matrix; None for nothing."""
        last = module.rsplit(".", 1)[-1]
        chosen = (
            None if last == EMBEDDINGS or (last == OUTPUT_LAYER and not self.output_layer) else self.default
        )
        for pattern, options in self.rules:
            if fnmatch.fnmatchcase(module, pattern):
                chosen = options
        return chosen

    def unused(self, modules: Iterable[str]) -> list[str]:
        """Patterns that match no module: likely misspelt."""
        names = list(modules)
        return [pattern for pattern, _ in self.rules if not fnmatch.filter(names, pattern)]

    @classmethod
    def from_values(
        cls,
        values: dict[str, Any],
        rules: Iterable[tuple[str, dict[str, Any] | None]] = (),
        *,
        output_layer: bool = False,
    ) -> Plan:
        """
        Args:
            rules: options that differ from the default, by pattern.

        Raises:
            ValueError: an option is unknown or wrong, by pattern and name.
        """
        default = QuantizationOptions.from_values(values)
        made: list[tuple[str, QuantizationOptions | None]] = []
        for pattern, own in rules:
            try:
                QuantizationOptions.from_values(own or {})  # names what is unknown
                made.append((pattern, None if own is None else replace(default, **own)))
            except ValueError as error:
                raise ValueError(f"{pattern}: {error}") from None
        return cls(default, tuple(made), output_layer)

    def to_values(self) -> dict[str, Any]:
        return {
            "default": self.default.to_values(),
            "rules": [[pattern, options and options.to_values()] for pattern, options in self.rules],
            "output_layer": self.output_layer,
        }


def fused_name(module: str) -> str:
    """The name of the matrix that vLLM makes of a module and its siblings; itself where it stands alone."""
    parent, _, last = module.rpartition(".")
    return f"{parent}.{FUSED[last]}" if last in FUSED else module
