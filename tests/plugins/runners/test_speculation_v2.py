"""What vLLM's runner V2 and its drafts become with speculation; drafting itself is in test_device.py."""

from __future__ import annotations

import importlib
import inspect
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.pooling_params import PoolingParams
from vllm.sampling_params import SamplingParams
from vllm.v1.outputs import DraftTokenIds
from vllm.v1.worker.gpu.spec_decode.speculator import BaseSpeculator

from galley_plugins import vllm_compat
from galley_plugins.embedding.options import EmbeddingOptions
from galley_plugins.options import PluginOptions
from galley_plugins.runners.compose import compose_runner
from galley_plugins.runners.speculation_v2 import SpeculationV2, TableSpeculator
from galley_plugins.speculation.device_steps import Rows, Texts
from galley_plugins.speculation.options import MiB, SpeculationOptions

MOST, VOCABULARY = 3, 50
OPTIONS = SpeculationOptions(method="hybrid", table_bytes=MiB)
MODULE: Any = importlib.import_module("vllm.v1.worker.gpu.model_runner")


def config(method: str | None = "ngram_gpu", *, asynchronous: bool = False) -> SimpleNamespace:
    speculative = SimpleNamespace(
        num_speculative_tokens=MOST,
        enable_adaptive_verification=False,
        use_ngram=lambda: method in ("ngram", "ngram_gpu"),
    )
    return SimpleNamespace(
        additional_config=PluginOptions(speculation=OPTIONS).to_additional_config(),
        speculative_config=speculative if method else None,
        parallel_config=SimpleNamespace(rank=0),
        asynchronous=asynchronous,
    )


@pytest.fixture
def states() -> SimpleNamespace:
    """Request states of four slots, texts of up to 16 tokens."""
    texts = torch.full((4, 16), 44, dtype=torch.int32)
    texts[2, :7] = torch.tensor([11, 12, 13, 14, 15, 16, 17])
    texts[0, :3] = torch.tensor([20, 21, 22])
    texts[3, :5] = torch.tensor([31, 32, 33, 34, 35])
    return SimpleNamespace(
        max_num_reqs=4,
        all_token_ids=SimpleNamespace(gpu=texts),
        total_len=SimpleNamespace(gpu=torch.tensor([3, 1, 7, 5], dtype=torch.int32)),
        prefill_len=SimpleNamespace(gpu=torch.tensor([1, 1, 4, 5], dtype=torch.int32)),
        req_id_to_index={"a": 2, "b": 0, "c": 3},
    )


@pytest.fixture
def speculator(states: SimpleNamespace) -> TableSpeculator:
    return TableSpeculator(config(), torch.device("cpu"), states, OPTIONS)


def batch() -> SimpleNamespace:
    """A step whose tokens the runner has added to the texts.

    Slot 2 had five tokens and the drafts 16 and 19: 16 was right, and 17 came after it. Slot 0 had two tokens
    and the drafts 8 and 9, both wrong. Slot 3 ends a chunk of its prompt.
    """
    return SimpleNamespace(
        num_reqs=3,
        num_draft_tokens=4,
        idx_mapping=torch.tensor([2, 0, 3]),
        idx_mapping_np=np.array([2, 0, 3]),
        expanded_idx_mapping=torch.tensor([2, 2, 2, 0, 0, 0, 3]),
        expanded_local_pos=torch.tensor([0, 1, 2, 0, 1, 2, 0], dtype=torch.int32),
        cu_num_logits=torch.tensor([0, 3, 6, 7], dtype=torch.int32),
        input_ids=torch.tensor([15, 16, 19, 21, 8, 9, 31, 32, 33, 0, 0], dtype=torch.int32),
        positions=torch.tensor([4, 5, 6, 1, 2, 3, 0, 1, 2, 0, 0]),
        logits_indices=torch.tensor([0, 1, 2, 3, 4, 5, 8]),
    )


def rows(speculator: TableSpeculator, states: SimpleNamespace) -> Rows:
    texts = Texts(
        slots=torch.tensor([2, 0, 3]),
        tokens=states.all_token_ids.gpu,
        lengths=torch.tensor([7, 3, 5]),
        new=torch.tensor([2, 1, 0]),
        sampled=torch.tensor([False, True, False]),
    )
    return speculator._rows(batch(), texts, torch.zeros((7, 8), dtype=torch.int64), torch.zeros((7, 8)))


