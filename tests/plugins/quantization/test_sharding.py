"""Shards of tensor parallelism hold the values of the whole quantized matrices; vLLM's layers, no engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor import parameter
from vllm.model_executor.layers import linear

from galley_plugins.quantization.layout import tensors_of
from galley_plugins.quantization.options import QuantizationOptions
from galley_plugins.quantization.quantizer import quantize_together
from galley_plugins.quantization.serving import (
    GalleyQuantization,
    OnlineLinearMethod,
    PackedLinearMethod,
    _Here,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

OPTIONS = [
    QuantizationOptions("finequant"),
    QuantizationOptions("easyquant", group_size=32),
    QuantizationOptions("finequant+easyquant", sigma=2.0),
    QuantizationOptions("rtn", bits=8),
]
NUMBERS, PACKED = _Here(False, False, False), _Here(True, False, False)
HIDDEN, INNER, HEAD, HEADS, KEY_HEADS = 128, 192, 32, 4, 2
SHARDS = {
    "qkv": {"q": (HEADS * HEAD, HIDDEN), "k": (KEY_HEADS * HEAD, HIDDEN), "v": (KEY_HEADS * HEAD, HIDDEN)},
    "gate_up": {0: (INNER, HIDDEN), 1: (INNER, HIDDEN)},
    "down": {None: (HIDDEN, INNER)},
}


class Chosen(GalleyQuantization):
    """Gives every layer this method."""

    def __init__(self, method: Any) -> None:
        super().__init__()
        self._method = method

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        return self._method


@pytest.fixture(autouse=True)
def configured() -> Iterator[None]:
    with set_current_vllm_config(VllmConfig()):
        yield


def layer_of(kind: str, method: Any, rank: int, size: int, monkeypatch: pytest.MonkeyPatch) -> Any:
    """One of vLLM's layers as it is on one rank of `size`."""
    for module in (linear, parameter):
        monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
        monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: size)
    named: dict[str, Any] = {"bias": False, "params_dtype": torch.float32, "quant_config": Chosen(method)}
    if kind == "qkv":
        return linear.QKVParallelLinear(HIDDEN, HEAD, HEADS, KEY_HEADS, prefix=kind, **named)
    if kind == "gate_up":
        return linear.MergedColumnParallelLinear(HIDDEN, [INNER, INNER], prefix=kind, **named)
    return linear.RowParallelLinear(INNER, HIDDEN, prefix=kind, **named)


def loaded(
    kind: str,
    options: QuantizationOptions,
    here: _Here,
    rank: int,
    size: int,
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[Any, Any]:
    """The layer and its method with a plain checkpoint's weights, quantized as they came."""
    weights = weights_of(kind)
    method = OnlineLinearMethod(kind, here, options, len(weights))
    layer = layer_of(kind, method, rank, size, monkeypatch)
    for shard, whole in weights.items():
        layer.weight.weight_loader(layer.weight, whole, *(() if shard is None else (shard,)))
    return layer, method


def weights_of(kind: str) -> dict[Any, torch.Tensor]:
    generator = torch.Generator().manual_seed(17)
    return {shard: torch.randn(shape, generator=generator) for shard, shape in SHARDS[kind].items()}


def expected(kind: str, options: QuantizationOptions, size: int) -> list[torch.Tensor]:
    """Each rank's share of what the whole matrices stand for."""
    whole = [matrix.dequantize() for matrix in quantize_together(list(weights_of(kind).values()), options)]
    parts = [each.chunk(size, 1 if kind == "down" else 0) for each in whole]
    return [torch.cat([part[rank] for part in parts]) for rank in range(size)]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: options.method)
@pytest.mark.parametrize("kind", SHARDS)
def test_two_ranks_hold_what_one_holds(
    kind: str, options: QuantizationOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    for size in (1, 2):
        for rank, share in enumerate(expected(kind, options, size)):
            layer, _ = loaded(kind, options, NUMBERS, rank, size, monkeypatch)
            assert torch.equal(layer.weight, share)
    _, method = loaded(kind, options, PACKED, 0, 1, monkeypatch)
    assert torch.equal(method._matrix.dequantize(), expected(kind, options, 1)[0])


@pytest.mark.parametrize("kind", SHARDS)
def test_a_quantized_checkpoint_is_sharded_to_the_same_values(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    after = "process_weights_after_loading"  # vLLM's own packs numbers for this processor
    monkeypatch.setattr(linear.UnquantizedLinearMethod, after, lambda *_: None)
    options = OPTIONS[2]
    weights = weights_of(kind)
    made = dict(zip(weights, quantize_together(list(weights.values()), options), strict=True))
    for rank, share in enumerate(expected(kind, options, 2)):
        method = PackedLinearMethod(kind, PACKED, len(weights), len(weights))  # packed, were it one rank
        layer = layer_of(kind, method, rank, 2, monkeypatch)
        for shard, matrix in made.items():
            for name, tensor in tensors_of(kind, matrix).items():
                part = getattr(layer, name.removeprefix(f"{kind}."))
                part.weight_loader(part, tensor, *(() if shard is None else (shard,)))
        method.process_weights_after_loading(layer)
        assert torch.equal(layer.weight, share)
