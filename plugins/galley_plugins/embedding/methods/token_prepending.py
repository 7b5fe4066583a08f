"""Token Prepending (arXiv 2412.11556): in early layers, what the last token has understood of a text is put
before the text, where each of its tokens can see it.

A placeholder stands in the prompt before the text. Before each of a few layers its hidden state is replaced
by the last token's; nothing is trained. Only rows of embedding requests are touched. Such a prompt has to
pass through the model in one step, since its first tokens depend on its last one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from galley_plugins.embedding.methods.method import Method, resolve_layer
from galley_plugins.embedding.methods.plain import last_row
from galley_plugins.embedding.templates import PLACEHOLDER, Template

if TYPE_CHECKING:
    from galley_plugins.embedding.options import EmbeddingOptions

START_LAYER = 1

# (model_type, vocabulary) -> exit layer, output layer. The authors' choices for the models they tried, which
# are told apart by their vocabularies; SmolLM2's by `galley embed tune-tp` on STS-B's development pairs.
FAMILIES: dict[tuple[str, int], tuple[int, int]] = {
    ("llama", 32_000): (7, 27),  # Llama 2, 32 layers
    ("llama", 128_256): (3, -2),  # Llama 3
    ("qwen2", 152_064): (6, -2),
    ("gemma2", 256_000): (6, -2),
    ("llama", 49_152): (5, -3),  # SmolLM2
}


def family_layers(hf_config: Any) -> tuple[int, int]:
    """Exit and output layer for a model, after its family or else its depth."""
    known = FAMILIES.get((hf_config.model_type, hf_config.vocab_size))
    if known is not None and -hf_config.num_hidden_layers <= known[1] <= hf_config.num_hidden_layers:
        return known
    return max(START_LAYER + 1, round(0.2 * hf_config.num_hidden_layers)), -2


def token_prepending(options: EmbeddingOptions, hf_config: Any) -> Method:
    template = Template.named(options.prompt or "prompt-eol", clean=options.clean)
    if PLACEHOLDER not in template.pieces:
        raise ValueError(
            f"embedding.prompt: found {options.prompt!r}, expected {PLACEHOLDER} before {{text}} in it"
        )
    family_exit, family_output = family_layers(hf_config)
    start = options.start_layer or START_LAYER
    stop = options.exit_layer or max(family_exit, start + 1)
    if stop > hf_config.num_hidden_layers:
        raise ValueError(
            f"embedding.exit_layer: found {stop}, expected at most {hf_config.num_hidden_layers}, all layers"
        )
    output = family_output if options.output_layer is None else options.output_layer
    return Method(
        template,
        last_row,
        every_row=False,
        whole_prompt=True,
        own_cache=True,
        layer=resolve_layer(output, hf_config),
        copy_layers=range(start, stop),
    )
