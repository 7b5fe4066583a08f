"""Whose weights each row of a step gets, on either runner; the mix itself is in memory/test_mixed_model.py."""

from __future__ import annotations

import importlib
import inspect
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn
from vllm.config import CompilationMode, CUDAGraphMode
from vllm.pooling_params import PoolingParams
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import NewRequestData

from galley_plugins import vllm_compat
from galley_plugins.embedding.options import EmbeddingOptions
from galley_plugins.memory.options import MemoryOptions
from galley_plugins.memory.served import NamedMemory
from galley_plugins.options import PluginOptions
from galley_plugins.runners import memory as runner_memory
from galley_plugins.runners.compose import compose_runner

if TYPE_CHECKING:
    from collections.abc import Callable

HIDDEN, TOKENS = 4, 16
OPTIONS = PluginOptions(
    memory=(MemoryOptions("/wiki", "wiki"), MemoryOptions("/code", "code", 0.1)), embedding=EmbeddingOptions()
)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Identity()

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.mlp(states)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList([Layer(), Layer()])
        self.scale = nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        for layer in self.model.layers:
            states = layer(states)
        return states

    def compute_logits(self, states: torch.Tensor) -> torch.Tensor:
        return states


class FakeRunner:
    def __init__(self, vllm_config: Any, device: Any) -> None:
        self.device, self.vllm_config = device, vllm_config
        self.model_config = vllm_config.model_config
        self.params: dict[str, Any] = {}

    def load_model(self) -> None:
        self.model = Model()

    def get_model(self) -> Model:
        return self.model

    def weights(self, counts: dict[str, int]) -> list[list[float]]:
        """The weights in the model's output, of each token."""
        columns = self.model(torch.zeros(sum(counts.values()) + 2, HIDDEN))[:, 3 * HIDDEN :]  # two taps
        return [[round(value, 6) for value in row] for row in columns.tolist()]


class FakeV1(FakeRunner):
    def _update_states(self, scheduler_output: Any) -> None:
        for request in scheduler_output.scheduled_new_reqs:
            assert request.sampling_params is not None
        self.seen = scheduler_output

    def _prepare_inputs(self, scheduler_output: Any, num_scheduled_tokens: Any) -> str:
        return "prepared"

    def step(self, counts: dict[str, int], **fields: Any) -> list[list[float]]:
        self._update_states(output(**fields))
        starts = np.cumsum([0, *counts.values()])
        padded = torch.tensor([*starts, *[starts[-1]] * 3], dtype=torch.int32)  # of earlier, larger batches
        self.query_start_loc = SimpleNamespace(gpu=padded, np=padded.numpy())
        self.input_batch = SimpleNamespace(
            req_ids=list(counts), num_computed_tokens_cpu=np.zeros(len(counts), np.int32)
        )
        total = SimpleNamespace(total_num_scheduled_tokens=sum(counts.values()))
        assert self._prepare_inputs(total, np.array(list(counts.values()))) == "prepared"
        return self.weights(counts)


class FakeV2(FakeRunner):
    def finish_requests(self, scheduler_output: Any) -> None:
        pass

    def add_requests(self, scheduler_output: Any) -> None:
        for request in scheduler_output.scheduled_new_reqs:
            assert request.sampling_params is not None

    def prepare_inputs(self, batch: Any) -> Any:
        return batch

    def step(self, counts: dict[str, int], **fields: Any) -> list[list[float]]:
        self.finish_requests(output(**fields))
        self.add_requests(output(**fields))
        starts = np.cumsum([0, *counts.values()])
        padded = torch.tensor([*starts, starts[-1], starts[-1]], dtype=torch.int32)
        batch = SimpleNamespace(
            req_ids=list(counts), num_reqs=len(counts), num_tokens=int(starts[-1]), query_start_loc=padded,
            query_start_loc_np=padded.numpy(), num_computed_tokens_np=np.zeros(len(counts), np.int32),
        )  # fmt: skip
        assert self.prepare_inputs(batch) is batch
        return self.weights(counts)


