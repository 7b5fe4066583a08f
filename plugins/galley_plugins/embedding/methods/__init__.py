"""The ways to embed: one file each, and their registry."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from galley_plugins.embedding.methods import plain, splade, token_prepending, trained

if TYPE_CHECKING:
    from collections.abc import Callable

    from galley_plugins.embedding.methods.method import Method
    from galley_plugins.embedding.options import EmbeddingOptions

METHODS: dict[str, Callable[[EmbeddingOptions, Any], Method]] = {
    "mean": plain.mean,
    "last": plain.last,
    "prompt-eol": plain.prompt_eol,
    "echo": plain.echo,
    "token-prepending": token_prepending.token_prepending,
    "splade": splade.splade,
    "gem": trained.gem,
    "causal2vec": trained.causal2vec,
    "nv-embed": trained.nv_embed,
}


def make_method(options: EmbeddingOptions, hf_config: Any) -> Method:
    """What `options` ask for, for a model of this configuration.

    Raises:
        ValueError: a layer is not one of the model's, or the method lacks its adapter.
    """
    return METHODS[options.method](options, hf_config)
