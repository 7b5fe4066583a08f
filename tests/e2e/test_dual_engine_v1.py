"""One engine, one set of weights: chats and embeddings in the same batches, on runner V1 in float32."""

from __future__ import annotations

import base64
import itertools
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

import pytest

from loadtest import reference
from loadtest.servers import FLOAT32, Server, galley_worker
from tests.e2e.texts import PROMPTS, SHORT_TEXTS, long_text

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.engine

CHAT = {"max_tokens": 48, "logprobs": True}


@pytest.fixture(scope="module")
def plain_chats(plain_engine: Server) -> list[list[str]]:
    """Tokens of each prompt's answer from plain vLLM."""
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(partial(tokens_of, plain_engine), PROMPTS))


@pytest.fixture(scope="module")
def engine() -> Iterator[Server]:
    with galley_worker({**FLOAT32, "max-num-batched-tokens": 128, "max-num-seqs": 64}) as server:
        yield server


def tokens_of(server: Server, prompt: str) -> list[str]:
    return [item["token"] for item in server.chat(prompt, **CHAT)["choices"][0]["logprobs"]["content"]]


class EmbeddingTraffic:
    """Embedding requests, short and over several chunks, one after another until the scope ends."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(2)
        self.answers: list[tuple[str, list[float]]] = []

    def __enter__(self) -> EmbeddingTraffic:
        self._runs = [self._pool.submit(self._run, worker) for worker in range(2)]
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        for run in self._runs:
            run.result(120)
        self._pool.shutdown()

    def _run(self, worker: int) -> None:
        for turn in itertools.count():
            if self._stop.is_set():
                return
            texts = [SHORT_TEXTS[turn % len(SHORT_TEXTS)], long_text(75, seed=turn + 1000 * worker)]
            self.answers += zip(texts, self._server.embed(texts), strict=True)


def test_chats_equal_plain_vllm_while_embeddings_run_in_the_same_batches(
    engine: Server, plain_chats: list[list[str]]
) -> None:
    with EmbeddingTraffic(engine) as traffic, ThreadPoolExecutor(4) as pool:
        chats = list(pool.map(lambda prompt: tokens_of(engine, prompt), PROMPTS))
    assert chats == plain_chats
    assert len(traffic.answers) >= 8
    for text, vector in traffic.answers[:24]:
        assert reference.cosine(vector, reference.embed(text)) > 0.999


def test_the_capital_of_france_is_paris(engine: Server) -> None:
    assert "Paris" in engine.chat(PROMPTS[0], max_tokens=32)["choices"][0]["message"]["content"]


@pytest.mark.parametrize("words", [1, 24, 120, 380])
def test_an_embedding_equals_the_reference_over_any_number_of_chunks(engine: Server, words: int) -> None:
    text = long_text(words, seed=words)
    (vector,) = engine.embed(text)
    assert reference.cosine(vector, reference.embed(text)) > 0.9999
    assert sum(value * value for value in vector) == pytest.approx(1, abs=1e-4)


def test_sixty_four_inputs_in_one_request_come_back_in_order(engine: Server) -> None:
    texts = [long_text(3 + index % 40, seed=31 * index) for index in range(64)]
    vectors = engine.embed(texts)
    assert len(vectors) == 64
    for text, vector in zip(texts, vectors, strict=True):
        assert reference.cosine(vector, reference.embed(text)) > 0.999


def test_a_chat_reads_the_prefix_that_an_embedding_left_and_the_embedding_none(engine: Server) -> None:
    shared = long_text(300, seed=5)
    alone = reference.embed(shared)
    (first,) = engine.embed(shared)
    hits = engine.metric("vllm:prefix_cache_hits_total")
    completion = {"model": "smollm2", "prompt": shared, "max_tokens": 8, "temperature": 0}
    with_cache = engine.client.post("/v1/completions", json=completion).json()["choices"][0]["text"]
    assert engine.metric("vllm:prefix_cache_hits_total") > hits  # the chat reused the embedding's blocks
    (second,) = engine.embed(shared)  # every row is computed again, so the mean stays whole
    assert reference.cosine(first, alone) > 0.9999
    assert reference.cosine(second, alone) > 0.9999
    fresh = engine.client.post("/v1/completions", json={**completion, "cache_salt": "another"}).json()
    assert with_cache == fresh["choices"][0]["text"]


def test_token_ids_and_lists_of_them_are_inputs_too(engine: Server) -> None:
    ids = [[504, 28, 9], [1, 2, 3, 4]]
    vectors = engine.embed(ids)
    for row, vector in zip(ids, vectors, strict=True):
        assert reference.cosine(vector, reference.embed(row)) > 0.9999
    assert engine.embed(ids[0]) == [pytest.approx(vectors[0], abs=1e-5)]


def test_dimensions_shorten_the_vector_and_keep_it_unit_length(engine: Server) -> None:
    (vector,) = engine.embed(SHORT_TEXTS[0], dimensions=64)
    assert len(vector) == 64
    assert reference.cosine(vector, reference.embed(SHORT_TEXTS[0], dimensions=64)) > 0.9999
    assert sum(value * value for value in vector) == pytest.approx(1, abs=1e-4)


def test_base64_carries_the_same_float32_numbers(engine: Server) -> None:
    body = {"model": "smollm2", "input": SHORT_TEXTS[1], "encoding_format": "base64"}
    encoded = engine.client.post("/v1/embeddings", json=body).json()["data"][0]["embedding"]
    raw = base64.b64decode(encoded)
    numbers = struct.unpack(f"<{len(raw) // 4}f", raw)
    assert list(numbers) == pytest.approx(engine.embed(SHORT_TEXTS[1])[0], abs=1e-6)


def test_the_longest_prompt_is_embedded_and_one_token_more_is_refused_with_the_limit(engine: Server) -> None:
    limit = FLOAT32["max-model-len"]  # one position is kept for the token that a generating engine samples
    ids = [(index * 37) % 40000 + 100 for index in range(limit)]
    (vector,) = engine.embed(ids[:-1])
    assert reference.cosine(vector, reference.embed(ids[:-1])) > 0.999
    refused = engine.client.post("/v1/embeddings", json={"model": "smollm2", "input": ids})
    assert refused.status_code == 400
    assert str(limit) in refused.json()["error"]["message"]


def test_a_seeded_prompt_over_several_chunks_is_sampled_the_same_way_each_time(engine: Server) -> None:
    """Plain vLLM's CPU engine dies of this request."""
    question = "Summarise: " + long_text(120)
    options = {"max_tokens": 12, "temperature": 1.0}
    (first, second, other) = (
        engine.chat(question, **options, seed=seed)["choices"][0]["message"]["content"] for seed in (5, 5, 6)
    )
    assert first == second != other


def test_every_process_of_the_engine_reports_the_plugins(engine: Server) -> None:
    status = engine.client.get("/galley/status").json()
    pids = {process["process"]: process["pid"] for process in status["processes"]}
    assert set(pids) == {"MainProcess", "EngineCore"}
    assert status["workers"][0]["pid"] == pids["EngineCore"]  # a worker alone needs no process of its own
    assert status["workers"][0]["tasks"] == ["generate", "embed"]
    assert status["workers"][0]["runner_version"] == 1
    assert status["vllm"].startswith("0.32")
