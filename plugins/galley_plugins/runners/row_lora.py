"""LoRA on some rows of a step: the same linear layers serve rows with an adapter and rows without.

Hooks after a decoder's linear layers add x A^T B^T to the marked rows and leave the others bit for bit as
they are. vLLM fuses projections that read the same input; so are their adapters here, with B block-diagonal.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from galley_plugins.runners.layer_taps import LayerHook

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Rows: TypeAlias = "slice | torch.Tensor"
"""Rows of a step, as a slice where they are neighbours, otherwise int64 [rows]."""

# vLLM's layers by the names of transformers' layers that each one fuses, in order.
FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj": ("self_attn.o_proj",),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj": ("mlp.down_proj",),
}


class RowLora:
    """An adapter in a model.

    Args:
        layers: the model's decoder layers.
        tensors: by the names of `galley_plugins.embedding.adapter`, float32; others are left alone.
        device, dtype: the model's.

    Raises:
        ValueError: a tensor does not fit its layer, or belongs to none.
    """

    def __init__(
        self,
        layers: Sequence[Any],
        tensors: Mapping[str, torch.Tensor],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._rows: Rows | None = None
        left = {name for name in tensors if name.startswith("layers.")}
        for index, layer in enumerate(layers):
            for name, parts in FUSED.items():
                pairs = [
                    (tensors.get(f"layers.{index}.{part}.A"), tensors.get(f"layers.{index}.{part}.B"))
                    for part in parts
                ]
                left -= {f"layers.{index}.{part}.{side}" for part in parts for side in "AB"}
                if all(down is None for down, _ in pairs):
                    continue
                module = _module(layer, name)
                down, up = _fuse(f"layers.{index}.{name}", module, pairs)
                down, up = (part.to(device, dtype).contiguous() for part in (down, up))
                module.register_forward_hook(self._hook(down, up))
        if left:
            raise ValueError(f"adapter: found {min(left)}, a layer that this model does not have")

    def begin(self, rows: Rows | None) -> None:
        """Rows of the next forward pass that the adapter changes."""
        self._rows = rows

    def _hook(self, down: torch.Tensor, up: torch.Tensor) -> Any:
        def after(module: Any, args: tuple[Any, ...], output: Any) -> None:
            rows = self._rows
            if rows is None:
                return
            result = output[0] if isinstance(output, tuple) else output
            if isinstance(rows, slice):
                result[rows].addmm_(args[0][rows] @ down, up)
            else:
                result.index_add_(0, rows, (args[0][rows] @ down) @ up)

        return LayerHook(after, lambda: self._rows is None)


def _module(layer: Any, name: str) -> Any:
    found = layer
    for part in name.split("."):
        found = getattr(found, part, None)
    if found is None:
        raise ValueError(f"adapter: expected a layer with {name}, {type(layer).__name__} is built otherwise")
    return found


def _fuse(
    name: str, module: Any, pairs: list[tuple[torch.Tensor | None, torch.Tensor | None]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """[inputs, ranks] and [ranks, outputs] of a fused layer."""
    if any(down is None or up is None for down, up in pairs):
        raise ValueError(f"adapter: {name} lacks a part, expected A and B of all that it fuses")
    downs = [down for down, _ in pairs if down is not None]
    ups = [up for _, up in pairs if up is not None]
    found = (sum(map(len, ups)), downs[0].shape[1])
    expected = (module.output_size, module.input_size)
    ranks = all(len(down) == up.shape[1] for down, up in zip(downs, ups, strict=True))
    if found != expected or not ranks:
        raise ValueError(f"adapter: {name}: found {list(found)}, expected {list(expected)}")
    return torch.cat(downs).T, torch.block_diag(*ups).T


def rows_of(spans: Sequence[tuple[int, int]], device: Any) -> Rows | None:
    """Rows of `start` to `stop` for each span, in ascending order."""
    if not spans:
        return None
    if all(before[1] == after[0] for before, after in itertools.pairwise(spans)):
        return slice(spans[0][0], spans[-1][1])
    rows: torch.Tensor = torch.cat([torch.arange(start, stop) for start, stop in spans]).to(device)
    return rows