def output(new: tuple[Any, ...] = (), finished: tuple[str, ...] = ()) -> SimpleNamespace:
    return SimpleNamespace(scheduled_new_reqs=list(new), finished_req_ids=set(finished))


def request(name: str, sampling: SamplingParams | None, pooling: PoolingParams | None = None) -> Any:
    return NewRequestData(
        req_id=name,
        prompt_token_ids=[1, 2, 3],
        mm_features=[],
        sampling_params=sampling,
        pooling_params=pooling,
        block_ids=([1],),
        num_computed_tokens=0,
        lora_request=None,
    )


def chat(name: str, **extra: float) -> Any:
    return request(name, SamplingParams(extra_args={key.replace("__", "."): extra[key] for key in extra}))


def embedding(name: str) -> Any:
    return request(name, None, PoolingParams(task="embed"))


def config(**changes: Any) -> SimpleNamespace:
    """An engine's configuration; `changes` by `part__name`."""
    parts: dict[str, dict[str, Any]] = {
        "parallel_config": {
            "pipeline_parallel_size": 1,
            "prefill_context_parallel_size": 1,
            "use_ubatching": False,
            "enable_batch_sharded_sampling": False,
            "tensor_parallel_size": 1,
        },
        "cache_config": {"kv_sharing_fast_prefill": False},
        "scheduler_config": {"max_num_batched_tokens": TOKENS},
        "compilation_config": {"mode": CompilationMode.NONE, "cudagraph_mode": CUDAGraphMode.NONE},
        "model_config": {
            "dtype": torch.float32,
            "get_hidden_size": lambda: HIDDEN,
            "get_vocab_size": lambda: HIDDEN,
            "hf_text_config": SimpleNamespace(num_hidden_layers=2),
        },
    }
    made: dict[str, Any] = {}
    for change, value in changes.items():
        part, name = change.split("__")
        if part in parts:
            parts[part][name] = value
        else:
            made[part] = SimpleNamespace(**{name: value})
    made |= {part: SimpleNamespace(**values) for part, values in parts.items()}
    return SimpleNamespace(
        additional_config=OPTIONS.to_additional_config(), **{"speculative_config": None, **made}
    )


