"""Token Prepending (arXiv 2412.11556): in early layers, what the last token has understood of a text is put
before the text, where each of its tokens can see it.

A placeholder stands in the prompt before the text. Before each of a few layers its hidden state is replaced
by the last token's; nothing is trained. Only rows of embedding requests are touched. Such a prompt has to
pass through the model in one step, since its first tokens depend on its last one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from galley_plugins.embedding.methods.method import Method, resolve_layer
from galley_plugins.embedding.methods.plain import last_row
from galley_plugins.embedding.templates import PLACEHOLDER, Template

if TYPE_CHECKING:
    from galley_plugins.embedding.options import EmbeddingOptions

START_LAYER = 1


class Family(NamedTuple):
    """What a family of models does best with.

    Attributes:
        exit_layer: the first layer without copying.
        output_layer: whose hidden states are the vector, numbered as transformers does.
        prompt: a template's name.
    """

    exit_layer: int
    output_layer: int
    prompt: str = "prompt-eol"


# By (model_type, vocabulary), which tells models apart that share a type. The authors' choices for the models
# they tried; SmolLM2's on pairs of all of STS-B's development set (`galley embed tune-tp`): copying costs
# PromptEOL's prompt more than Knowledge's there.
FAMILIES: dict[tuple[str, int], Family] = {
    ("llama", 32_000): Family(7, 27),  # Llama 2, 32 layers
    ("llama", 128_256): Family(3, -2),  # Llama 3
    ("qwen2", 152_064): Family(6, -2),
    ("gemma2", 256_000): Family(6, -2),
    ("llama", 49_152): Family(5, -3, "knowledge"),  # SmolLM2
}


def family_of(hf_config: Any) -> Family:
    """A model's family, or else layers after its depth."""
    known = FAMILIES.get((hf_config.model_type, hf_config.vocab_size))
    if (
        known is not None
        and -hf_config.num_hidden_layers <= known.output_layer <= hf_config.num_hidden_layers
    ):
        return known
    return Family(max(START_LAYER + 1, round(0.2 * hf_config.num_hidden_layers)), -2)


def token_prepending(options: EmbeddingOptions, hf_config: Any) -> Method:
    family = family_of(hf_config)
    template = Template.named(options.prompt or family.prompt, clean=options.clean)
    if PLACEHOLDER not in template.pieces:
        raise ValueError(
            f"embedding.prompt: found {options.prompt!r}, expected {PLACEHOLDER} before {{text}} in it"
        )
    start = options.start_layer or START_LAYER
    stop = options.exit_layer or max(family.exit_layer, start + 1)
    if stop > hf_config.num_hidden_layers:
        raise ValueError(
            f"embedding.exit_layer: found {stop}, expected at most {hf_config.num_hidden_layers}, all layers"
        )
    output = family.output_layer if options.output_layer is None else options.output_layer
    return Method(
        template,
        last_row,
        every_row=False,
        whole_prompt=True,
        own_cache=True,
        layer=resolve_layer(output, hf_config),
        copy_layers=range(start, stop),
    )
