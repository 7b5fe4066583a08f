"""What a worker is asked to serve: the command line of `python -m galley_plugins.worker`."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, field
from typing import Any, Literal

from galley_plugins.embedding.options import EmbeddingOptions
from galley_plugins.memory.options import MemoryOptions
from galley_plugins.options import PluginOptions
from galley_plugins.quantization.serving_options import ServingOptions
from galley_plugins.speculation.options import SpeculationOptions

TASKS = ("generate", "embed")


@dataclass(frozen=True)
class WorkerSpec:
    """One worker.

    Attributes:
        weights: `builtin:NAME`, a local path or a hub id.
        names: the names that requests may call the model by; the first is the model's own.
        tasks: "generate", "embed" or both.
        engine: options of `vllm serve` by flag name; they win over Galley's defaults.
        embedding: how texts become vectors.
        compile: torch.compile on, off, or what suits the device.
        speculation: draft and verify; None is off.
        quantization: what is quantized while loading, and how packed weights are computed with.
        memory: what is mixed into the model's distribution.
    """

    weights: str
    names: tuple[str, ...]
    port: int
    host: str = "127.0.0.1"
    tasks: frozenset[str] = frozenset(TASKS)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    embedding: EmbeddingOptions = field(default_factory=EmbeddingOptions)
    compile: Literal["auto", "on", "off"] = "auto"
    speculation: SpeculationOptions | None = None
    quantization: ServingOptions = field(default_factory=ServingOptions)
    memory: tuple[MemoryOptions, ...] = ()
    engine: dict[str, Any] = field(default_factory=dict)

    @property
    def pooling_runner(self) -> bool:
        """An engine that only pools plain means or last rows is vLLM's own for that."""
        plain = self.embedding.method in ("mean", "last") and self.embedding.output_layer is None
        return self.tasks == frozenset({"embed"}) and plain

    @property
    def compiled(self) -> bool:
        """torch.compile runs the model on a CPU; on CUDA that is vLLM's own choice."""
        return not self.engine.get("enforce-eager", self.compile != "on")

    def plugin_options(self, step_tokens: int | None = None) -> PluginOptions:
        return PluginOptions(
            embedding=self.embedding if "embed" in self.tasks else None,
            vllm_pools=self.pooling_runner,
            generate="generate" in self.tasks,
            step_tokens=step_tokens,
            speculation=self.speculation,
            quantization=self.quantization,
            memory=self.memory,
        )


def parse(arguments: list[str] | None = None) -> WorkerSpec:
    """Read a command line; a wrong one ends the process with exit status 2, as argparse does."""
    parser = argparse.ArgumentParser(
        prog="python -m galley_plugins.worker",
        description="Start one vLLM server with Galley's plugins, as `galley serve` and `galley worker` do.",
    )
    parser.add_argument("--weights", required=True, help="builtin:NAME, a local path or a hub id")
    parser.add_argument(
        "--name", action="append", required=True, dest="names", help="served name; repeatable"
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--tasks", default=",".join(TASKS), help="comma-separated: generate, embed")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--embedding", type=json.loads, default={}, help="how texts become vectors, as a JSON object"
    )
    parser.add_argument("--compile", choices=("auto", "on", "off"), default="auto", help="torch.compile")
    parser.add_argument(
        "--engine", type=json.loads, default={}, help="options of `vllm serve`, as a JSON object"
    )
    parser.add_argument(
        "--speculation", type=json.loads, help="options of draft-verify speculation, as a JSON object"
    )
    parser.add_argument(
        "--quantization",
        type=json.loads,
        default={},
        help="what is quantized while loading, and how packed weights are computed with, as a JSON object",
    )
    parser.add_argument(
        "--memory",
        type=json.loads,
        default=[],
        help="what is mixed into the model's distribution, as a JSON object or a list of them",
    )
    values = vars(parser.parse_args(arguments))
    tasks = frozenset(values.pop("tasks").split(","))
    if not tasks or not tasks <= set(TASKS):
        parser.error(f"--tasks: found {','.join(sorted(tasks))!r}, expected generate, embed or both")
    if not isinstance(values["engine"], dict):
        parser.error("--engine: expected a JSON object")
    try:
        values["embedding"] = EmbeddingOptions.from_values(values["embedding"])
    except (ValueError, TypeError) as error:
        parser.error(f"--embedding: {error}")
    if not isinstance(values["quantization"], dict):
        parser.error("--quantization: expected a JSON object")
    try:
        values["quantization"] = ServingOptions.from_values(values["quantization"])
    except (ValueError, TypeError) as error:
        parser.error(f"--quantization: {error}")
    try:
        values["memory"] = MemoryOptions.from_values(values["memory"])
    except ValueError as error:
        parser.error(f"--memory: {error}")
    if values["memory"] and "generate" not in tasks:
        parser.error("--memory: only a model that generates has a distribution to mix into")
    if values["speculation"] is not None:
        if not isinstance(values["speculation"], dict):
            parser.error("--speculation: expected a JSON object")
        if "generate" not in tasks:
            parser.error("--speculation: only a model that generates can speculate")
        try:
            values["speculation"] = SpeculationOptions.from_values(values["speculation"])
        except (ValueError, TypeError) as error:
            parser.error(f"--speculation: {error}")
    return WorkerSpec(names=tuple(values.pop("names")), tasks=tasks, **values)
