"""Self-drafting on runner V1: the model drafts with part of its layers skipped, and its answers stay."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from galley_plugins.worker.environment import worker_environment
from loadtest import reference
from loadtest.servers import FLOAT32, NAME, Server, galley_worker
from tests.e2e.texts import PROMPTS, SHORT_TEXTS, long_text

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.engine

OPTIONS = {**FLOAT32, "max-num-seqs": 16, "max-num-batched-tokens": 64}
TOKENS = 64
CHATS = PROMPTS[:4]
SAMPLING = {"temperature": 0.8, "top_p": 0.9, "seed": 11}
GRAMMAR = {
    "type": "json_schema",
    "json_schema": {
        "name": "colour",
        "schema": {
            "type": "object",
            "properties": {"colour": {"enum": ["red", "green"]}},
            "required": ["colour"],
        },
    },
}
DRAFTED, ACCEPTED = "galley_speculation_draft_tokens_total", "galley_speculation_accepted_tokens_total"
TRIED, KEPT = "galley_speculation_skip_sets_tried_total", "galley_speculation_skip_sets_kept_total"


def tokens_of(server: Server, prompt: str, **fields: Any) -> list[str]:
    answer = server.chat(
        prompt, **{"max_tokens": TOKENS, "ignore_eos": True, "logprobs": True, "top_logprobs": 1, **fields}
    )
    return [entry["token"] for entry in answer["choices"][0]["logprobs"]["content"]]


def text_of(server: Server, prompt: str, **fields: Any) -> str:
    answer = server.chat(prompt, **{"max_tokens": TOKENS, "ignore_eos": True, **fields})
    return answer["choices"][0]["message"]["content"]


def test_with_nothing_skipped_everything_is_accepted_and_the_cache_stays(shallow: str) -> None:
    """First, before the engine of the other tests starts."""
    environment = {**worker_environment("cpu", os.environ), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    command = [sys.executable, "-m", "tests.support.self_drafting_whole", shallow]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200, check=False)
    assert ran.returncode == 0, ran.stderr[-4000:]
    found = json.loads(ran.stdout.splitlines()[-1])
    assert found["same"]
    assert found["complaints"] == []
    assert found["scores"] == [1.0]
    assert found["drafted"] == found["accepted"] > 100


@pytest.fixture(scope="module")
def plain(plain_shallow: Server) -> dict[str, Any]:
    """Answers of vLLM itself, without plugins."""
    with ThreadPoolExecutor(3) as pool:
        return {
            "greedy": list(pool.map(partial(tokens_of, plain_shallow), CHATS)),
            "sampled": text_of(plain_shallow, PROMPTS[6], **SAMPLING),
            "grammar": text_of(plain_shallow, PROMPTS[1], response_format=GRAMMAR, ignore_eos=False),
        }


@pytest.fixture(scope="module")
def engine(shallow: str) -> Iterator[Server]:
    speculation = {"method": "self", "max_draft_tokens": 8}
    with galley_worker(OPTIONS, "--speculation", json.dumps(speculation), weights=shallow) as server:
        yield server


def test_greedy_answers_are_the_same_alone_and_together(engine: Server, plain: dict[str, Any]) -> None:
    assert [tokens_of(engine, prompt) for prompt in CHATS] == plain["greedy"]
    with ThreadPoolExecutor(len(CHATS)) as pool:
        assert list(pool.map(lambda prompt: tokens_of(engine, prompt), CHATS)) == plain["greedy"]


def test_the_model_drafts_and_searches_what_to_skip(engine: Server) -> None:
    text_of(engine, PROMPTS[3])  # counting: with other answers, more than enough text to score sets on
    drafted, accepted = engine.metric(DRAFTED), engine.metric(ACCEPTED)
    assert drafted >= accepted > 0
    assert engine.metric(TRIED) >= engine.metric(KEPT) >= 1


def test_text_that_was_drafted_is_cached_as_the_whole_model_computed_it(engine: Server) -> None:
    """A prompt that goes on from an answer reads the answer's blocks, and continues as without them."""
    body = {"model": NAME, "temperature": 0, "ignore_eos": True}
    ids = [(index * 37) % 40000 + 100 for index in range(40)]

    def completed(prompt: list[int], tokens: int, **fields: Any) -> Any:
        asked = {**body, "prompt": prompt, "max_tokens": tokens, "return_token_ids": True, **fields}
        return engine.client.post("/v1/completions", json=asked).json()["choices"][0]

    longer = ids + completed(ids, 120)["token_ids"]
    hits = engine.metric("vllm:prefix_cache_hits_total")
    cached = completed(longer, 24)["token_ids"]
    assert engine.metric("vllm:prefix_cache_hits_total") - hits >= 128
    assert cached == completed(longer, 24, cache_salt="another")["token_ids"]


def test_other_requests_run_beside_it(engine: Server, plain: dict[str, Any], shallow: str) -> None:
    with ThreadPoolExecutor(8) as pool:
        chats = [pool.submit(tokens_of, engine, prompt) for prompt in CHATS[:3]]
        sampled = pool.submit(text_of, engine, PROMPTS[6], **SAMPLING)
        grammar = pool.submit(text_of, engine, PROMPTS[1], response_format=GRAMMAR, ignore_eos=False)
        vectors = {text: pool.submit(engine.embed, text) for text in (SHORT_TEXTS[0], long_text(60))}
        assert [chat.result() for chat in chats] == plain["greedy"][:3]
        assert sampled.result() == plain["sampled"]
        assert grammar.result() == plain["grammar"]
        for text, vector in vectors.items():
            assert reference.cosine(vector.result()[0], reference.embed(text, weights=shallow)) > 0.999


def test_a_request_may_decline_drafts_or_ask_for_fewer(engine: Server, plain: dict[str, Any]) -> None:
    drafted, tried = engine.metric(DRAFTED), engine.metric(TRIED)
    off = {"vllm_xargs": {"speculation": False}}
    assert tokens_of(engine, CHATS[2], **off) == plain["greedy"][2]
    assert (engine.metric(DRAFTED), engine.metric(TRIED)) == (drafted, tried)
    steps = engine.metric("galley_speculation_request_steps_total")
    assert tokens_of(engine, CHATS[2], vllm_xargs={"max_draft_tokens": 1}) == plain["greedy"][2]
    assert engine.metric(DRAFTED) - drafted > 0
    assert engine.metric(DRAFTED) - drafted <= engine.metric("galley_speculation_request_steps_total") - steps


def test_an_answer_up_to_the_end_of_the_context_ends_cleanly(engine: Server) -> None:
    ids = [(index * 37) % 40000 + 100 for index in range(2030)]
    body = {"model": NAME, "prompt": ids, "max_tokens": 18, "temperature": 0, "ignore_eos": True}
    answer = engine.client.post("/v1/completions", json=body).json()
    assert answer["usage"]["completion_tokens"] == 18
    off = engine.client.post("/v1/completions", json={**body, "vllm_xargs": {"speculation": False}}).json()
    assert answer["choices"][0]["text"] == off["choices"][0]["text"]
