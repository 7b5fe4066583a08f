"""The ways to embed that are trained; an adapter's folder holds what they add to the model.

- gem (GEM, arXiv 2506.04344): special tokens after the text, which alone LoRA changes. Text rows are the
  model's own, so chats and embeddings read each other's cached prefixes. Special tokens do not see each
  other: each stands at the end of a prompt of its own, whose text the prefix cache holds.
- causal2vec (arXiv 2507.23386): an encoder's contextual token before the text, the end-of-text token after
  it; their last hidden states side by side.
- nv-embed (arXiv 2405.17428): no causal mask, latent attention over every token, mean.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from galley_plugins.embedding.adapter import AdapterSettings, load_settings
from galley_plugins.embedding.methods.method import Method
from galley_plugins.embedding.methods.plain import last_row, template_of
from galley_plugins.embedding.nv_embed_config import MODEL_TYPE
from galley_plugins.embedding.pooling import MeanPool, Pool, PromptRows, RowsPool

if TYPE_CHECKING:
    from galley_plugins.embedding.options import EmbeddingOptions


def gem(options: EmbeddingOptions, hf_config: Any) -> Method:
    """The last hidden states of special tokens, averaged or side by side."""
    folder, settings = _adapter(options)
    return Method(
        template_of(options, "plain"),
        last_row,
        every_row=False,
        uncached_tail=1,
        adapter=folder,
        lora="last",
        specials=settings.sizes["tokens"],
        combine=settings.sizes["combine"],
    )


def causal2vec(options: EmbeddingOptions, hf_config: Any) -> Method:
    """The last hidden states of the contextual token and of the end-of-text token, side by side."""
    folder, settings = _adapter(options)
    return Method(
        template_of(options, "plain"),
        partial(_first_and_last, unit=settings.sizes.get("parts") == "unit"),
        own_cache=True,
        adapter=folder,
        lora="all",
        context=True,
        eos=True,
    )


def nv_embed(options: EmbeddingOptions, hf_config: Any) -> Method:
    """The mean over what latent attention makes of the text's rows and the end-of-text token's."""
    folder = None
    if hf_config.model_type != MODEL_TYPE:
        folder, _ = _adapter(options)
    return Method(
        template_of(options, "plain"),
        _after_instruction,
        whole_prompt=True,
        own_cache=True,
        bidirectional=True,
        adapter=folder,
        lora="none" if folder is None else "all",
        eos=True,
        head="latent-attention",
    )


def _adapter(options: EmbeddingOptions) -> tuple[Path, AdapterSettings]:
    if options.adapter is None:
        raise ValueError(
            f"embedding.adapter: found none, {options.method} expects a folder that "
            f"`galley embed train {options.method}` made"
        )
    folder = Path(options.adapter)
    return folder, load_settings(folder)


def _first_and_last(prompt: PromptRows, *, unit: bool) -> Pool:
    return RowsPool((0, prompt.length - 1), unit=unit)


def _after_instruction(prompt: PromptRows, head: Any = None) -> Pool:
    """The mean over everything from the text's first token on."""
    return MeanPool(PromptRows(prompt.length, prompt.start, prompt.length), head)
