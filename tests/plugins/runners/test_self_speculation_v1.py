from __future__ import annotations

import importlib
import inspect
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from galley_plugins import vllm_compat
from galley_plugins.embedding.options import EmbeddingOptions
from galley_plugins.options import PluginOptions
from galley_plugins.runners.compose import compose_runner
from galley_plugins.runners.self_speculation_v1 import (
    SelfSpeculationV1,
    _layers_of,
    _unsuited_engine,
    skipping,
)
from galley_plugins.runners.speculation_v1 import SpeculationV1
from galley_plugins.speculation.options import SpeculationOptions

SELF = PluginOptions(embedding=EmbeddingOptions(), speculation=SpeculationOptions(method="self"))


class Layer(nn.Module):
    """A decoder layer as far as its residual stream goes: attention adds 1, the MLP doubles."""

    class Attention(nn.Module):
        def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
            return torch.ones_like(hidden_states)

    class Mlp(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.mlp = self.Attention(), self.Mlp()

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = hidden_states + self.self_attn(positions=positions, hidden_states=hidden_states)
        return hidden_states + self.mlp(hidden_states)


def model_of(layers: list[Any]) -> Any:
    model = nn.Module()
    model.model = nn.Module()
    model.model.layers = nn.ModuleList(layers)
    return model


def run(layers: Any) -> float:
    hidden = torch.zeros(1)
    for layer in layers:
        hidden = layer(torch.zeros(1, dtype=torch.int64), hidden)
    return float(hidden)


def test_runner_v1_drafts_for_itself_and_v2_says_why_it_does_not() -> None:
    v1 = importlib.import_module("vllm.v1.worker.gpu_model_runner").GPUModelRunner
    v2 = importlib.import_module("vllm.v1.worker.gpu.model_runner").GPUModelRunner
    composed = compose_runner(v1, SELF, v2=False)
    # After embedding, whose rows are dropped before anything is drafted.
    assert composed.__mro__[2:5] == (SelfSpeculationV1, SpeculationV1, v1)
    with pytest.raises(ValueError, match=r"speculation\.method: self-drafting needs vLLM's runner V1"):
        compose_runner(v2, SELF, v2=True)


def test_what_it_uses_of_vllm_exists() -> None:
    vllm_compat.check("speculation-self")
    base = importlib.import_module("vllm.v1.worker.gpu_model_runner").GPUModelRunner
    inspect.signature(base._model_forward).bind(
        None, input_ids=None, positions=None, intermediate_tensors=None, inputs_embeds=None
    )


def test_skipped_sub_layers_add_nothing_and_only_inside() -> None:
    layers = _layers_of(model_of([Layer() for _ in range(4)]))
    whole = run(layers)
    assert whole == 30  # x -> 2 (x + 1), four times
    skip_set = np.zeros(4, np.bool_)
    skip_set[[0, 3]] = True  # attention of layer 1, MLP of layer 2
    with skipping(layers, skip_set):
        assert run(layers) == 12  # 2, 4, 5, 12
    assert run(layers) == whole
    with pytest.raises(RuntimeError, match="inside"), skipping(layers, ~skip_set):
        raise RuntimeError("inside")
    assert run(layers) == whole


@pytest.mark.parametrize("count", [0, 3, 5])
def test_models_of_another_layout_are_refused_by_name(count: int) -> None:
    layers = [Layer() for _ in range(count)]
    if count == 5:
        del layers[2].mlp
    with pytest.raises(ValueError, match=r"self-drafting needs a model .* self_attn and mlp; Module is"):
        _layers_of(model_of(layers))
    with pytest.raises(ValueError, match="Linear is built otherwise"):
        _layers_of(nn.Linear(1, 1))


def engine(**changes: Any) -> Any:
    values = {
        "compilation_config": SimpleNamespace(mode=0),
        "parallel_config": SimpleNamespace(world_size=1),
        "lora_config": None,
        "kv_transfer_config": None,
        "model_config": SimpleNamespace(
            supports_multimodal_inputs=False, uses_mrope=False, enable_prompt_embeds=False
        ),
    }
    return SimpleNamespace(**{**values, **changes})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"compilation_config": SimpleNamespace(mode=3)}, "without torch.compile"),
        ({"parallel_config": SimpleNamespace(world_size=2)}, "in one process"),
        ({"lora_config": object()}, "without LoRA"),
        ({"kv_transfer_config": object()}, "keeps its cache to itself"),
        (
            {
                "model_config": SimpleNamespace(
                    supports_multimodal_inputs=True, uses_mrope=False, enable_prompt_embeds=False
                )
            },
            "text alone",
        ),
    ],
)
def test_engines_that_it_does_not_suit_are_refused_with_the_reason(
    changes: dict[str, Any], reason: str
) -> None:
    assert _unsuited_engine(engine()) is None
    found = _unsuited_engine(engine(**changes))
    assert found is not None
    assert reason in found
    config = engine(**changes, additional_config=SELF.to_additional_config())
    with pytest.raises(ValueError, match=f"self-drafting needs .*{reason}"):
        SelfSpeculationV1(config)


def test_drafts_reach_as_far_as_their_own_blocks_and_private_ones() -> None:
    table = SimpleNamespace(block_size=32, num_blocks_per_row=np.array([2, 3, 1, 2], np.int32))
    runner = SimpleNamespace(input_batch=SimpleNamespace(block_table=[table]), _scratch=[100, 101])
    rows = np.array([0, 1, 3, 2])
    # 40 tokens: the last one is stored at 39. A draft of 8 stores up to 46, within two blocks.
    # 95 tokens: stores at 94, 95 and then from the fourth block on, which is private.
    # 64 tokens: stores at 63 and on from a private block; 8 fit in it.
    # 33 tokens in one block: the last one itself has no slot, and no block is left.
    lengths = np.array([40, 95, 64, 33])
    tables = np.arange(16, dtype=np.int32).reshape(4, 4)
    limits = SelfSpeculationV1._reach(runner, rows, lengths, np.array([8, 8, 8, 8]), tables)
    assert limits.tolist() == [8, 8, 8, 0]
    assert tables.tolist() == [[0, 1, 2, 3], [4, 5, 6, 101], [8, 9, 100, 11], [12, 13, 14, 15]]
    runner._scratch = []
    untouched = np.zeros((4, 4), np.int32)
    limits = SelfSpeculationV1._reach(runner, rows, lengths, np.array([8, 8, 8, 0]), untouched)
    assert limits.tolist() == [8, 2, 1, 0]  # up to the end of their own blocks
    assert not untouched.any()
