"""Adapters with random weights for the built-in model, large enough that every tensor shows in the vectors."""

from __future__ import annotations

import functools
import string
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, BertConfig, BertModel, BertTokenizerFast

from galley_plugins.embedding.adapter import ENCODER, AdapterSettings, Base, saving
from galley_plugins.embedding.context_encoder import ContextEncoder
from galley_plugins.embedding.latent_attention import PREFIX, LatentAttention
from galley_plugins.models import resolve
from galley_plugins.speculation.store import tokenizer_hash
from loadtest.servers import MODEL

if TYPE_CHECKING:
    from pathlib import Path

RANK = 4


@functools.cache
def base() -> tuple[Any, Base]:
    folder = resolve(MODEL)
    config = AutoConfig.from_pretrained(folder)
    return config, Base.of(config, tokenizer_hash(str(folder)))


def random_adapter(folder: Path, method: str, **sizes: Any) -> dict[str, torch.Tensor]:
    """Write an adapter; gives its tensors."""
    config, model = base()
    torch.manual_seed(7)
    tensors = random_lora(config)
    size = config.hidden_size
    if method == "gem":
        sizes = {"tokens": 1, "combine": "mean", **sizes}
        tensors["special"] = 0.1 * torch.randn(sizes["tokens"], size)
    elif method == "nv-embed":
        sizes = {"heads": 2, **sizes}
        head = LatentAttention(size, latents=16, heads=sizes["heads"], head_size=32)
        tensors |= {PREFIX + name: tensor for name, tensor in head.state_dict().items()}
    settings = AdapterSettings(method, model, "0", sizes=sizes)
    if method != "causal2vec":
        with saving(folder, settings, tensors):
            return tensors
    encoder = small_bert()
    own = ContextEncoder(encoder, size)
    tensors |= {f"projection.{name}": 0.3 * tensor for name, tensor in own.projection.state_dict().items()}
    with saving(folder, settings, tensors) as temporary:
        encoder.save_pretrained(temporary / ENCODER)
        _character_tokenizer(temporary / ENCODER)
    return tensors


def random_lora(config: Any) -> dict[str, torch.Tensor]:
    size, inner = config.hidden_size, config.intermediate_size
    keys = config.num_key_value_heads * size // config.num_attention_heads
    shapes = {
        "self_attn.q_proj": (size, size),
        "self_attn.k_proj": (size, keys),
        "self_attn.v_proj": (size, keys),
        "self_attn.o_proj": (size, size),
        "mlp.gate_proj": (size, inner),
        "mlp.up_proj": (size, inner),
        "mlp.down_proj": (inner, size),
    }
    tensors = {}
    for layer in range(config.num_hidden_layers):
        for module, (inputs, outputs) in shapes.items():
            tensors[f"layers.{layer}.{module}.A"] = torch.randn(RANK, inputs) / inputs**0.5
            tensors[f"layers.{layer}.{module}.B"] = 0.05 * torch.randn(outputs, RANK)
    return tensors


def small_bert() -> Any:
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    return BertModel(config, add_pooling_layer=False).eval()


def _character_tokenizer(folder: Path) -> None:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    characters = string.ascii_lowercase
    words = [*special, *characters, *("##" + character for character in characters)]
    BertTokenizerFast(vocab={word: place for place, word in enumerate(words)}).save_pretrained(folder)
