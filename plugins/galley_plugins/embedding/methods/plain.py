"""Pooling without training: mean, last token, PromptEOL (arXiv 2307.16645), Echo (arXiv 2402.15449)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from galley_plugins.embedding.methods.method import Method, resolve_layer
from galley_plugins.embedding.pooling import MeanPool, Pool, PromptRows, RowsPool
from galley_plugins.embedding.templates import Template

if TYPE_CHECKING:
    from galley_plugins.embedding.options import EmbeddingOptions


def last_row(prompt: PromptRows) -> Pool:
    return RowsPool((prompt.length - 1,))


def mean(options: EmbeddingOptions, hf_config: Any) -> Method:
    """The mean over the text's rows; an instruction before it is not counted."""
    return Method(template_of(options, "plain"), MeanPool)


def last(options: EmbeddingOptions, hf_config: Any) -> Method:
    """The last token's row."""
    return _last_row_of(options, hf_config, "plain")


def prompt_eol(options: EmbeddingOptions, hf_config: Any) -> Method:
    """The row from which a prompt lets the model say the text in one word."""
    return _last_row_of(options, hf_config, "prompt-eol")


def echo(options: EmbeddingOptions, hf_config: Any) -> Method:
    """The mean over the second copy of a text that is said twice: there, each token sees the whole text."""
    template = template_of(options, "echo")
    if template.copies < 2:
        raise ValueError(
            f"embedding.prompt: found {options.prompt!r}, expected {{text}} twice in it for echo"
        )
    return Method(template, MeanPool)


def template_of(options: EmbeddingOptions, own: str) -> Template:
    """The template without the placeholder, which only token-prepending has."""
    return Template.named(options.prompt or own, clean=options.clean).without_placeholder()


def _last_row_of(options: EmbeddingOptions, hf_config: Any, own: str) -> Method:
    layer = resolve_layer(options.output_layer, hf_config)
    return Method(template_of(options, own), last_row, every_row=False, layer=layer)
