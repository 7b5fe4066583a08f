"""Llama weights from GGUF to a bf16 safetensors file, a block of rows at a time.

Sources: github.com/ggml-org/llama.cpp, convert_hf_to_gguf.py (tensor names, order of the rows of q and k) and
github.com/huggingface/safetensors (file format).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import gguf
import numpy as np

from galley_plugins.models.errors import ConversionError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from typing import Any

    from numpy.typing import NDArray

    from galley_plugins.models.gguf_file import GgufFile

BLOCK_ROWS = 4096
"""Rows held in float32 at once: 9 MB at a hidden size of 576, where the whole embedding takes 113 MB."""

BF16_BYTES = 2


@dataclass(frozen=True)
class LlamaShape:
    """The sizes that fix which tensors a Llama checkpoint has."""

    layers: int
    hidden: int
    feed_forward: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool  # the output layer is the embedding

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


@dataclass(frozen=True)
class Tensor:
    """One tensor of the checkpoint and where it comes from."""

    source: str
    target: str
    shape: tuple[int, ...]
    heads: int | None = None  # of a q or k projection, whose rows llama.cpp permutes

    @property
    def size(self) -> int:
        """Bytes in bf16."""
        return math.prod(self.shape) * BF16_BYTES


def write_weights(
    source: GgufFile, shape: LlamaShape, path: Path, progress: Callable[[int, int], None] | None = None
) -> None:
    """Writes every tensor of `source`, dequantized and rounded to bf16, as one safetensors file.

    Raises:
        ConversionError: a tensor is missing, unknown, of another shape, or holds a value that is not finite.
    """
    tensors = list(_tensors(shape))
    _check(source, tensors)
    total = sum(tensor.size for tensor in tensors)
    done = 0
    with path.open("wb") as file:
        file.write(_header(tensors))
        for tensor in tensors:
            for block in _blocks(source.tensors[tensor.source], tensor):
                done += file.write(block)
                if progress is not None:
                    progress(done, total)


def _tensors(shape: LlamaShape) -> Iterator[Tensor]:
    hidden, wide = shape.hidden, shape.feed_forward
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    yield Tensor("token_embd.weight", "model.embed_tokens.weight", (shape.vocab, hidden))
    for layer in range(shape.layers):
        old, new = f"blk.{layer}.", f"model.layers.{layer}."
        yield Tensor(f"{old}attn_norm.weight", f"{new}input_layernorm.weight", (hidden,))
        yield Tensor(f"{old}attn_q.weight", f"{new}self_attn.q_proj.weight", (q, hidden), shape.heads)
        yield Tensor(f"{old}attn_k.weight", f"{new}self_attn.k_proj.weight", (kv, hidden), shape.kv_heads)
        yield Tensor(f"{old}attn_v.weight", f"{new}self_attn.v_proj.weight", (kv, hidden))
        yield Tensor(f"{old}attn_output.weight", f"{new}self_attn.o_proj.weight", (hidden, q))
        yield Tensor(f"{old}ffn_norm.weight", f"{new}post_attention_layernorm.weight", (hidden,))
        yield Tensor(f"{old}ffn_gate.weight", f"{new}mlp.gate_proj.weight", (wide, hidden))
        yield Tensor(f"{old}ffn_up.weight", f"{new}mlp.up_proj.weight", (wide, hidden))
        yield Tensor(f"{old}ffn_down.weight", f"{new}mlp.down_proj.weight", (hidden, wide))
    yield Tensor("output_norm.weight", "model.norm.weight", (hidden,))
    if not shape.tied:
        yield Tensor("output.weight", "lm_head.weight", (shape.vocab, hidden))


def _check(source: GgufFile, tensors: list[Tensor]) -> None:
    expected = {tensor.source: tensor.shape for tensor in tensors}
    # GGUF counts dimensions from the innermost one
    found = {name: tuple(map(int, reversed(tensor.shape))) for name, tensor in source.tensors.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise ConversionError(
                f"{source.path}: tensor {name} has shape {found.get(name)}, expected {expected.get(name)}"
            )


def _header(tensors: list[Tensor]) -> bytes:
    """The head of a safetensors file: the length of a JSON object, then the object, padded to 8 bytes."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.size
        entries[tensor.target] = {"dtype": "BF16", "shape": tensor.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _blocks(source: Any, tensor: Tensor) -> Iterator[bytes]:
    """The tensor's rows in bf16; no quantization block crosses a row, so rows are moved while quantized."""
    rows: NDArray[Any] = source.data  # [rows, bytes or values of a row]
    if tensor.heads is not None:
        rows = unpermute(rows, tensor.heads)
    for start in range(0, len(rows), BLOCK_ROWS):
        values = gguf.dequantize(rows[start : start + BLOCK_ROWS], source.tensor_type)
        if not np.isfinite(values).all():
            raise ConversionError(f"tensor {tensor.source} holds a value that is not finite")
        yield to_bf16(values).tobytes()


def unpermute(rows: NDArray[Any], heads: int) -> NDArray[Any]:
    """Undoes llama.cpp's order of the rows of q and k, where the two halves of each head alternate.

    llama.cpp rotates neighbouring pairs of rows, Hugging Face's Llama row i with row i + head_dim / 2.
    """
    width = rows.shape[-1]
    pairs = rows.reshape(heads, -1, 2, width)  # [heads, head_dim / 2, half, width]
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The bits of bf16, rounded to nearest even; `values` are finite."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded: NDArray[np.uint32] = bits + 0x7FFF + ((bits >> 16) & 1)
    return (rounded >> 16).astype(np.uint16)
