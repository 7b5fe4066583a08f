"""A Llama model from one GGUF file to a Hugging Face checkpoint folder in bf16.

Covers what the built-in models are: Llama without rope scaling, with a byte-level BPE tokenizer and a chat
template. Anything else is refused rather than converted in part.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from galley_plugins.models.errors import ConversionError
from galley_plugins.models.gguf_file import GgufFile
from galley_plugins.models.tokenizer import special_token_ids, write_tokenizer
from galley_plugins.models.weights import LlamaShape, write_weights

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def convert(gguf: Path, folder: Path, progress: Callable[[int, int], None] | None = None) -> None:
    """Fills the empty `folder` with config, generation config, tokenizer and weights of `gguf`.

    `progress` is called with (done_bytes, total_bytes) of the weights.

    Raises:
        ConversionError: the file is not a GGUF, or has something that this conversion does not know.
    """
    source = GgufFile(gguf)
    _check_kind(source)
    shape = _shape(source)
    config = _config(source, shape)
    write_tokenizer(source, folder, config["max_position_embeddings"])
    _write(folder / "config.json", config)
    _write(folder / "generation_config.json", special_token_ids(source))
    write_weights(source, shape, folder / "model.safetensors", progress)


def _check_kind(source: GgufFile) -> None:
    for key, expected in (("general.architecture", "llama"), ("llama.rope.scaling.type", "none")):
        found = source.get(key, str, "none")
        if found != expected:
            raise ConversionError(f"{source.path}: {key} is {found!r}, expected {expected!r}")


def _shape(source: GgufFile) -> LlamaShape:
    heads = source.get("llama.attention.head_count", int)
    shape = LlamaShape(
        layers=source.get("llama.block_count", int),
        hidden=source.get("llama.embedding_length", int),
        feed_forward=source.get("llama.feed_forward_length", int),
        heads=heads,
        kv_heads=source.get("llama.attention.head_count_kv", int, heads),
        vocab=len(source.get("tokenizer.ggml.tokens", list)),
        tied="output.weight" not in source.tensors,
    )
    rotated = source.get("llama.rope.dimension_count", int, shape.head_dim)
    if rotated != shape.head_dim:
        raise ConversionError(
            f"{source.path}: llama.rope.dimension_count is {rotated}, expected the head size {shape.head_dim}"
        )
    return shape


def _config(source: GgufFile, shape: LlamaShape) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "dtype": "bfloat16",
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.feed_forward,
        "max_position_embeddings": source.get("llama.context_length", int),
        "mlp_bias": False,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": source.get("llama.attention.layer_norm_rms_epsilon", float),
        "rope_parameters": {
            "rope_theta": source.get("llama.rope.freq_base", float, 10000.0),
            "rope_type": "default",
        },
        "tie_word_embeddings": shape.tied,
        "vocab_size": shape.vocab,
        **special_token_ids(source),
    }


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
