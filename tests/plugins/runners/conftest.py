"""A step of an engine as both runners see it, and what its rows must become."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.pooling_params import PoolingParams
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, AsyncModelRunnerOutput, ModelRunnerOutput
from vllm.v1.utils import CpuGpuBuffer
from vllm.v1.worker.gpu_model_runner import ExecuteModelState

from galley_plugins.embedding.options import EmbeddingOptions
from galley_plugins.options import PluginOptions
from galley_plugins.runners.v1 import EmbeddingV1
from galley_plugins.runners.v2 import EmbeddingV2

HIDDEN = 4
TOKEN = 7  # what every fake runner samples


class Later(AsyncModelRunnerOutput):
    def __init__(self, output: ModelRunnerOutput) -> None:
        self._output = output

    def get_output(self) -> ModelRunnerOutput:
        return self._output


@dataclass
class Step:
    """One step: `rows` are (request id, hidden states of its chunk, position of the first of them).

    The rows of `unfinished` chats are prompt chunks that bring no token yet.
    """

    rows: list[tuple[str, torch.Tensor, int]] = field(default_factory=list)
    new: list[NewRequestData] = field(default_factory=list)
    finished: set[str] = field(default_factory=set)
    preempted: set[str] = field(default_factory=set)
    unfinished: set[str] = field(default_factory=set)

    @property
    def scheduler_output(self) -> SimpleNamespace:
        return SimpleNamespace(
            scheduled_new_reqs=self.new, finished_req_ids=self.finished, preempted_req_ids=self.preempted
        )

    @property
    def request_ids(self) -> list[str]:
        return [name for name, _, _ in self.rows]

    @property
    def hidden_states(self) -> torch.Tensor:
        """[tokens, hidden], every row's chunk, then padding as a runner's buffer has it."""
        return torch.cat([*(chunk for _, chunk, _ in self.rows), torch.full((3, HIDDEN), 1e6)])

    @property
    def starts(self) -> np.ndarray:
        """[requests + 1] first token of every row."""
        return np.cumsum([0, *(len(chunk) for _, chunk, _ in self.rows)])

    @property
    def computed(self) -> np.ndarray:
        """[requests] tokens of every request that were computed before this step."""
        return np.array([start for _, _, start in self.rows])

    def output(self, sampled: list[list[int]], *, asynchronous: bool) -> ModelRunnerOutput | Later:
        index = {name: row for row, name in enumerate(self.request_ids)}
        output = ModelRunnerOutput(self.request_ids, index, sampled)
        return Later(output) if asynchronous else output


class Prompts:
    """Hidden states of prompts, random but the same in every run, and their vectors by numpy."""

    def __init__(self) -> None:
        self._random = np.random.default_rng(20250601)

    def rows(self, length: int) -> torch.Tensor:
        return torch.tensor(self._random.normal(size=(length, HIDDEN)), dtype=torch.float32)

    def mean(self, rows: torch.Tensor) -> np.ndarray:
        vector = rows.double().numpy().mean(axis=0)
        return vector / np.linalg.norm(vector)

    def last(self, rows: torch.Tensor) -> np.ndarray:
        vector = rows.double().numpy()[-1]
        return vector / np.linalg.norm(vector)


@pytest.fixture
def prompts() -> Prompts:
    return Prompts()


def _new(
    name: str, length: int, sampling: SamplingParams | None, pooling: PoolingParams | None
) -> NewRequestData:
    return NewRequestData(
        req_id=name,
        prompt_token_ids=list(range(length)),
        mm_features=[],
        sampling_params=sampling,
        pooling_params=pooling,
        block_ids=([1],),
        num_computed_tokens=0,
        lora_request=None,
    )


@pytest.fixture
def step() -> type[Step]:
    return Step


@pytest.fixture
def chat() -> Any:
    """A new chat request, by id and length of its prompt."""
    return lambda name, length: _new(name, length, SamplingParams(max_tokens=4), None)


@pytest.fixture
def embedding() -> Any:
    """A new embedding request, by id and length of its prompt."""
    return lambda name, length: _new(name, length, None, PoolingParams(task="embed"))


class FakeRunner:
    """What both runners have in common: one model, whose hidden states a test chooses, and one token."""

    def __init__(self, vllm_config: Any, device: Any = None) -> None:
        self.asynchronous = vllm_config.asynchronous
        self.output: Any = None  # of the base, before a mixin adds to it

    def get_supported_tasks(self) -> tuple[str, ...]:
        return ("generate",)

    def admit(self, scheduler_output: Any) -> None:
        for request in scheduler_output.scheduled_new_reqs:
            assert request.pooling_params is None, "a generating runner cannot pool"
            assert request.sampling_params.max_tokens >= 1

    def finish_step(self, step: Step, sampled: list[list[int]]) -> Any:
        self.output = step.output(sampled, asynchronous=self.asynchronous)
        return self.output


class FakeRunnerV1(FakeRunner):
    """Of vLLM's V1 runner what the mixin uses; a row whose mask is set on the device brings no token."""

    def __init__(self, vllm_config: Any, device: Any = None) -> None:
        super().__init__(vllm_config, device)
        cpu = torch.device("cpu")
        self.query_start_loc = CpuGpuBuffer(17, dtype=torch.int32, device=cpu)
        self.discard_request_mask = CpuGpuBuffer(16, dtype=torch.bool, device=cpu)
        self.execute_model_state: ExecuteModelState | None = None

    def _update_states(self, scheduler_output: Any) -> str:
        self.admit(scheduler_output)
        return "deferred"

    def run(self, step: Step) -> Any:
        assert self._update_states(step.scheduler_output) == "deferred"
        count = len(step.rows)
        self.step = step
        self.input_batch = SimpleNamespace(
            req_ids=step.request_ids, num_reqs=count, num_computed_tokens_cpu=step.computed
        )
        self.query_start_loc.np[: count + 1] = step.starts
        self.discard_request_mask.np[:count] = [name in step.unfinished for name in step.request_ids]
        self.discard_request_mask.copy_to_gpu(count)
        empty = ExecuteModelState(*[None] * len(ExecuteModelState._fields))
        self.execute_model_state = empty._replace(hidden_states=step.hidden_states)
        self.before_sampling()
        return self.sample_tokens(None)

    def before_sampling(self) -> None:
        """For tests of what holds while the model runs."""

    def sample_tokens(self, grammar_output: Any) -> Any:
        if self.execute_model_state is None:
            return EMPTY_MODEL_RUNNER_OUTPUT
        self.execute_model_state = None
        discarded = self.discard_request_mask.gpu
        return self.finish_step(
            self.step, [[] if discarded[row] else [TOKEN] for row in range(len(self.step.rows))]
        )


