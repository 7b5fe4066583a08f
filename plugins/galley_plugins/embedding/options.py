"""What `embedding:` of the configuration may say; read in each process of the engine."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from galley_plugins.embedding.templates import TEMPLATES, Template

Method = Literal["mean", "last", "prompt-eol", "token-prepending", "echo"]

WHOLE_PROMPT = {"token-prepending"}  # methods whose prompts run in one step

# What `input_type` of a request stands for where the configuration says nothing else.
INSTRUCTIONS = {"query": "", "document": ""}
INSTRUCTION_TEMPLATE = "Instruct: {instruction}\nQuery: "


@dataclass(frozen=True)
class EmbeddingOptions:
    """How texts become vectors.

    Attributes:
        method: see the modules of `galley_plugins.embedding.methods`.
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
        max_tokens: the longest prompt of a method that runs it in one step.
    """

    method: Method = "mean"
    prompt: str | None = None
    clean: bool | None = None
    start_layer: int | None = None
    exit_layer: int | None = None
    output_layer: int | None = None
    instructions: dict[str, str] = field(default_factory=lambda: dict(INSTRUCTIONS))
    instruction_template: str = INSTRUCTION_TEMPLATE
    normalize: bool = True
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
        if self.output_layer is not None and self.method in ("mean", "echo"):
            raise ValueError(f"embedding.output_layer: {self.method} pools the last layer, expected none")
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
        """Read a JSON object.

        Raises:
            ValueError: an option is unknown or its value is.
        """
        unknown = sorted(set(values) - {entry.name for entry in fields(cls)})
        if unknown:
            raise ValueError(f"embedding: unknown option {', '.join(unknown)}")
        return cls(**values)
