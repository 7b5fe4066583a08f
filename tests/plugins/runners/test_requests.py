from __future__ import annotations

from typing import Any

import pytest
import torch
from vllm.pooling_params import PoolingParams
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

from galley_plugins.embedding.pooling import MeanPool, PromptPooler
from galley_plugins.memory.requests import memory_weights
from galley_plugins.runners.requests import register_prompt, with_vectors


def new_request(**fields: Any) -> NewRequestData:
    values: dict[str, Any] = {
        "req_id": "a",
        "prompt_token_ids": [5, 6, 7],
        "mm_features": [],
        "sampling_params": None,
        "pooling_params": None,
        "block_ids": ([1],),
        "num_computed_tokens": 0,
        "lora_request": None,
    }
    return NewRequestData(**{**values, **fields})


def pooled(pooler: PromptPooler, rows: list[list[float]]) -> list[float]:
    vector = pooler.pool("a", torch.tensor(rows), 0)
    assert vector is not None
    return vector.tolist()


def test_an_embedding_becomes_one_greedy_token_for_the_runner() -> None:
    request = new_request(pooling_params=PoolingParams(task="embed"))
    register_prompt(PromptPooler(MeanPool), request)
    assert request.pooling_params is None
    assert request.sampling_params is not None
    assert request.sampling_params.max_tokens == 1
    assert request.sampling_params.temperature == 0
    assert request.sampling_params.n == 1
    assert memory_weights(request.sampling_params.extra_args, {"wiki": 0.25, "code": 0.1}) == (0, 0)


def test_a_chat_is_left_as_it_is() -> None:
    parameters = SamplingParams(temperature=0.7, max_tokens=9)
    request = new_request(sampling_params=parameters)
    pooler = PromptPooler(MeanPool)
    register_prompt(pooler, request)
    assert request.sampling_params is parameters
    assert not pooler


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({}, [0.36, 0.48, 0.8]),  # the default is unit length
        ({"use_activation": True}, [0.36, 0.48, 0.8]),
        ({"use_activation": False}, [3.6, 4.8, 8.0]),
        ({"dimensions": 2}, [0.6, 0.8]),
        ({"dimensions": 2, "use_activation": False}, [3.6, 4.8]),
    ],
)
def test_what_the_request_asks_of_its_vector_is_kept(
    parameters: dict[str, Any], expected: list[float]
) -> None:
    pooler = PromptPooler(MeanPool)
    register_prompt(pooler, new_request(pooling_params=PoolingParams(task="embed", **parameters)))
    assert pooled(pooler, [[3.6, 4.8, 8.0]] * 3) == pytest.approx(expected)


def test_a_prompt_of_embeddings_is_as_long_as_its_rows() -> None:
    request = new_request(
        prompt_token_ids=None, prompt_embeds=torch.zeros(2, 16), pooling_params=PoolingParams(task="embed")
    )
    pooler = PromptPooler(MeanPool)
    register_prompt(pooler, request)
    assert pooled(pooler, [[0.0, 2.0], [0.0, 4.0]]) == [0.0, 1.0]


class Later(AsyncModelRunnerOutput):
    """An output that the device is still computing."""

    def __init__(self, output: ModelRunnerOutput) -> None:
        self.output = output
        self.awaited = 0

    def get_output(self) -> ModelRunnerOutput:
        self.awaited += 1
        return self.output


def step_output() -> ModelRunnerOutput:
    return ModelRunnerOutput(["x", "y", "z"], {"x": 0, "y": 1, "z": 2}, [[1], [], [3]])


def test_vectors_stand_at_the_rows_of_their_requests() -> None:
    vector = torch.tensor([0.6, 0.8])
    output = with_vectors(step_output(), {"y": vector})
    assert output.pooler_output[0] is None
    assert output.pooler_output[1] is vector
    assert output.pooler_output[2] is None
    assert output.sampled_token_ids == [[1], [], [3]]


def test_an_asynchronous_output_gets_them_when_it_is_awaited_and_not_before() -> None:
    vector, inner = torch.tensor([0.6, 0.8]), Later(step_output())
    outer = with_vectors(inner, {"z": vector})
    assert isinstance(outer, AsyncModelRunnerOutput)
    assert inner.awaited == 0
    output = outer.get_output()
    assert inner.awaited == 1
    assert output.pooler_output[:2] == [None, None]
    assert output.pooler_output[2] is vector
    assert output.sampled_token_ids == [[1], [], [3]]
