"""Checkpoints beside one another: the perplexity of a text, and what a weight takes.

A checkpoint that Galley quantized is read as the numbers that its codes stand for, so that only the weights
differ: all run in transformers, in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from galley_kernels import PackedMatrix
from galley_plugins.quantization.layout import read_quantized
from galley_plugins.quantization.matrix import total_bits
from galley_plugins.quantization.options import QuantizationOptions
from galley_plugins.quantization.perplexity import perplexity, windows
from galley_plugins.quantization.plan import SUFFIX, Plan
from galley_plugins.quantization.source import CheckpointError, Source

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path


@dataclass(frozen=True)
class Loaded:
    """
    Attributes:
        model: of transformers, float32, on the GPU where there is one.
        bits_per_weight: of the matrices that `galley quantize` takes by default, and of those packed.
    """

    model: Any
    bits_per_weight: float


@dataclass(frozen=True)
class Compared:
    """One checkpoint; the ratio is of its perplexity to the first one's."""

    name: str
    bits_per_weight: float
    perplexity: float
    ratio: float


def load(folder: Path) -> Loaded:
    """A checkpoint, plain or as `galley quantize` writes it.

    Raises:
        CheckpointError: it is neither, or damaged, or lacks a weight of its model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    takes = Plan(QuantizationOptions()).options_of
    state: dict[str, torch.Tensor] = {}
    bits = weights = 0
    for name, found in _contents(folder):
        if isinstance(found, PackedMatrix):
            state[name + SUFFIX] = found.dequantize()
            bits += packed_bits(found)
            weights += state[name + SUFFIX].numel()
            continue
        state[name] = found
        if name.endswith(SUFFIX) and found.dim() == 2 and takes(name.removesuffix(SUFFIX)) is not None:
            bits += 8 * found.nbytes
            weights += found.numel()
    if not weights:
        raise CheckpointError(f"{folder}: found no matrices, expected those of a decoder")
    try:
        config = AutoConfig.from_pretrained(folder)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with torch.device("meta"):
            kind = type(AutoModelForCausalLM.from_config(config))
        model, loading = kind.from_pretrained(
            None, config=config, state_dict=state, dtype=torch.float32, output_loading_info=True
        )
    except (ValueError, RuntimeError, OSError) as error:
        raise CheckpointError(f"{folder}: {error}") from error
    if missing := sorted(loading["missing_keys"]):
        raise CheckpointError(f"{folder} lacks {missing[0]}, expected all weights of {kind.__name__}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Loaded(model.eval().to(device), bits / weights)


def packed_bits(matrix: PackedMatrix) -> int:
    apart = None if matrix.outliers is None else len(matrix.outliers.values)
    return total_bits(matrix.shape, matrix.bits, matrix.scales, apart)


def token_ids(folder: Path, text: str) -> list[int]:
    """
    Raises:
        CheckpointError: the folder has no tokenizer.
    """
    from transformers import AutoTokenizer

    try:
        ids: list[int] = AutoTokenizer.from_pretrained(folder)(text, verbose=False)["input_ids"]
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}: no tokenizer can be read: {error}") from error
    return ids


def compare(
    text: str,
    models: Sequence[tuple[str, Path]],
    *,
    context: int,
    count: int | None,
    started: Callable[[str, int], None] | None = None,
    advance: Callable[[], None] | None = None,
) -> Iterator[Compared]:
    """The perplexity of the text under each checkpoint, one after the other.

    Args:
        models: names and folders.
        context: tokens of a window.
        count: of windows; None is all that the text fills.
        started: told of each checkpoint and how many windows it will be given.
        advance: told of each window that is done.

    Raises:
        CheckpointError: as `load`; or a checkpoint splits the text otherwise than the first one does.
        ValueError: the text is too short, or a window too long for a model.
    """
    first: Compared | None = None
    expected: list[int] = []
    for name, folder in models:
        ids = token_ids(folder, text)
        if not expected:
            expected = ids
        elif ids != expected:
            raise CheckpointError(
                f"{name}: found other tokens of the text than under {models[0][0]}, expected the same "
                "tokenizer"
            )
        texts = windows(ids, count, context)
        if started is not None:
            started(name, len(texts))
        loaded = load(folder)
        longest = getattr(loaded.model.config, "max_position_embeddings", context)
        if context > longest:
            raise ValueError(f"context: found {context}, expected at most {longest}, which {name} takes")
        value = perplexity(loaded.model, texts, advance)
        row = Compared(name, loaded.bits_per_weight, value, value / first.perplexity if first else 1.0)
        first = first or row
        del loaded  # before the next one is read
        yield row


def _contents(folder: Path) -> Iterator[tuple[str, PackedMatrix | torch.Tensor]]:
    """Packed matrices by module, other tensors by name."""
    with Source(folder) as source:
        if "quantization_config" not in source.config:
            for name in source.names:
                yield name, source.tensor(name)
            return
    yield from read_quantized(folder)
