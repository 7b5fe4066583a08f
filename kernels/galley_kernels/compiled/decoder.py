"""Decoder layers of integer maps, each in one call from its attention to the next layer's (decoder.cpp).

Of Llama's kind: root-mean-square norms before attention and before a gated SiLU, rotary positions over the
first dimensions of a head, a dimension paired with the one half of them behind it.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from galley_kernels.compiled.interleaved import TYPES, library
from galley_kernels.compiled.linear import CompiledLinear, Linear

if TYPE_CHECKING:
    from collections.abc import Sequence

TOKENS, WIDEST = 32, 512  # of a cache's keys: tokens side by side; of a head, where attention is computed


@dataclass(frozen=True, slots=True, eq=False)
class DecoderLayer:
    """
    Attributes:
        input_norm, attention_norm: floating [hidden].
        qkv: to queries, keys and values of all heads.
        output: of attention.
        gate_up: to gates, then to what they gate.
    """

    input_norm: torch.Tensor
    attention_norm: torch.Tensor
    qkv: CompiledLinear
    output: CompiledLinear
    gate_up: CompiledLinear
    down: CompiledLinear


class _Layer(ctypes.Structure):
    _fields_ = [
        ("input_norm", ctypes.c_void_p),
        ("attention_norm", ctypes.c_void_p),
        *((name, Linear) for name in ("qkv", "output", "gate_up", "down")),
        ("kept", ctypes.c_void_p),
    ]


class _Decoder(ctypes.Structure):
    _fields_ = [
        ("final_norm", ctypes.c_void_p),
        ("rotations", ctypes.c_void_p),
        *(
            (name, ctypes.c_int64)
            for name in ("hidden", "intermediate", "query_heads", "key_heads", "head", "rotary")
        ),
        ("epsilon", ctypes.c_double),
        ("threads", ctypes.c_int32),
        ("is_float", ctypes.c_int32),
    ]


class _Step(ctypes.Structure):
    _fields_ = [
        ("rows", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("positions", "residual", "qkv", "attention", "result")),
    ]


class _Attention(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("caches", "starts", "lengths", "tables", "slots")),
        *((name, ctypes.c_void_p) for name in ("again", "others")),
        *((name, ctypes.c_int64) for name in ("repeats", "requests", "table", "block")),
        *((name, ctypes.c_int64) for name in ("block_stride", "head_stride")),
        ("scale", ctypes.c_double),
    ]


class PagedCache:
    """vLLM's caches of a CPU, one for each layer, of the same shape.

    Args:
        caches: of the decoder's type, [blocks, key heads, block size, 2 * head]: of a block and head the
            keys, [head, block size], then the values, [block size, head].
        scale: of scores.

    Raises:
        ValueError: a cache is shaped or strided otherwise.
    """

    def __init__(self, caches: Sequence[torch.Tensor], head: int, scale: float) -> None:
        first = caches[0]
        for cache in caches:
            if (
                cache.shape != first.shape
                or cache.stride() != first.stride()
                or cache.dtype != first.dtype
                or cache.shape[2] % TOKENS
                or cache.shape[3] != 2 * head
                or cache.stride()[2:] != (2 * head, 1)
            ):
                raise ValueError(
                    f"found a cache {list(cache.shape)} strided {cache.stride()}, which does not fit"
                )
        self.dtype = first.dtype
        self.key_heads, self.block = first.shape[1], first.shape[2]
        self.strides = first.stride()[:2]
        self.scale = scale
        self._caches = caches
        self.addresses = (ctypes.c_void_p * len(caches))(*(cache.data_ptr() for cache in caches))


@dataclass(frozen=True, slots=True, eq=False)
class Requests:
    """Whose rows a step's are. A branch of a draft is a request of its own here.

    Attributes:
        starts: int32 [requests + 1]: where each request's rows start.
        lengths: int32 [requests]: its tokens, those of this step included.
        tables: int32 [requests, blocks]: its blocks of the cache.
        slots: int64 [rows]: where each row's key and value go.
        again: int64 [repeats] each: rows, and to which slots their keys and values go too; None for none.
    """

    starts: torch.Tensor
    lengths: torch.Tensor
    tables: torch.Tensor
    slots: torch.Tensor
    again: tuple[torch.Tensor, torch.Tensor] | None = None

    def fits(self) -> bool:
        """Whether types and strides are what the code reads."""
        return (
            all(each.dtype == torch.int32 for each in (self.starts, self.lengths, self.tables))
            and all(each.dtype == torch.int64 for each in (self.slots, *(self.again or ())))
            and all(
                each.is_contiguous() for each in (self.starts, self.lengths, self.slots, *(self.again or ()))
            )
            and self.tables.stride(1) == 1
        )


class Step:
    """One forward pass.

    Args:
        positions: int64 [rows].
        embeddings: floating [rows, hidden].

    Attributes:
        qkv: [rows, query heads + 2 key heads, head]: of the layer whose attention is next.
        attention: [rows, query heads, head], to be filled with it.
        result: [rows, hidden], normed, after the last layer.
    """

    def __init__(self, decoder: CompiledDecoder, positions: torch.Tensor, embeddings: torch.Tensor) -> None:
        rows, dtype = len(positions), decoder.dtype
        self.residual = embeddings.to(torch.float32, copy=True)
        self.positions = positions.contiguous()
        self.qkv = torch.empty(rows, decoder.query_heads + 2 * decoder.key_heads, decoder.head, dtype=dtype)
        self.attention = torch.empty(rows, decoder.query_heads, decoder.head, dtype=dtype)
        self.result = torch.empty(rows, decoder.hidden, dtype=dtype)
        self._structure = _Step(
            rows,
            *(
                tensor.data_ptr()
                for tensor in (self.positions, self.residual, self.qkv, self.attention, self.result)
            ),
        )
        self.address = ctypes.addressof(self._structure)


class CompiledDecoder:
    """
    Args:
        final_norm: floating [hidden].
        rotations: floating [positions, rotary]: cosines of each position's angles, then sines.
        epsilon: that norms add to the mean square.
        dtype: float32 or bfloat16, of queries, keys, values, attention and result; all else is float32.

    Raises:
        ValueError: sizes do not fit, or there is no such type.
    """

    def __init__(
        self,
        layers: Sequence[DecoderLayer],
        final_norm: torch.Tensor,
        rotations: torch.Tensor,
        *,
        query_heads: int,
        key_heads: int,
        head: int,
        epsilon: float,
        dtype: torch.dtype,
    ) -> None:
        if dtype not in TYPES:
            raise ValueError(f"found {dtype}, expected float32 or bfloat16")
        self.hidden, self.dtype = len(final_norm), dtype
        self.query_heads, self.key_heads, self.head = query_heads, key_heads, head
        intermediate, rotary = layers[0].down.inputs, rotations.shape[1]
        expected = {
            "qkv": (self.hidden, (query_heads + 2 * key_heads) * head),
            "output": (query_heads * head, self.hidden),
            "gate_up": (self.hidden, 2 * intermediate),
            "down": (intermediate, self.hidden),
        }
        for place, layer in enumerate(layers):
            for name, sizes in expected.items():
                found = getattr(layer, name)
                if (found.inputs, found.outputs) != sizes:
                    raise ValueError(
                        f"layer {place}, {name}: found {found.inputs} inputs and {found.outputs} outputs, "
                        f"expected {sizes[0]} and {sizes[1]}"
                    )
        if rotary % 2 or rotary > head or self.hidden % 8 or intermediate % 8 or query_heads % key_heads:
            raise ValueError(f"found rotary {rotary}, head {head}, hidden {self.hidden}: they do not fit")
        self.rotary_positions = len(rotations)
        self._layers = tuple(layers)
        self._kept = [final_norm.float().contiguous(), rotations.float().contiguous()]
        self._structures = (_Layer * len(layers))()
        for layer, structure in zip(layers, self._structures, strict=True):
            norms = [norm.float().contiguous() for norm in (layer.input_norm, layer.attention_norm)]
            self._kept += norms
            structure.input_norm, structure.attention_norm = (norm.data_ptr() for norm in norms)
            for name in expected:
                setattr(structure, name, getattr(layer, name).structure)
        self._decoder = _Decoder(
            self._kept[0].data_ptr(),
            self._kept[1].data_ptr(),
            self.hidden,
            intermediate,
            query_heads,
            key_heads,
            head,
            rotary,
            epsilon,
            torch.get_num_threads(),
            dtype == torch.float32,
        )
        self._address = ctypes.addressof(self._decoder)
        self._places = [ctypes.addressof(structure) for structure in self._structures]
        self._next = [*self._places[1:], None]
        code = library()
        self._begin, self._follow = code.galley_decoder_begin, code.galley_decoder_follow
        self._run = code.galley_decoder_run

    def begin(self, positions: torch.Tensor, embeddings: torch.Tensor) -> Step:
        """Up to the first layer's queries, keys and values."""
        self._decoder.threads = torch.get_num_threads()
        step = Step(self, positions, embeddings)
        self._begin(self._address, self._places[0], step.address)
        return step

    def keep(self, layer: int, rows: torch.Tensor | None) -> None:
        """Let the passes to come write what enters a layer's gates, normed; None for no longer.

        Args:
            rows: of the decoder's type, [rows of the largest pass or more, hidden]; the caller keeps it.

        Raises:
            ValueError: it is of another type or width.
        """
        if rows is not None and not (
            rows.dtype == self.dtype and rows.shape[1:] == (self.hidden,) and rows.is_contiguous()
        ):
            raise ValueError(
                f"found rows {rows.dtype} {list(rows.shape)}, expected {self.dtype} [rows, {self.hidden}]"
            )
        self._structures[layer].kept = None if rows is None else rows.data_ptr()

    @property
    def attends(self) -> bool:
        """Whether `run` takes heads of this size."""
        return self.head % TOKENS == 0 and self.head <= WIDEST

    def follow(self, layer: int, step: Step) -> None:
        """From a layer's attention to the next layer's queries, keys and values, or to the result."""
        self._follow(self._address, self._places[layer], self._next[layer], step.address)

    def run(
        self, positions: torch.Tensor, embeddings: torch.Tensor, cache: PagedCache, requests: Requests
    ) -> torch.Tensor:
        """A whole pass with causal attention; [rows, hidden], normed.

        Raises:
            ValueError: the cache or the requests' tensors do not fit.
        """
        if cache.dtype != self.dtype or cache.key_heads != self.key_heads or not requests.fits():
            raise ValueError(
                f"found a cache of {cache.dtype} and {cache.key_heads} key heads: it does not fit"
            )
        self._decoder.threads = torch.get_num_threads()
        step = Step(self, positions, embeddings)
        again, others = requests.again or (None, None)
        over = _Attention(
            ctypes.addressof(cache.addresses),
            requests.starts.data_ptr(),
            requests.lengths.data_ptr(),
            requests.tables.data_ptr(),
            requests.slots.data_ptr(),
            None if again is None else again.data_ptr(),
            None if others is None else others.data_ptr(),
            0 if again is None else len(again),
            len(requests.lengths),
            requests.tables.stride(0),
            cache.block,
            *cache.strides,
            cache.scale,
        )
        self._run(self._address, self._places[0], len(self._places), step.address, ctypes.addressof(over))
        return step.result