def test_rows_are_what_the_model_was_asked_after(
    speculator: TableSpeculator, states: SimpleNamespace
) -> None:
    found = rows(speculator, states)
    assert found.contexts.tolist() == [
        [13, 14, 15],
        [14, 15, 16],
        [15, 16, 19],
        [-1, 20, 21],
        [20, 21, 8],
        [21, 8, 9],
        [-1, -1, -1],  # a chunk of a prompt brings no token
    ]
    assert found.following.tolist() == [16, 17, -1, 22, -1, -1, -1]
    assert found.slots.tolist() == [2, 2, 2, 0, 0, 0, 3]
    assert found.sampled.tolist() == [False, False, False, True, True, True, False]


def test_rows_of_placeholders_and_past_a_limit_teach_nothing(
    speculator: TableSpeculator, states: SimpleNamespace
) -> None:
    speculator.begin([2], (0,), (1,))
    states.prefill_len.gpu[0] = 2  # slot 0 computed the last token of its prompt, padded with placeholders
    taught = rows(speculator, states).contexts[:, 2].tolist()
    assert taught == [15, 16, -1, 21, -1, -1, -1]


def test_drafts_past_a_limit_are_taken_back_while_they_are_verified(speculator: TableSpeculator) -> None:
    speculator.begin([2, 0, 3], (0, 0, 0), (1, 0, 0))
    step = batch()
    before = step.input_ids.clone()
    with speculator.verification(step):
        assert step.input_ids.tolist() == [15, 16, -1, 21, -1, -1, 31, 32, 33, 0, 0]
    assert torch.equal(step.input_ids, before)
    with pytest.raises(MemoryError), speculator.verification(step):
        raise MemoryError
    assert torch.equal(step.input_ids, before)
    speculator.begin([2, 0, 3], (0, 0, 0), (MOST, MOST, 0))
    with speculator.verification(step):
        assert torch.equal(step.input_ids, before)


def test_logits_are_read_only_while_drafts_are_verified(speculator: TableSpeculator) -> None:
    logits = torch.randn(7, VOCABULARY)
    compute = speculator.shown(lambda hidden_states: hidden_states)
    assert compute(logits) is logits
    assert speculator._tops is None
    with speculator.verification(batch()):
        assert compute(logits) is logits
        logits.zero_()  # as a grammar does in place
    assert speculator._tops is not None
    assert speculator._tops[1][:, 0].min() > 1 / VOCABULARY


def test_a_step_is_learned_from_and_the_next_one_drafted_for(
    speculator: TableSpeculator, states: SimpleNamespace
) -> None:
    logits = torch.zeros(7, VOCABULARY)
    logits[range(7), [16, 17, 5, 22, 6, 7, 40]] = 20.0  # 17 follows 16, and 22 follows 21
    compute = speculator.shown(lambda hidden_states: hidden_states)
    states.all_token_ids.gpu[2, 6] = 16  # the text ends as a rejected draft began
    with speculator.verification(batch()):
        compute(logits)
    drafts = propose(speculator, batch(), torch.tensor([2, 1, 0]))
    assert drafts.shape == (3, MOST)
    assert drafts[0, 0] == 17
    assert speculator.draft_token_confidence_probs[0, 0] > 0.1
    assert speculator.promising.tolist()[0] >= 1
    assert speculator.promising.tolist()[2] == 0


def propose(speculator: TableSpeculator, step: Any, new: torch.Tensor, **fields: Any) -> torch.Tensor:
    names = [name for name in inspect.signature(BaseSpeculator.propose).parameters if name != "self"]
    arguments: dict[str, Any] = dict.fromkeys(names)
    arguments.update(input_batch=step, num_sampled=new.int(), temperature=torch.zeros(4), dummy_run=False)
    return speculator.propose(**{**arguments, **fields})


def test_a_dummy_step_drafts_nothing_and_leaves_no_trace(speculator: TableSpeculator) -> None:
    rates = speculator._drafter._calibration.rates.clone()
    assert propose(speculator, batch(), torch.ones(3), dummy_run=True).shape == (3, MOST)
    assert not speculator.draft_token_confidence_probs.any()
    assert len(speculator._drafter.table.table) == 0
    assert torch.equal(speculator._drafter._calibration.rates[:-1], rates[:-1])


# -- the runner -----------------------------------------------------------------------------------------------


class FakeRunner:
    """Of vLLM's V2 runner what the mixin uses."""

    def __init__(self, vllm_config: Any, device: Any, states: Any) -> None:
        self.req_states = states
        self.num_speculative_steps = MOST
        self.speculator = MODULE.init_speculator(vllm_config, device, states)
        self.scheduler_config = SimpleNamespace(async_scheduling=vllm_config.asynchronous)
        full = vllm_config.asynchronous == "graphs"
        mode = SimpleNamespace(has_full_cudagraphs=lambda: full)
        self.compilation_config = SimpleNamespace(cudagraph_mode=mode)
        self.scheduler_config.async_scheduling = vllm_config.asynchronous is True

    def load_model(self) -> None:
        self.model = SimpleNamespace(compute_logits=lambda hidden_states: hidden_states)

    def add_requests(self, scheduler_output: Any) -> None:
        for request in scheduler_output.scheduled_new_reqs:
            request.pooling_params = None  # as the embedding mixin leaves it

    def take_draft_token_ids(self) -> DraftTokenIds:
        return DraftTokenIds(["a", "b", "c"], [[-1] * MOST for _ in range(3)])


