"""A trained way to embed: a folder with `galley_embedding.json` and `adapter.safetensors`.

The file of settings says everything that serving needs beside the model: the method with its options and
sizes, and the model it was trained for. A folder is written whole or not at all.

Tensors, float32 or bfloat16, with d the model's hidden size:

- `layers.{i}.{module}.A` [rank, inputs] and `.B` [outputs, rank]: LoRA adds x A^T B^T to a linear layer; its
  scale is in B. Modules are `self_attn.q_proj` and so on, as transformers names Llama's.
- gem: `special` [k, d], embeddings of the special tokens.
- causal2vec: `projection.0.weight` [h, e], `projection.0.bias`, `projection.2.weight` [d, h],
  `projection.2.bias`; the encoder is in the folder `encoder`, as transformers saves it.
- nv-embed: `latent_attention_model.*`, as in the public checkpoint.
"""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

from galley_plugins.models.store import replacing

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    import torch

SETTINGS, WEIGHTS, ENCODER = "galley_embedding.json", "adapter.safetensors", "encoder"
FORMAT = 1
METHODS = ("gem", "causal2vec", "nv-embed")


class AdapterError(ValueError):
    """A folder is not an adapter, or not one for this model."""


@dataclass(frozen=True)
class Base:
    """The model that an adapter belongs to; `tokenizer` is the hash of its vocabulary."""

    model_type: str
    hidden_size: int
    layers: int
    tokenizer: str

    @classmethod
    def of(cls, hf_config: Any, tokenizer: str) -> Base:
        return cls(hf_config.model_type, hf_config.hidden_size, hf_config.num_hidden_layers, tokenizer)


@dataclass(frozen=True)
class AdapterSettings:
    """What an adapter is.

    Attributes:
        method: gem, causal2vec or nv-embed.
        base: the model that it was trained for.
        version: of Galley.
        options: of `embedding:` in the configuration, such as the prompt; a configuration overrides them.
        sizes: numbers and choices that the method needs beside its tensors.
        training: how it came to be, for people: data, steps, seed, figures.
    """

    method: str
    base: Base
    version: str
    options: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)


def load_settings(folder: Path) -> AdapterSettings:
    """
    Raises:
        AdapterError: the folder is not an adapter, or one of another version of the format.
    """
    path = folder / SETTINGS
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise AdapterError(f"embedding.adapter: {path} cannot be read: {error.strerror}") from None
    except ValueError:
        raise AdapterError(f"embedding.adapter: {path} is not JSON") from None
    if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
        raise AdapterError(f"embedding.adapter: {path} is not of format {FORMAT}")
    try:
        settings = AdapterSettings(**{**values, "base": Base(**values["base"])})
    except (KeyError, TypeError) as error:
        expected = ", ".join(entry.name for entry in fields(AdapterSettings))
        raise AdapterError(f"embedding.adapter: {path}: {error}; expected {expected}") from None
    if settings.method not in METHODS:
        raise AdapterError(
            f"embedding.adapter: {path}: found the method {settings.method!r}, expected {', '.join(METHODS)}"
        )
    return settings


def check_adapter(folder: Path, model: str) -> None:
    """Compare an adapter with the model that is to use it, before anything is loaded.

    Args:
        model: a folder, or the id of one on the hub.

    Raises:
        AdapterError: it was trained for another model.
    """
    from transformers import AutoConfig

    from galley_plugins.speculation.store import tokenizer_hash

    config = AutoConfig.from_pretrained(model).get_text_config()
    _expect(folder, Base.of(config, tokenizer_hash(model)))


def _expect(folder: Path, base: Base) -> None:
    trained = load_settings(folder).base
    if trained != base:
        raise AdapterError(f"embedding.adapter: {folder} was trained for {trained}, the model here is {base}")


def load_tensors(folder: Path, base: Base) -> dict[str, torch.Tensor]:
    """The adapter's tensors, float32.

    Args:
        base: the model that is to use it.

    Raises:
        AdapterError: it was trained for another model, or its file is damaged.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    _expect(folder, base)
    try:
        tensors = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"embedding.adapter: {folder / WEIGHTS} cannot be read: {error}") from None
    return {name: tensor.to(torch.float32) for name, tensor in tensors.items()}


@contextmanager
def saving(folder: Path, settings: AdapterSettings, tensors: Mapping[str, torch.Tensor]) -> Iterator[Path]:
    """Write an adapter; what the block adds to the temporary folder it is given becomes part of it.

    An adapter that lies there is replaced.

    Raises:
        AdapterError: the folder holds something else.
    """
    from safetensors.torch import save_file

    if folder.exists() and not (folder / SETTINGS).is_file() and any(folder.iterdir()):
        raise AdapterError(f"{folder}: found other files, expected an adapter to replace, or nothing")
    with replacing(folder) as temporary:
        yield temporary
        save_file({name: row.detach().contiguous() for name, row in tensors.items()}, temporary / WEIGHTS)
        text = json.dumps({"format": FORMAT, **asdict(settings)}, indent=1)
        (temporary / SETTINGS).write_text(text + "\n", encoding="utf-8")


def save_adapter(folder: Path, settings: AdapterSettings, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write an adapter that is nothing but settings and tensors."""
    with saving(folder, settings, tensors):
        pass
