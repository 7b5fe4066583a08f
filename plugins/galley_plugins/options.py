"""What `galley worker` tells the plugins inside the engine, through vLLM's `--additional-config`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

from galley_plugins.embedding.options import EmbeddingOptions
from galley_plugins.memory.options import MemoryOptions
from galley_plugins.quantization.serving_options import ServingOptions
from galley_plugins.speculation.options import SpeculationOptions

if TYPE_CHECKING:
    from vllm.config import VllmConfig

KEY = "galley"


@dataclass(frozen=True)
class PluginOptions:
    """Options of every plugin, read in each process of the engine.

    Attributes:
        embedding: how `embed` requests are served; None is off.
        vllm_pools: vLLM's own pooling runner serves them.
        generate: the engine generates text.
        step_tokens: tokens of a step; None is the most that a batch can have. A prompt that has to run in one
            step may exceed it.
        embed_step_tokens: the same while only embeddings run, whose clients wait for no single step; None is
            `step_tokens`.
        speculation: draft and verify; None is off.
        quantization: what is quantized while loading, and how packed weights are computed with.
        memory: what is mixed into the model's distribution.
    """

    embedding: EmbeddingOptions | None = None
    vllm_pools: bool = False
    generate: bool = True
    step_tokens: int | None = None
    embed_step_tokens: int | None = None
    speculation: SpeculationOptions | None = None
    quantization: ServingOptions = field(default_factory=ServingOptions)
    memory: tuple[MemoryOptions, ...] = ()

    @property
    def pools(self) -> bool:
        """Galley's runner serves `embed` requests."""
        return self.embedding is not None and not self.vllm_pools

    def to_additional_config(self) -> dict[str, Any]:
        return {KEY: {**asdict(self), "quantization": self.quantization.to_values()}}

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
        speculation, embedding = values.pop("speculation", None), values.pop("embedding", None)
        quantization = values.pop("quantization", {})
        memory = values.pop("memory", ())
        return cls(
            **values,
            embedding=None if embedding is None else EmbeddingOptions.from_values(embedding),
            speculation=None if speculation is None else SpeculationOptions.from_values(speculation),
            quantization=ServingOptions.from_values(quantization),
            memory=MemoryOptions.from_values(memory),
        )
