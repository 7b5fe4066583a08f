"""Speculation on runner V1: the same answers in fewer steps, whatever else the request asks for."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

import openai
import pytest

from loadtest import reference
from loadtest.servers import FLOAT32, NAME, Server, galley_worker
from tests.e2e.spec_prompts import spec_prompts
from tests.e2e.texts import PROMPTS, SHORT_TEXTS, long_text

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.engine

OPTIONS = {**FLOAT32, "max-num-seqs": 16, "max-num-batched-tokens": 64}
TOKENS = 64
ALONE = 1  # prompts for each kind of request on its own; together they are 4
GRAMMAR = {
    "type": "json_schema",
    "json_schema": {
        "name": "city",
        "schema": {
            "type": "object",
            "properties": {"name": {"type": "string", "maxLength": 20}, "people": {"type": "integer"}},
            "required": ["name", "people"],
        },
    },
}
# What else a request may ask for; each is answered once without speculation and compared.
REQUESTS: dict[str, dict[str, Any]] = {
    "stop string": {"stop": ["capital", "the "], "max_tokens": TOKENS},
    "log-probabilities": {"logprobs": True, "top_logprobs": 3, "max_tokens": 40},
    "penalties": {"presence_penalty": 0.7, "frequency_penalty": 0.4, "max_tokens": TOKENS},
    "repetition penalty": {"repetition_penalty": 1.3, "max_tokens": TOKENS},
    "bad words": {"bad_words": [" the", " of"], "max_tokens": TOKENS},
    "seed": {"temperature": 0.8, "seed": 7, "max_tokens": TOKENS},
    "seed and nucleus": {"temperature": 1.1, "seed": 8, "top_p": 0.8, "top_k": 40, "max_tokens": TOKENS},
    "json": {"response_format": GRAMMAR, "max_tokens": TOKENS},
    "min_p": {"min_p": 0.2, "temperature": 0.9, "seed": 3, "max_tokens": 32},
    "logit_bias": {"logit_bias": {"28": -100, "1": -5}, "max_tokens": 32},
    "min_tokens": {"min_tokens": 30, "max_tokens": 48},
    "one token": {"max_tokens": 1},
    "two tokens": {"max_tokens": 2},
}


def summary(answer: dict[str, Any]) -> Any:
    choice = answer["choices"][0]
    return choice["message"]["content"], choice["finish_reason"], answer["usage"]["completion_tokens"]


def together(server: Server, prompts: list[str], width: int, **fields: Any) -> list[Any]:
    with ThreadPoolExecutor(width) as pool:
        return list(pool.map(lambda prompt: summary(server.chat(prompt, **fields)), prompts))


@pytest.fixture(scope="module")
def plain(plain_shallow: Server) -> dict[str, Any]:
    """Answers of vLLM itself, without plugins."""
    found: dict[str, Any] = {"prompts": together(plain_shallow, spec_prompts(60), 20, max_tokens=TOKENS)}
    with ThreadPoolExecutor(16) as pool:
        waiting = {
            name: pool.map(partial(plain_shallow.chat, **fields), PROMPTS[:4])
            for name, fields in REQUESTS.items()
        }
        found |= {name: list(answers) for name, answers in waiting.items()}
    found["long"] = summary(plain_shallow.chat(long_text(120), max_tokens=48))
    return found


@pytest.fixture(scope="module")
def engine(shallow: str) -> Iterator[Server]:
    with galley_worker(OPTIONS, "--speculation", json.dumps({"method": "hybrid"}), weights=shallow) as server:
        yield server


@pytest.mark.parametrize("width", [1, 8])
def test_greedy_answers_are_the_same(engine: Server, plain: dict[str, Any], width: int) -> None:
    before = engine.metric("galley_speculation_accepted_tokens_total")
    count = 60 if width > 1 else 15
    found = together(engine, spec_prompts(60)[:count], width, max_tokens=TOKENS)
    assert found == plain["prompts"][:count]
    assert engine.metric("galley_speculation_accepted_tokens_total") > before + count * TOKENS // 10


def test_answers_through_branches_are_the_same(engine: Server, plain: dict[str, Any]) -> None:
    """Some branches won. How often one pays, here, is the machine's to say: so asked until enough did."""
    trees, wins = "galley_speculation_tree_steps_total", "galley_speculation_branch_wins_total"
    for start in range(0, 60, 5):
        if engine.metric(trees) > 20 and engine.metric(wins) > 0:
            break
        prompts, expected = spec_prompts(60)[start : start + 5], plain["prompts"][start : start + 5]
        assert together(engine, prompts, 1, max_tokens=TOKENS) == expected
    assert engine.metric(trees) > 20
    assert engine.metric(wins) > 0


