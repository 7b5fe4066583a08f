"""What `embedding:` of the configuration may say; read in each process of the engine."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from galley_plugins.embedding.adapter import METHODS as TRAINED
from galley_plugins.embedding.adapter import load_settings
from galley_plugins.embedding.templates import TEMPLATES, Template

Method = Literal[
    "mean", "last", "prompt-eol", "token-prepending", "echo", "splade", "gem", "causal2vec", "nv-embed"
]

WHOLE_PROMPT = {"token-prepending", "nv-embed"}  # methods whose prompts run in one step

# What `input_type` of a request stands for where the configuration says nothing else.
INSTRUCTIONS = {"query": "", "document": ""}
INSTRUCTION_TEMPLATE = "Instruct: {instruction}\nQuery: "


@dataclass(frozen=True)
class EmbeddingOptions:
    """How texts become vectors.

    Attributes:
        method: see the modules of `galley_plugins.embedding.methods`.
        adapter: the folder of a trained adapter, which names its method.
        prompt: the name of a template or a template itself, with `{text}`; None takes the method's own.
        clean: end every text as a sentence and keep quotation marks out of it; None as the template asks.
        start_layer, exit_layer: the last token's state replaces the placeholder's before each of the layers
            start_layer <= layer < exit_layer (token-prepending); None takes the model family's.
        output_layer: the layer whose output is pooled, counted as transformers counts hidden states: 0 is the
            embedding, negative counts from the end and -1 is the last, normalised one; None as the method has
            it.
        instructions: what `input_type` of a request says to the model, by its value.
        instruction_template: how an instruction is written before the text.
        normalize: vectors have length 1.
        weights: the most weights of a sparse vector (splade).
        max_tokens: the longest prompt of a method that runs it in one step.
    """

    method: Method = "mean"
    adapter: str | None = None
    prompt: str | None = None
    clean: bool | None = None
    start_layer: int | None = None
    exit_layer: int | None = None
    output_layer: int | None = None
    instructions: dict[str, str] = field(default_factory=lambda: dict(INSTRUCTIONS))
    instruction_template: str = INSTRUCTION_TEMPLATE
    normalize: bool = True
    weights: int = 256
    max_tokens: int = 2048

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise ValueError(
                f"embedding.method: found {self.method!r}, expected one of {', '.join(get_args(Method))}"
            )
        if self.prompt is not None and self.prompt not in TEMPLATES:
            Template.parse(self.prompt)
        if self.max_tokens < 16:
            raise ValueError(f"embedding.max_tokens: found {self.max_tokens}, expected at least 16")
        if "{instruction}" not in self.instruction_template:
            found = self.instruction_template
            raise ValueError(
                f"embedding.instruction_template: found {found!r}, expected {{instruction}} in it"
            )
        if self.weights < 1:
            raise ValueError(f"embedding.weights: found {self.weights}, expected at least 1")
        if self.output_layer is not None and self.method not in ("last", "prompt-eol", "token-prepending"):
            raise ValueError(f"embedding.output_layer: {self.method} pools the last layer, expected none")
        if self.adapter is not None and self.method not in TRAINED:
            raise ValueError(f"embedding.adapter: {self.method} has none, expected {', '.join(TRAINED)}")
        if self.adapter is None and self.method in ("gem", "causal2vec"):
            raise ValueError(
                f"embedding.adapter: found none, {self.method} expects a folder that "
                f"`galley embed train {self.method}` made"
            )
        for name in ("start_layer", "exit_layer"):
            layer = getattr(self, name)
            if layer is None:
                continue
            if self.method != "token-prepending":
                raise ValueError(f"embedding.{name}: only token-prepending has it, not {self.method}")
            if layer < 1:
                raise ValueError(f"embedding.{name}: found {layer}, expected at least 1")
        start, stop = self.start_layer, self.exit_layer
        if start is not None and stop is not None and stop <= start:
            raise ValueError(f"embedding.exit_layer: found {stop}, expected more than start_layer {start}")

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> EmbeddingOptions:
        """Read a JSON object; what it leaves open is taken from the adapter, if it names one.

        Raises:
            ValueError: an option is unknown or its value is, or the adapter cannot be read.
        """
        unknown = sorted(set(values) - {entry.name for entry in fields(cls)})
        if unknown:
            raise ValueError(f"embedding: unknown option {', '.join(unknown)}")
        if values.get("adapter") is not None:
            values = _with_adapter(values)
        return cls(**values)


def _with_adapter(values: dict[str, Any]) -> dict[str, Any]:
    settings = load_settings(Path(values["adapter"]))
    method = values.get("method", settings.method)
    if method != settings.method:
        raise ValueError(
            f"embedding.method: found {method}, expected {settings.method}, which {values['adapter']} is for"
        )
    given = {name: value for name, value in values.items() if value is not None}
    return {**settings.options, **given, "method": method}