class FakeRunnerV2(FakeRunner):
    """Of vLLM's V2 runner what the mixin uses; a row whose count is 0 brings no token."""

    def finish_requests(self, scheduler_output: Any) -> None:
        self.gone = scheduler_output.finished_req_ids | scheduler_output.preempted_req_ids

    def add_requests(self, scheduler_output: Any) -> None:
        self.admit(scheduler_output)

    def run(self, step: Step) -> Any:
        self.finish_requests(step.scheduler_output)
        assert self.gone == step.finished | step.preempted
        self.add_requests(step.scheduler_output)
        self.step = step
        return self.sample_tokens(None)

    def sample(
        self, hidden_states: torch.Tensor, input_batch: Any, grammar_output: Any
    ) -> tuple[Any, torch.Tensor, torch.Tensor]:
        counts = torch.tensor([name not in self.step.unfinished for name in self.step.request_ids]).int()
        return "sampler output", counts, torch.zeros_like(counts)

    def sample_tokens(self, grammar_output: Any) -> Any:
        batch = SimpleNamespace(
            req_ids=self.step.request_ids,
            num_reqs=len(self.step.rows),
            query_start_loc_np=self.step.starts,
            num_computed_tokens_np=self.step.computed,
        )
        sampled, counts, rejected = self.sample(self.step.hidden_states, batch, grammar_output)
        assert sampled == "sampler output"
        assert not rejected.any()
        return self.finish_step(self.step, [[TOKEN] * int(count) for count in counts])


MIXINS = {"v1": (EmbeddingV1, FakeRunnerV1), "v2": (EmbeddingV2, FakeRunnerV2)}


@pytest.fixture
def runner_of() -> Any:
    """A runner of a version with its mixin; by version, method and whether outputs come later."""

    def build(version: str, method: str = "mean", *, asynchronous: bool = False) -> Any:
        additional = PluginOptions(embedding=EmbeddingOptions(method=method)).to_additional_config()
        model = SimpleNamespace(hf_text_config=SimpleNamespace(num_hidden_layers=2))
        config = SimpleNamespace(additional_config=additional, model_config=model, asynchronous=asynchronous)
        return type("Runner", MIXINS[version], {})(config, torch.device("cpu"))

    return build