def runner(states: Any, **fields: Any) -> Any:
    return type("Runner", (SpeculationV2, FakeRunner), {})(config(**fields), torch.device("cpu"), states)


def new_request(
    name: str, sampling: dict[str, Any] | None = None, *, pooled: bool = False
) -> SimpleNamespace:
    return SimpleNamespace(
        req_id=name,
        pooling_params=PoolingParams(task="embed") if pooled else None,
        sampling_params=None if pooled else SamplingParams(extra_args=sampling),
    )


def test_vllms_speculator_is_replaced_only_while_the_runner_is_built(
    states: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = MODULE.init_speculator
    assert isinstance(runner(states).speculator, TableSpeculator)
    assert MODULE.init_speculator is original

    def fail(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(FakeRunner, "__init__", fail)
    with pytest.raises(MemoryError):
        runner(states)
    assert MODULE.init_speculator is original


@pytest.mark.parametrize("method", [None, "eagle"])
def test_another_speculative_method_is_refused(states: Any, method: str | None) -> None:
    with pytest.raises(ValueError, match="runner V2 needs vLLM's method ngram_gpu"):
        runner(states, method=method)


def test_requests_have_the_limits_that_they_ask_for_and_embeddings_none(states: Any) -> None:
    subject = runner(states)
    new = [
        new_request("a", {"max_draft_tokens": 2}),
        new_request("b", pooled=True),
        new_request("c", {"max_draft_tokens": "many"}),  # the server refuses it; the engine must not die
    ]
    subject.add_requests(SimpleNamespace(scheduled_new_reqs=new))
    assert subject.speculator._drafter.limits.tolist() == [0, MOST, 2, MOST]
    subject.add_requests(SimpleNamespace(scheduled_new_reqs=[new_request("a", {"speculation": False})]))
    assert subject.speculator._drafter.limits.tolist() == [0, MOST, 0, MOST]
    subject.add_requests(SimpleNamespace(scheduled_new_reqs=[]))


@pytest.mark.parametrize(
    ("asynchronous", "counts"), [(False, [2, 0, 3]), (True, [3, 3, 3]), ("graphs", [3, 3, 3])]
)
def test_drafts_are_cut_where_that_breaks_neither_graphs_nor_schedules(
    states: Any, asynchronous: Any, counts: list[int]
) -> None:
    subject = runner(states, asynchronous=asynchronous)
    subject.speculator._chances = torch.tensor([[0.9, 0.5, 0.1], [0.0, 0.0, 0.0], [1.0, 0.9, 0.5]])
    drafts = subject.take_draft_token_ids()
    assert drafts.req_ids == ["a", "b", "c"]
    assert [len(ids) for ids in drafts.draft_token_ids] == counts


def test_the_models_logits_are_shown_to_the_speculator(states: Any) -> None:
    subject = runner(states)
    subject.load_model()
    with subject.speculator.verification(batch()):
        subject.model.compute_logits(torch.randn(7, VOCABULARY))
    assert subject.speculator._tops is not None


def test_whatever_is_overridden_exists_in_vllm_and_is_checked_at_start() -> None:
    checked = {path for _, path, _ in vllm_compat.INTERNALS["speculation-v2"]}
    own = {"__init__", "_opening"}
    overridden = [name for name, value in vars(SpeculationV2).items() if inspect.isfunction(value)]
    for name in set(overridden) - own:
        assert f"GPUModelRunner.{name}" in checked
        names = [
            each
            for each in inspect.signature(getattr(MODULE.GPUModelRunner, name)).parameters
            if each not in ("self", "args", "kwargs")
        ]
        inspect.signature(getattr(SpeculationV2, name)).bind(None, *names)
    assert (
        inspect.signature(TableSpeculator.propose).parameters.keys()
        == inspect.signature(BaseSpeculator.propose).parameters.keys()
    )


def test_speculation_sees_a_step_before_and_after_the_embedding_mixin() -> None:
    options = PluginOptions(embedding=EmbeddingOptions(), speculation=OPTIONS)
    names = [each.__name__ for each in compose_runner(MODULE.GPUModelRunner, options, v2=True).__mro__]
    assert names[1:4] == ["SpeculationV2", "EmbeddingV2", "GPUModelRunner"]
