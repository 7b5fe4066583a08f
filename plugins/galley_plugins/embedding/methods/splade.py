"""Echo with a SPLADE head (Echo-Mistral-SPLADE, arXiv 2408.11119): sparse weights of the vocabulary.

The text is said twice, so that each token of the second copy sees all of it. Token j weighs
w_j = max_i log(1 + relu(logit_ij)) over the rows i of that copy. A model that was not trained for it gives
most tokens some weight: `embedding.weights` keeps the largest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from galley_plugins.embedding.methods.method import Method
from galley_plugins.embedding.methods.plain import echo
from galley_plugins.embedding.pooling import MaxPool

if TYPE_CHECKING:
    from galley_plugins.embedding.options import EmbeddingOptions


def splade(options: EmbeddingOptions, hf_config: Any) -> Method:
    template = echo(options, hf_config).template
    return Method(template, MaxPool, head="splade", sparse=options.weights)