@pytest.fixture(params=["v1", "v2"])
def build(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A runner with embeddings and memories, by an engine's configuration; its model is loaded."""
    memories = tuple(
        NamedMemory(name, share, SimpleNamespace(layer=layer))
        for name, share, layer in (("wiki", 0.3, 0), ("code", 0.1, 1))
    )
    monkeypatch.setattr(runner_memory, "load_memories", lambda *given: memories)
    base = FakeV2 if request.param == "v2" else FakeV1

    def make(vllm_config: Any = None) -> Any:
        kind = compose_runner(base, OPTIONS, v2=request.param == "v2")
        runner = kind(vllm_config or config(), torch.device("cpu"))
        runner.load_model()
        return runner

    return make


NONE = [0.0, 0.0]


def test_each_row_has_the_weights_of_its_request_and_padding_has_none(build: Callable[..., Any]) -> None:
    runner = build()
    new = (chat("a"), chat("b", memory_weight=0.8), embedding("e"), chat("c", memory_weight__code=0.5))
    found = runner.step({"a": 1, "b": 3, "e": 2, "c": 1}, new=new)
    assert found == [[0.3, 0.1], *[[0.6, 0.2]] * 3, *[NONE] * 2, [0.3, 0.5], *[NONE] * 2]
    # Later steps have other rows, in another order.
    assert runner.step({"c": 1, "b": 1}, finished=("a", "e")) == [[0.3, 0.5], [0.6, 0.2], NONE, NONE]


def test_a_step_of_requests_without_memories_has_the_models_own_output(build: Callable[..., Any]) -> None:
    runner = build()
    runner.step({"a": 2}, new=(chat("a"),))
    runner.step({"b": 2, "e": 3}, new=(chat("b", memory_weight=0), embedding("e")))
    assert runner.model(torch.zeros(5, HIDDEN)).shape == (5, HIDDEN)


def test_a_preempted_request_comes_back_with_its_weights(build: Callable[..., Any]) -> None:
    runner = build()
    runner.step({"a": 2, "b": 1}, new=(chat("a", memory_weight=0.4), chat("b")))
    runner.step({"b": 1})
    # V1 schedules it again as one that it knows, V2 as a new one.
    again = (chat("a", memory_weight=0.4),) if isinstance(runner, FakeV2) else ()
    assert runner.step({"b": 1, "a": 1}, new=again)[:2] == [[0.3, 0.1], [0.3, 0.1]]


def test_an_id_that_ends_and_returns_is_another_request(build: Callable[..., Any]) -> None:
    runner = build()
    runner.step({"a": 1}, new=(chat("a", memory_weight=0.8),))
    assert runner.step({"a": 1}, new=(chat("a"),), finished=("a",))[0] == [0.3, 0.1]


def test_a_request_that_the_api_server_did_not_check_is_served_without(build: Callable[..., Any]) -> None:
    runner = build()
    assert runner.step({"a": 1, "b": 1}, new=(chat("a", memory_weight=7), chat("b")))[0] == NONE


def test_embeddings_are_pooled_from_the_models_own_states(build: Callable[..., Any]) -> None:
    runner = build()
    runner.step({"e": 3, "c": 1}, new=(embedding("e"), chat("c")))
    states = torch.randn(4, HIDDEN)
    rows = runner.model(states)
    assert rows.shape[1] > HIDDEN
    vectors = runner.embedding.end_step([0], ["e", "c"], [0, 3, 4], [0, 0], rows)
    mean = states[:3].mean(0)
    assert torch.allclose(vectors["e"], mean / mean.norm(), atol=1e-6)


def test_graphs_of_another_memory_are_not_taken_for_this_ones(build: Callable[..., Any]) -> None:
    """vLLM's key of a compiled graph is made from this configuration."""
    runner = build()
    assert runner.vllm_config.additional_config["galley_taps"] == [0, 1]
    assert PluginOptions.from_vllm_config(runner.vllm_config) == OPTIONS


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"parallel_config__pipeline_parallel_size": 2}, "pipeline-parallel-size: 1"),
        ({"parallel_config__prefill_context_parallel_size": 2}, "prefill-context-parallel-size: 1"),
        ({"parallel_config__use_ubatching": True}, "without enable-dbo"),
        ({"parallel_config__enable_batch_sharded_sampling": True}, "without enable-batch-sharded-sampling"),
        ({"cache_config__kv_sharing_fast_prefill": True}, "without kv-sharing-fast-prefill"),
        ({"speculative_config__method": "eagle3"}, "a drafter that reads no hidden states .*found eagle3"),
        ({"speculative_config__method": "mtp"}, "a drafter that reads no hidden states .*found mtp"),
    ],
)
def test_an_engine_that_cannot_mix_is_refused_with_the_reason(
    build: Callable[..., Any], change: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=f"memory: needs .*{reason}"):
        build(config(**change))


@pytest.mark.parametrize("method", ["custom_class", "ngram_gpu", "suffix"])
def test_drafters_that_read_tokens_alone_may_stay(build: Callable[..., Any], method: str) -> None:
    build(config(speculative_config__method=method))


@pytest.mark.parametrize(
    ("module", "v2"), [("vllm.v1.worker.gpu_model_runner", False), ("vllm.v1.worker.gpu.model_runner", True)]
)
def test_it_stands_last_and_overrides_what_vllm_has(module: str, v2: bool) -> None:
    base = importlib.import_module(module).GPUModelRunner
    composed = compose_runner(base, OPTIONS, v2=v2)
    mixin = composed.__mro__[composed.__mro__.index(base) - 1]
    assert mixin.__name__ == ("MemoryV2" if v2 else "MemoryV1")
    checked = {path for _, path, _ in vllm_compat.INTERNALS["runner-v2" if v2 else "runner-v1"]}
    overridden = [name for name, value in vars(mixin).items() if inspect.isfunction(value)]
    for name in set(overridden) - {"__init__"}:
        assert f"GPUModelRunner.{name}" in checked
        names = list(inspect.signature(getattr(base, name)).parameters)[1:]
        inspect.signature(getattr(mixin, name)).bind(None, *names)
