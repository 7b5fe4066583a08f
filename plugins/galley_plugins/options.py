"""What `galley worker` tells the plugins inside the engine, through vLLM's `--additional-config`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, get_args

from galley_plugins.speculation.options import SpeculationOptions

if TYPE_CHECKING:
    from vllm.config import VllmConfig

KEY = "galley"
Pooling = Literal["mean", "last"]


@dataclass(frozen=True)
class PluginOptions:
    """Options of every plugin, read in each process of the engine.

    Attributes:
        embed: serve `embed` requests from the generating engine.
        pooling: how hidden states become one vector.
        speculation: draft and verify; None is off.
    """

    embed: bool = False
    pooling: Pooling = "mean"
    speculation: SpeculationOptions | None = None

    def __post_init__(self) -> None:
        if self.pooling not in get_args(Pooling):
            raise ValueError(
                f"pooling: found {self.pooling!r}, expected one of {', '.join(get_args(Pooling))}"
            )

    def to_additional_config(self) -> dict[str, Any]:
        return {KEY: asdict(self)}

    @classmethod
    def from_vllm_config(cls, vllm_config: VllmConfig) -> PluginOptions:
        """Read the options back.

        Raises:
            ValueError: an option is unknown, as when the launcher and the plugins are of different versions.
        """
        additional = vllm_config.additional_config
        values = additional.get(KEY, {}) if isinstance(additional, dict) else {}
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"additional_config.{KEY}: unknown option {', '.join(unknown)}")
        values = dict(values)
        speculation = values.pop("speculation", None)
        return cls(
            **values,
            speculation=None if speculation is None else SpeculationOptions.from_values(speculation),
        )