@pytest.mark.parametrize("name", REQUESTS)
def test_everything_else_that_a_request_may_ask_for(engine: Server, plain: dict[str, Any], name: str) -> None:
    answers = [engine.chat(prompt, **REQUESTS[name]) for prompt in PROMPTS[:ALONE]]
    expected = plain[name][:ALONE]
    assert [summary(answer) for answer in answers] == [summary(answer) for answer in expected]
    if name == "json":
        texts = [
            a["choices"][0]["message"]["content"]
            for a in answers
            if a["choices"][0]["finish_reason"] == "stop"
        ]
        assert all(set(json.loads(text)) == {"name", "people"} for text in texts)
    if name == "log-probabilities":
        for answer, other in zip(answers, expected, strict=True):
            one, two = (a["choices"][0]["logprobs"]["content"] for a in (answer, other))
            assert [entry["token"] for entry in one] == [entry["token"] for entry in two]
            assert [entry["logprob"] for entry in one] == pytest.approx([e["logprob"] for e in two], abs=1e-3)
            assert [[t["token"] for t in e["top_logprobs"]] for e in one] == [
                [t["token"] for t in e["top_logprobs"]] for e in two
            ]


def test_all_of_it_at_once(engine: Server, plain: dict[str, Any], shallow: str) -> None:
    """Every kind of request in the same batches, twice, with prompts in chunks beside them."""
    kinds = [(name, index) for index in range(4) for name in REQUESTS]
    with ThreadPoolExecutor(12) as pool:
        answers = [pool.submit(engine.chat, PROMPTS[index], **REQUESTS[name]) for name, index in kinds]
        long = pool.submit(engine.chat, long_text(120), max_tokens=48)
        vectors = [pool.submit(engine.embed, text) for text in [*SHORT_TEXTS, long_text(80)]]
        for (name, index), answer in zip(kinds, answers, strict=True):
            assert summary(answer.result()) == summary(plain[name][index]), name
        assert summary(long.result()) == plain["long"]
        for text, vector in zip([*SHORT_TEXTS, long_text(80)], vectors, strict=True):
            assert reference.cosine(vector.result()[0], reference.embed(text, weights=shallow)) > 0.999


def test_a_request_may_switch_it_off_or_draft_less(engine: Server, plain: dict[str, Any]) -> None:
    prompt, expected = spec_prompts(60)[0], plain["prompts"][0]
    for value in (False, "false", 0):
        before = engine.metric("galley_speculation_draft_tokens_total")
        answer = engine.chat(prompt, max_tokens=TOKENS, vllm_xargs={"speculation": value})
        assert summary(answer) == expected
        assert engine.metric("galley_speculation_draft_tokens_total") == before
    steps = engine.metric("galley_speculation_request_steps_total")
    drafted = engine.metric("galley_speculation_draft_tokens_total")
    assert summary(engine.chat(prompt, max_tokens=TOKENS, vllm_xargs={"max_draft_tokens": 1})) == expected
    drafted = engine.metric("galley_speculation_draft_tokens_total") - drafted
    assert 0 < drafted <= engine.metric("galley_speculation_request_steps_total") - steps


@pytest.mark.parametrize("extra", [{"speculation": "perhaps"}, {"max_draft_tokens": -3}])
def test_wrong_switches_are_refused_by_name(engine: Server, extra: dict[str, Any]) -> None:
    client = openai.OpenAI(base_url=f"{engine.url}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.BadRequestError, match=f"{next(iter(extra))}: found .* expected"):
        client.chat.completions.create(
            model=NAME, messages=[{"role": "user", "content": "Hi"}], extra_body={"vllm_xargs": extra}
        )


def test_answers_say_what_speculation_did(engine: Server) -> None:
    answer = engine.chat(PROMPTS[3], max_tokens=TOKENS)
    counts = answer["metrics"]["speculative_decoding"]
    assert counts["num_draft_tokens"] >= counts["num_accepted_draft_tokens"] > 0


def test_a_prompt_that_fills_the_context_ends_cleanly(engine: Server) -> None:
    ids = [(index * 37) % 40000 + 100 for index in range(2040)]
    body = {"model": NAME, "prompt": ids, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    answer = engine.client.post("/v1/completions", json=body).json()
    assert answer["usage"]["completion_tokens"] == 8
    off = engine.client.post("/v1/completions", json={**body, "vllm_xargs": {"speculation": 0}}).json()
    assert answer["choices"][0]["text"] == off["choices"][0]["text"]


def test_several_answers_of_one_request_are_independent(engine: Server) -> None:
    body = {
        "model": NAME,
        "prompt": "Once upon a time",
        "n": 4,
        "max_tokens": 24,
        "temperature": 1.0,
        "seed": 5,
    }
    first = engine.client.post("/v1/completions", json=body).json()
    second = engine.client.post("/v1/completions", json={**body, "vllm_xargs": {"speculation": 0}}).json()
    texts = [choice["text"] for choice in first["choices"]]
    assert texts == [choice["text"] for choice in second["choices"]]
    assert len(set(texts)) > 1
