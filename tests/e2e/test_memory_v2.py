"""Memories on runner V2, CUDA's default, through Triton's interpreter; a step takes about 0.2 s."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from loadtest import reference
from loadtest.servers import FLOAT32, NAME, Server, galley_worker
from tests.e2e.texts import SHORT_TEXTS
from tests.support.small_memory import MixReference, assert_greedy, make_memory

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.engine

V2_ON_CPU = Path(__file__).parents[1] / "support" / "v2_on_cpu"
ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join([str(V2_ON_CPU), *filter(None, [os.environ.get("PYTHONPATH")])]),
    "TRITON_INTERPRET": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "1",
}
OPTIONS = {**FLOAT32, "max-model-len": 512, "max-num-batched-tokens": 64, "max-num-seqs": 8}
PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def memory(shallow: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_memory(tmp_path_factory.mktemp("memory"), Path(shallow), layer=5, weight=0.3, seed=1)


@pytest.fixture(scope="module")
def engine(shallow: str, memory: Path) -> Iterator[Server]:
    speculation = {"method": "hybrid", "max_draft_tokens": 3}
    flags = ("--memory", json.dumps({"path": str(memory)}), "--speculation", json.dumps(speculation))
    with galley_worker(OPTIONS, *flags, env=ENVIRONMENT, weights=shallow) as server:
        yield server


def complete(server: Server, **fields: Any) -> dict[str, Any]:
    body = {"model": NAME, "prompt": PROMPT, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    body |= {"logprobs": 1, "return_token_ids": True, **fields}
    answer = server.client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    choice: dict[str, Any] = answer.json()["choices"][0]
    return choice


def test_requests_get_their_own_mix_with_drafts_and_beside_embeddings(
    engine: Server, shallow: str, memory: Path
) -> None:
    (worker,) = engine.client.get("/galley/status").json()["workers"]
    assert worker["runner_version"] == 2
    assert worker["memory"] == [{"name": "memory", "layer": 5, "weight": 0.3}]
    mix = MixReference(Path(shallow), [memory])
    requests: list[tuple[dict[str, float], float]] = [
        ({}, 0.3), ({"memory_weight": 0}, 0.0), ({"memory_weight": 0.6}, 0.6), ({"memory_weight": 0.6}, 0.6)
    ]  # fmt: skip
    with ThreadPoolExecutor(5) as pool:
        vector = pool.submit(engine.embed, SHORT_TEXTS[0])
        answers = list(pool.map(lambda each: complete(engine, vllm_xargs=each[0]), requests))
        expected = reference.embed(SHORT_TEXTS[0], weights=shallow)
        assert reference.cosine(vector.result()[0], expected) > 0.9999
    for (_, weight), answer in zip(requests, answers, strict=True):
        assert_greedy(mix, answer["prompt_token_ids"], answer, [weight])
    before = engine.metric("vllm:spec_decode_num_accepted_tokens_total")
    again = complete(engine, vllm_xargs={"memory_weight": 0.6})
    assert again["token_ids"] == answers[2]["token_ids"]
    assert engine.metric("vllm:spec_decode_num_accepted_tokens_total") > before


def test_log_probabilities_of_a_prompt_are_the_mixs(engine: Server, shallow: str, memory: Path) -> None:
    answer = complete(engine, prompt_logprobs=0, max_tokens=1)
    ids = answer["prompt_token_ids"]
    expected = MixReference(Path(shallow), [memory]).log_probs(ids, [0.3])
    for place in range(1, len(ids)):
        found = answer["prompt_logprobs"][place][str(ids[place])]["logprob"]
        assert found == pytest.approx(expected[place - 1, ids[place]].item(), abs=2e-3)
