"""Speculation on runner V2, CUDA's default, through Triton's interpreter; a step takes about 0.2 s."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from loadtest import reference
from loadtest.servers import FLOAT32, Server, galley_worker
from tests.e2e.texts import PROMPTS, SHORT_TEXTS, long_text

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.engine

V2_ON_CPU = Path(__file__).parents[1] / "support" / "v2_on_cpu"
ENVIRONMENT = {"PYTHONPATH": str(V2_ON_CPU), "TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
OPTIONS = {**FLOAT32, "max-model-len": 1024, "max-num-batched-tokens": 128, "max-num-seqs": 8}
TOKENS, DRAFT = 16, 6
REPEATING = "Repeat this three times: red green blue, red green blue, red green blue."
CHATS = [PROMPTS[0], REPEATING, PROMPTS[1]]
ACCEPTED = "vllm:spec_decode_num_accepted_tokens_total"
DRAFTED = "vllm:spec_decode_num_draft_tokens_total"
DRAFTS = "vllm:spec_decode_num_drafts_total"
GENERATED = "vllm:generation_tokens_total"

each_method = pytest.mark.parametrize("engine", ["recycling", "hybrid"], indirect=True)
hybrid = pytest.mark.parametrize("engine", ["hybrid"], indirect=True)


@pytest.fixture(scope="module")
def plain_chats(plain_shallow: Server) -> list[str]:
    return [content_of(plain_shallow, prompt) for prompt in CHATS]


@pytest.fixture(scope="module")
def engine(request: pytest.FixtureRequest, shallow: str) -> Iterator[Server]:
    speculation = {"method": request.param, "max_draft_tokens": DRAFT}
    config = {"method": "ngram_gpu", "num_speculative_tokens": DRAFT}
    options = {**OPTIONS, "speculative-config": config}
    with galley_worker(
        options, "--speculation", json.dumps(speculation), env=ENVIRONMENT, weights=shallow
    ) as server:
        yield server


def content_of(server: Server, prompt: str, **fields: Any) -> str:
    answer = server.chat(prompt, **{"max_tokens": TOKENS, "ignore_eos": True, **fields})
    return answer["choices"][0]["message"]["content"]


@each_method
def test_chats_alone_and_together_equal_those_without_speculation(
    engine: Server, plain_chats: list[str]
) -> None:
    (worker,) = engine.client.get("/galley/status").json()["workers"]
    assert worker["runner_version"] == 2
    assert [content_of(engine, prompt) for prompt in CHATS] == plain_chats
    with ThreadPoolExecutor(len(CHATS)) as pool:
        assert list(pool.map(lambda prompt: content_of(engine, prompt), CHATS)) == plain_chats


@each_method
def test_what_was_said_before_is_drafted_and_accepted(engine: Server, plain_chats: list[str]) -> None:
    content_of(engine, CHATS[1])
    before = {name: engine.metric(name) for name in (ACCEPTED, DRAFTED, DRAFTS)}
    assert content_of(engine, CHATS[1]) == plain_chats[1]
    accepted, drafted, drafts = (engine.metric(name) - count for name, count in before.items())
    assert TOKENS / 4 < accepted <= drafted <= DRAFT * drafts


@hybrid
def test_counters_follow_vllms_own(engine: Server) -> None:
    time.sleep(1.1)  # they leave the device about once a second
    content_of(engine, "Say hello.", max_tokens=4)
    for name, own in ((DRAFTED, "draft_tokens"), (ACCEPTED, "accepted_tokens")):
        counted = engine.metric(f"galley_speculation_{own}_total")
        assert counted == pytest.approx(engine.metric(name), abs=2 * DRAFT)
    assert engine.metric("galley_speculation_draft_seconds_total") > 0
    assert engine.metric("galley_speculation_request_steps_total") > TOKENS


@hybrid
def test_a_request_may_decline_drafts_or_ask_for_fewer(engine: Server, plain_chats: list[str]) -> None:
    drafted = engine.metric(DRAFTED)
    assert content_of(engine, CHATS[1], vllm_xargs={"speculation": False}) == plain_chats[1]
    assert engine.metric(DRAFTED) == drafted
    drafts = engine.metric(DRAFTS)
    assert content_of(engine, CHATS[1], vllm_xargs={"max_draft_tokens": 1}) == plain_chats[1]
    assert 0 < engine.metric(DRAFTED) - drafted <= engine.metric(DRAFTS) - drafts


@hybrid
def test_sampled_requests_run_beside_greedy_ones(engine: Server, plain_chats: list[str]) -> None:
    sampling = {
        "temperature": 0.8,
        "seed": 11,
        "max_tokens": 8,
    }  # vLLM's kernel for top_p does not run in the interpreter
    alone = {**sampling, "vllm_xargs": {"speculation": False}}
    with ThreadPoolExecutor(4) as pool:
        chats = [pool.submit(content_of, engine, prompt) for prompt in CHATS[:2]]
        with_drafts = pool.submit(content_of, engine, PROMPTS[2], **sampling)
        without = pool.submit(content_of, engine, PROMPTS[2], **alone)
        assert [chat.result() for chat in chats] == plain_chats[:2]
        assert with_drafts.result()
        # Seeded sampling is exact without drafts, in whatever batch; with them only its distribution is.
        assert without.result() == content_of(engine, PROMPTS[2], **alone)


@hybrid
def test_embeddings_in_the_same_batches_equal_the_reference(
    engine: Server, plain_chats: list[str], shallow: str
) -> None:
    texts = [SHORT_TEXTS[0], long_text(60, seed=3)]  # the second spans three chunks
    with ThreadPoolExecutor(5) as pool:
        chats = [pool.submit(content_of, engine, prompt) for prompt in CHATS]
        vectors = [pool.submit(engine.embed, text) for text in texts]
        assert [chat.result() for chat in chats] == plain_chats
        for text, vector in zip(texts, vectors, strict=True):
            assert reference.cosine(vector.result()[0], reference.embed(text, weights=shallow)) > 0.999


@hybrid
def test_a_prompt_of_one_token_beside_a_chat_is_not_pooled_with_its_padding(
    engine: Server, shallow: str
) -> None:
    """vLLM pads the step of a prompt's last token with placeholders of drafts, where others decode."""
    before = engine.metric(GENERATED)
    with ThreadPoolExecutor(1) as pool:
        chat = pool.submit(content_of, engine, CHATS[0], max_tokens=30, vllm_xargs={"speculation": False})
        while engine.metric(GENERATED) == before:
            time.sleep(0.05)
        (vector,) = engine.embed([504])
        assert not chat.done()
        assert reference.cosine(vector, reference.embed([504], weights=shallow)) > 0.999
        chat.result()
