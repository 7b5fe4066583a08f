"""The dual engine on runner V2, CUDA's default, through Triton's interpreter; a token takes about 0.2 s."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from loadtest import reference
from loadtest.servers import FLOAT32, Server, galley_worker
from tests.e2e.texts import PROMPTS, SHORT_TEXTS, long_text
from tests.support.shallow_model import LAYERS

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.engine

V2_ON_CPU = Path(__file__).parents[1] / "support" / "v2_on_cpu"
OPTIONS = {**FLOAT32, "max-model-len": 1024, "max-num-batched-tokens": 128, "max-num-seqs": 8}
# layers x keys and values x 3 heads x 64 x 4 bytes, 128 tokens a block
BLOCK_BYTES = LAYERS * 2 * 3 * 64 * 4 * 128


@pytest.fixture(scope="module")
def plain_chats(plain_shallow: Server) -> list[str]:
    return [content_of(plain_shallow, prompt) for prompt in PROMPTS[:3]]


@pytest.fixture(scope="module")
def engine(shallow: str) -> Iterator[Server]:
    environment = {"PYTHONPATH": str(V2_ON_CPU), "TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
    small = {**OPTIONS, "kv-cache-memory-bytes": 9 * BLOCK_BYTES, "no-scheduler-reserve-full-isl": True}
    with galley_worker(small, env=environment, weights=shallow) as server:
        yield server


def content_of(server: Server, prompt: str) -> str:
    return server.chat(prompt, max_tokens=12)["choices"][0]["message"]["content"]


def test_it_is_runner_v2(engine: Server) -> None:
    (worker,) = engine.client.get("/galley/status").json()["workers"]
    assert worker["runner_version"] == 2
    assert worker["tasks"] == ["generate", "embed"]


def test_chats_equal_plain_vllm_and_embeddings_the_reference_in_the_same_batches(
    engine: Server, plain_chats: list[str], shallow: str
) -> None:
    texts = [SHORT_TEXTS[0], long_text(60, seed=3), SHORT_TEXTS[1]]  # the second spans three chunks
    with ThreadPoolExecutor(6) as pool:
        chats = [pool.submit(content_of, engine, prompt) for prompt in PROMPTS[:3]]
        vectors = [pool.submit(engine.embed, text) for text in texts]
        assert [chat.result() for chat in chats] == plain_chats
        for text, vector in zip(texts, vectors, strict=True):
            assert reference.cosine(vector.result()[0], reference.embed(text, weights=shallow)) > 0.999


def test_the_longest_prompt_and_a_short_vector(engine: Server, shallow: str) -> None:
    ids = [(index * 37) % 40000 + 100 for index in range(1023)]
    (vector,) = engine.embed(ids, dimensions=32)
    assert reference.cosine(vector, reference.embed(ids, dimensions=32, weights=shallow)) > 0.999


def test_many_inputs_in_one_request_come_back_in_order(engine: Server, shallow: str) -> None:
    texts = [long_text(1 + index % 5, seed=31 * index) for index in range(64)]
    for text, vector in zip(texts, engine.embed(texts), strict=True):
        assert reference.cosine(vector, reference.embed(text, weights=shallow)) > 0.999


def test_a_chat_reads_the_prefix_that_an_embedding_left_and_the_embedding_none(
    engine: Server, shallow: str
) -> None:
    shared = long_text(60, seed=5)
    alone = reference.embed(shared, weights=shallow)
    (first,) = engine.embed(shared)
    hits = engine.metric("vllm:prefix_cache_hits_total")
    completion = {"model": "smollm2", "prompt": shared, "max_tokens": 4, "temperature": 0}
    with_cache = engine.client.post("/v1/completions", json=completion).json()["choices"][0]["text"]
    assert engine.metric("vllm:prefix_cache_hits_total") > hits
    (second,) = engine.embed(shared)
    assert reference.cosine(first, alone) > 0.9999
    assert reference.cosine(second, alone) > 0.9999
    fresh = engine.client.post("/v1/completions", json={**completion, "cache_salt": "another"}).json()
    assert with_cache == fresh["choices"][0]["text"]


def test_preempted_chats_and_embeddings_are_unchanged(
    engine: Server, plain_shallow: Server, shallow: str
) -> None:
    """Six chats that each grow into a second block, and embeddings of three, in room for nine blocks."""
    things = ("bread", "rain", "iron", "maps", "music", "trade")
    prompts = [f"Say something about {thing}: {long_text(27, seed=7)}" for thing in things]
    options = {"max_tokens": 45, "ignore_eos": True}
    before = engine.metric("vllm:num_preemptions_total")
    with ThreadPoolExecutor(3) as pool:
        alone = list(pool.map(partial(plain_shallow.chat, **options), prompts))
    texts = [long_text(60, seed=seed) for seed in (8, 9)]
    with ThreadPoolExecutor(8) as pool:
        chats = [pool.submit(engine.chat, prompt, **options) for prompt in prompts]
        vectors = [pool.submit(engine.embed, text) for text in texts]
        together = [chat.result() for chat in chats]
        pooled = [vector.result()[0] for vector in vectors]
    assert engine.metric("vllm:num_preemptions_total") > before
    for one, other in zip(alone, together, strict=True):
        assert one["choices"][0]["message"]["content"] == other["choices"][0]["message"]["content"]
    for text, vector in zip(texts, pooled, strict=True):
        assert reference.cosine(vector, reference.embed(text, weights=shallow)) > 0.999
