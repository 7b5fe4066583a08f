"""Two models behind one gateway, each with an engine for one task alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import yaml

from loadtest import reference
from loadtest.servers import MODEL, Server, galley_serve
from tests.e2e.texts import PROMPTS, SHORT_TEXTS, long_text

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def galley(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A generating engine and an embedding engine, which is vLLM's own pooling runner."""
    engine = {"max-model-len": 2048, "kv-cache-memory-bytes": 256 * 1024 * 1024}
    models = [
        {"name": "writer", "aliases": ["author"], "weights": MODEL, "tasks": ["generate"], "engine": engine},
        {
            "name": "reader",
            "weights": MODEL,
            "tasks": ["embed"],
            "engine": engine,
            "embedding": {"method": "last"},
        },
    ]
    path = tmp_path_factory.mktemp("tasks") / "galley.yaml"
    path.write_text(yaml.safe_dump({"models": models}))
    with galley_serve(path) as server:
        yield server


def test_requests_go_to_the_model_that_they_name(galley: Server) -> None:
    listed = [card["id"] for card in galley.client.get("/v1/models").json()["data"]]
    assert listed == ["writer", "author", "reader"]
    for name in ("writer", "author"):
        assert (
            "Paris" in galley.chat(PROMPTS[0], model=name, max_tokens=32)["choices"][0]["message"]["content"]
        )
    workers = {worker["model"]: worker["id"] for worker in galley.client.get("/workers").json()["workers"]}
    assert workers == {"writer": "writer-0", "reader": "reader-0"}


def test_an_engine_for_embeddings_alone_equals_the_reference(galley: Server) -> None:
    texts = [*SHORT_TEXTS, long_text(120)]
    for text, vector in zip(texts, galley.embed(texts, model="reader"), strict=True):
        assert reference.cosine(vector, reference.embed(text, pooling="last")) > 0.999


def test_a_task_that_the_model_is_not_configured_for_is_refused(galley: Server) -> None:
    refused = galley.client.post("/v1/embeddings", json={"model": "writer", "input": "x"})
    assert refused.status_code == 400
    assert "configured for: generate" in refused.json()["error"]["message"]
    chat = {"model": "reader", "messages": [{"role": "user", "content": "x"}]}
    refused = galley.client.post("/v1/chat/completions", json=chat)
    assert refused.status_code == 400
    assert "configured for: embed" in refused.json()["error"]["message"]


def test_a_request_without_a_model_is_told_the_names(galley: Server) -> None:
    refused = galley.client.post("/v1/embeddings", json={"input": "x"})
    assert refused.status_code == 400
    assert "writer, author, reader" in refused.json()["error"]["message"]
