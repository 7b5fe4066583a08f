"""What a way to embed asks of the engine, apart from the runner that carries it out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from galley_plugins.embedding.pooling import Pool
    from galley_plugins.embedding.templates import Template


@dataclass(frozen=True)
class Method:
    """One way to embed.

    Attributes:
        template: the prompt around a text.
        make_pool: how rows become a vector; called with a `PromptRows`, and with `head` where there is one.
        every_row: the pool needs all rows of the prompt, so none can be read from the prefix cache.
        whole_prompt: all of the prompt runs in one step.
        own_cache: its keys and values are not those of the same tokens in a chat: nobody else may read them.
        uncached_tail: this many of its last tokens have keys and values of their own.
        bidirectional: every token sees all of the prompt.
        adapter: the folder of what was trained.
        lora: rows that the adapter's LoRA changes: of the prompt all, the last, or none.
        specials: special tokens; each stands at the end of a prompt of its own.
        combine: what becomes of the vectors of several special tokens.
        context: a contextual token stands before the text.
        eos: the end-of-text token stands last.
        head: what rows go through before they are pooled.
        sparse: the most weights of a vector that is sparse.
        layer: number of the layer before which rows are read; None for the last, normalised hidden states.
            Only the prompt's last row is read then.
        copy_layers: layers before which the last row replaces the placeholder's.
    """

    template: Template
    make_pool: Callable[..., Pool]
    every_row: bool = True
    whole_prompt: bool = False
    own_cache: bool = False
    uncached_tail: int = 0
    bidirectional: bool = False
    adapter: Path | None = None
    lora: Literal["none", "last", "all"] = "none"
    specials: int = 0
    combine: Literal["mean", "concat"] = "mean"
    context: bool = False
    eos: bool = False
    head: Literal["none", "latent-attention", "splade"] = "none"
    sparse: int | None = None
    layer: int | None = None
    copy_layers: range = range(0)

    @property
    def touches_layers(self) -> bool:
        """Rows are read or written inside the model, by hooks."""
        inputs = self.adapter is not None or self.context
        return self.layer is not None or bool(self.copy_layers) or inputs


def resolve_layer(layer: int | None, hf_config: Any) -> int | None:
    """A layer counted as transformers counts hidden states, as `Method.layer`.

    Raises:
        ValueError: the model has no such layer.
    """
    if layer is None:
        return None
    count = hf_config.num_hidden_layers
    found = layer if layer >= 0 else count + 1 + layer
    if not 0 <= found <= count:
        raise ValueError(
            f"embedding.output_layer: found {layer}, expected {-count - 1} to {count} for {count} layers"
        )
    return None if found == count else found
