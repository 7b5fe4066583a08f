"""Every way to embed equals a reference by transformers, beside chats and drafts, which stay what they were."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch

from loadtest import reference
from loadtest.servers import FLOAT32, NAME, Server, galley_worker
from tests.e2e.texts import PROMPTS, SHORT_TEXTS, long_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.engine

# Prompts longer than a step are computed in chunks, or in a step of their own.
OPTIONS = {**FLOAT32, "max-num-seqs": 16, "max-num-batched-tokens": 64}
SENTENCES = [
    "A galley proof is checked before it is printed.",
    "Two men are playing chess in the park.",
    "It rained.",
    long_text(60) + ".",  # about 300 tokens
]
METHODS: dict[str, tuple[dict[str, Any], Callable[[str], torch.Tensor]]] = {
    "prompt-eol": ({"output_layer": 20}, partial(reference.prompt_eol, layer=20)),
    "echo": ({}, reference.echo),
    "token-prepending": (
        {"prompt": "prompt-eol", "start_layer": 2, "exit_layer": 8, "output_layer": 27},
        partial(reference.token_prepending, start=2, stop=8, layer=27),
    ),
}


@pytest.fixture(scope="module")
def plain_chats(plain_engine: Server) -> list[str]:
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(partial(text_of, plain_engine), PROMPTS[:4]))


def text_of(server: Server, prompt: str) -> str:
    text: str = server.chat(prompt, max_tokens=24)["choices"][0]["message"]["content"]
    return text


@pytest.mark.parametrize("method", METHODS)
def test_vectors_equal_the_reference_alone_and_beside_chats_that_stay_the_same(
    method: str, plain_chats: list[str]
) -> None:
    options, reference_of = METHODS[method]
    expected = [reference_of(sentence) for sentence in SENTENCES]
    flags = (
        "--embedding",
        json.dumps({"method": method, **options}),
        "--speculation",
        '{"method": "recycling"}',
    )
    with galley_worker(OPTIONS, *flags) as server:
        alone = [server.embed(sentence)[0] for sentence in SENTENCES]
        together = server.embed(SENTENCES * 2)
        with ThreadPoolExecutor(12) as pool:
            chats = [pool.submit(text_of, server, prompt) for prompt in PROMPTS[:4]]
            mixed = [pool.submit(server.embed, sentence) for sentence in SENTENCES * 4]
            assert [chat.result() for chat in chats] == plain_chats
            beside = [vector.result()[0] for vector in mixed]
        for vectors in (alone, together, beside):
            for index, vector in enumerate(vectors):
                assert reference.cosine(vector, expected[index % len(SENTENCES)]) > 0.9999
        # The same words as a chat would send them, after their keys and values were computed for vectors.
        prompt = f'This sentence : <repo_name> "{SENTENCES[0]}" means in one word:"'
        body = {"model": NAME, "prompt": prompt, "max_tokens": 8, "temperature": 0}
        first = server.client.post("/v1/completions", json=body).json()
        fresh = server.client.post("/v1/completions", json={**body, "cache_salt": "other"}).json()
        assert first["choices"][0]["text"] == fresh["choices"][0]["text"]
        assert server.metric("galley_speculation_accepted_tokens_total") > 0


@pytest.fixture(scope="module")
def engine() -> Iterator[Server]:
    options = {"method": "token-prepending", "max_tokens": 200}
    with galley_worker(OPTIONS, "--embedding", json.dumps(options)) as server:
        yield server


def refused(server: Server, body: dict[str, Any]) -> str:
    answer = server.client.post("/v1/embeddings", json={"model": NAME, **body})
    assert answer.status_code == 400, answer.text
    message: str = answer.json()["error"]["message"]
    return message


def test_smollm2s_own_prompt_and_layers_are_taken_where_nothing_else_is_said(engine: Server) -> None:
    (vector,) = engine.embed(SENTENCES[1])
    expected = reference.token_prepending(SENTENCES[1], 1, 5, -3, reference.KNOWLEDGE)
    assert reference.cosine(vector, expected) > 0.9999


def test_token_ids_get_the_prompt_too(engine: Server) -> None:
    """An input of ids has the template's own tokens around it, a string may share one with its seam."""
    text = "Two men are playing chess in the park"
    ids = engine.client.post(
        "/tokenize", json={"model": NAME, "prompt": text, "add_special_tokens": False}
    ).json()["tokens"]
    (of_ids,), (of_text,) = engine.embed(ids), engine.embed(text)
    assert reference.cosine(of_ids, torch.tensor(of_text)) > 0.9


def test_a_prompt_beyond_its_limit_names_its_index_and_both_lengths(engine: Server) -> None:
    message = refused(engine, {"input": ["short", long_text(100)]})
    assert re.search(r"input\[1\]: found \d{3} tokens with its prompt, expected at most 200", message)
    vectors = engine.embed(["short", long_text(100)], truncate=True)
    assert len(vectors) == 2
    assert engine.embed(long_text(100), truncate="start") != engine.embed(long_text(100), truncate="end")


def test_an_empty_input_is_refused(engine: Server) -> None:
    assert "input[1]: found no text" in refused(engine, {"input": ["a", ""]})
    assert "input[0]: found no text" in refused(engine, {"input": ""})


def test_other_routes_get_the_prompt_as_well(engine: Server) -> None:
    texts = ["A man is playing a guitar.", "Someone plays an instrument.", "The bank raised its rates."]
    first, second, third = engine.embed(texts)
    scores = engine.client.post(
        "/score", json={"model": NAME, "queries": texts[0], "documents": texts[1:]}
    ).json()["data"]
    for score, other in zip(scores, (second, third), strict=True):
        dot = sum(left * right for left, right in zip(first, other, strict=True))
        assert score["score"] == pytest.approx(dot, abs=0.05)


def test_chats_are_short_steps_and_long_texts_one_step(engine: Server) -> None:
    """A text longer than a step is embedded while a chat goes on."""
    with ThreadPoolExecutor(3) as pool:
        chat = pool.submit(text_of, engine, PROMPTS[1])
        vectors = [pool.submit(engine.embed, SHORT_TEXTS[0] + " " + long_text(25)) for _ in range(2)]
        assert chat.result()
        assert vectors[0].result()[0] == pytest.approx(vectors[1].result()[0], abs=1e-5)
