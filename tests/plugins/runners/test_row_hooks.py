"""LoRA on some rows, embeddings of single rows, and bidirectional requests beside causal ones."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from galley_plugins.runners.layer_taps import looked_into
from galley_plugins.runners.row_attention import RowAttention
from galley_plugins.runners.row_inputs import RowInputs
from galley_plugins.runners.row_lora import RowLora, rows_of

SIZE, KEYS, INNER, RANK = 8, 4, 12, 2
SHAPES = {
    "self_attn.q_proj": (SIZE, SIZE),
    "self_attn.k_proj": (SIZE, KEYS),
    "self_attn.v_proj": (SIZE, KEYS),
    "self_attn.o_proj": (SIZE, SIZE),
    "mlp.gate_proj": (SIZE, INNER),
    "mlp.up_proj": (SIZE, INNER),
    "mlp.down_proj": (INNER, SIZE),
}


class Linear(nn.Module):
    """As vLLM's: the output and a bias that was not added."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.input_size, self.output_size = inputs, outputs
        self.weight = nn.Parameter(torch.randn(outputs, inputs), requires_grad=False)

    def forward(self, rows: torch.Tensor) -> tuple[torch.Tensor, None]:
        return rows @ self.weight.T, None


def decoder_layer() -> Any:
    return SimpleNamespace(
        self_attn=SimpleNamespace(qkv_proj=Linear(SIZE, SIZE + 2 * KEYS), o_proj=Linear(SIZE, SIZE)),
        mlp=SimpleNamespace(gate_up_proj=Linear(SIZE, 2 * INNER), down_proj=Linear(INNER, SIZE)),
    )


def lora(layer: int = 0) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, (inputs, outputs) in SHAPES.items():
        tensors[f"layers.{layer}.{name}.A"] = torch.randn(RANK, inputs)
        tensors[f"layers.{layer}.{name}.B"] = torch.randn(outputs, RANK)
    return tensors


def attached(layer: Any, tensors: dict[str, torch.Tensor]) -> RowLora:
    return RowLora([layer], tensors, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("spans", [[(2, 5)], [(0, 1), (3, 6)], [(0, 2), (2, 6)]])
def test_marked_rows_gain_each_projections_own_product_and_others_stay(spans: list[tuple[int, int]]) -> None:
    layer, tensors = decoder_layer(), lora()
    rows = torch.randn(6, SIZE)
    plain, _ = layer.self_attn.qkv_proj(rows)
    adapter = attached(layer, tensors)
    adapter.begin(rows_of(spans, "cpu"))
    found, _ = layer.self_attn.qkv_proj(rows)
    marked = [place for start, stop in spans for place in range(start, stop)]
    others = [place for place in range(6) if place not in marked]
    products = [
        rows @ tensors[f"layers.0.self_attn.{part}_proj.A"].T @ tensors[f"layers.0.self_attn.{part}_proj.B"].T
        for part in "qkv"
    ]
    torch.testing.assert_close(found[marked], (plain + torch.cat(products, 1))[marked])
    assert torch.equal(found[others], plain[others])
    adapter.begin(None)
    assert torch.equal(layer.self_attn.qkv_proj(rows)[0], plain)


def test_a_layer_that_the_model_lacks_or_that_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match=r"found layers\.1\."):
        attached(decoder_layer(), lora() | lora(1))
    wrong = lora() | {"layers.0.mlp.down_proj.A": torch.zeros(RANK, SIZE)}
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.down_proj: found \[8, 8\], expected \[8, 12\]"):
        attached(decoder_layer(), wrong)
    lacking = lora()
    del lacking["layers.0.self_attn.k_proj.B"]
    with pytest.raises(ValueError, match="lacks a part"):
        attached(decoder_layer(), lacking)


def test_neighbours_are_a_slice() -> None:
    assert rows_of([], "cpu") is None
    assert rows_of([(1, 3), (3, 7)], "cpu") == slice(1, 7)
    found = rows_of([(1, 3), (5, 6)], "cpu")
    assert isinstance(found, torch.Tensor)
    assert found.tolist() == [1, 2, 5]


def test_single_rows_are_embedded_otherwise_once() -> None:
    embedding = nn.Embedding(5, 3).requires_grad_(False)
    ids = torch.tensor([0, 1, 2])
    plain = embedding(ids).clone()
    inputs = RowInputs(embedding)
    inputs.begin(torch.tensor([1]), torch.tensor([[7.0, 8.0, 9.0]]))
    found = embedding(ids)
    assert found[1].tolist() == [7.0, 8.0, 9.0]
    assert torch.equal(found[[0, 2]], plain[[0, 2]])
    inputs.begin(None, None)
    assert torch.equal(embedding(ids), plain)


@dataclass
class Common:
    """The fields of vLLM's attention metadata that matter here."""

    num_reqs: int
    causal: Any = True


class Builder:
    def build(self, common_prefix_len: int, common_attn_metadata: Common) -> Any:
        return common_attn_metadata.causal


def test_only_named_requests_lose_their_causal_mask_and_padding_keeps_it() -> None:
    attention = RowAttention()
    builder = Builder()
    attention.attach([[SimpleNamespace(metadata_builders=[builder])]])
    attention.begin([1], 3, "cpu")
    assert builder.build(0, Common(4)).tolist() == [1, 0, 1, 1]
    # What says its own mask, such as a tree of drafts, keeps it.
    assert builder.build(0, Common(4, causal=False)) is False
    attention.begin([], 3, "cpu")
    assert builder.build(0, Common(4)) is True


def test_layers_know_when_an_adapter_has_rows_in_a_step() -> None:
    layer = decoder_layer()
    adapter = attached(layer, lora())
    maps = [layer.self_attn.qkv_proj, layer.mlp.down_proj]
    assert not looked_into(maps)
    adapter.begin(slice(0, 2))
    assert looked_into(maps)
    adapter.begin(None)
    assert not looked_into(maps)
