"""Trained ways to embed, with random adapters: vectors equal a reference by transformers, chats stay the same."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch

from loadtest import reference
from loadtest.servers import FLOAT32, NAME, Server, galley_worker
from tests.e2e.texts import PROMPTS, long_text
from tests.support.adapters import random_adapter

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.engine

# Prompts longer than a step are computed in chunks, or in a step of their own.
OPTIONS = {**FLOAT32, "max-num-seqs": 16, "max-num-batched-tokens": 64}
SENTENCES = [
    "A galley proof is checked before it is printed.",
    "Two men are playing chess in the park.",
    "It rained.",
    long_text(60) + ".",  # about 300 tokens
]


@pytest.fixture(scope="module")
def plain_chats(plain_engine: Server) -> list[str]:
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(partial(text_of, plain_engine), PROMPTS[:4]))


def text_of(server: Server, prompt: str) -> str:
    text: str = server.chat(prompt, max_tokens=24)["choices"][0]["message"]["content"]
    return text


def expected_of(
    method: str, folder: Path, tensors: dict[str, torch.Tensor], sizes: Any
) -> list[torch.Tensor]:
    if method == "gem":
        return [reference.gem(text, tensors, sizes["combine"]) for text in SENTENCES]
    if method == "causal2vec":
        unit = sizes["parts"] == "unit"
        return [reference.causal2vec(text, tensors, folder / "encoder", unit=unit) for text in SENTENCES]
    return [reference.nv_embed(text, tensors, sizes["heads"]) for text in SENTENCES]


@pytest.mark.parametrize(
    ("method", "sizes"),
    [
        ("gem", {"tokens": 3, "combine": "concat"}),
        ("causal2vec", {"parts": "unit"}),
        ("nv-embed", {"heads": 2}),
    ],
)
def test_vectors_equal_the_reference_alone_and_beside_chats_that_stay_the_same(
    method: str, sizes: dict[str, Any], plain_chats: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "adapter"
    tensors = random_adapter(folder, method, **sizes)
    expected = expected_of(method, folder, tensors, sizes)
    plain = [reference.embed(text, "last") for text in SENTENCES]
    flags = ("--embedding", json.dumps({"adapter": str(folder)}), "--speculation", '{"method": "hybrid"}')
    with galley_worker(OPTIONS, *flags) as server:
        alone = [server.embed(sentence)[0] for sentence in SENTENCES]
        together = server.embed(SENTENCES * 2)
        with ThreadPoolExecutor(12) as pool:
            chats = [pool.submit(text_of, server, prompt) for prompt in PROMPTS[:4]]
            mixed = [pool.submit(server.embed, sentence) for sentence in SENTENCES * 2]
            assert [chat.result() for chat in chats] == plain_chats
            beside = [vector.result()[0] for vector in mixed]
        for vectors in (alone, together, beside):
            for index, vector in enumerate(vectors):
                assert reference.cosine(vector, expected[index % len(SENTENCES)]) > 0.9999
        # The adapter is seen at all: the model's own row is another.
        first = torch.tensor(alone[0])[: len(plain[0])]
        assert torch.nn.functional.cosine_similarity(first, plain[0], dim=0) < 0.99
        # The same words as a chat would send them, after their keys and values were computed for vectors.
        body = {"model": NAME, "prompt": SENTENCES[3], "max_tokens": 8, "temperature": 0}
        cached = server.client.post("/v1/completions", json=body).json()
        fresh = server.client.post("/v1/completions", json={**body, "cache_salt": "other"}).json()
        assert cached["choices"][0]["text"] == fresh["choices"][0]["text"]
        assert server.metric("galley_speculation_accepted_tokens_total") > 0
        if method == "gem":
            hits = server.metric("vllm:prefix_cache_hits_total")
            assert hits > 0  # texts are shared between special tokens, and with the completion


def test_sparse_weights_equal_those_of_a_splade_head() -> None:
    options = {"method": "splade", "weights": 64}
    with galley_worker(OPTIONS, "--embedding", json.dumps(options)) as server:
        body = {"model": NAME, "input": SENTENCES}
        answer = server.client.post("/v1/embeddings", json=body)
        assert answer.status_code == 200, answer.text
        for row, text in zip(answer.json()["data"], SENTENCES, strict=True):
            weights, places = reference.splade(text).topk(64)
            found = {int(place): weight for place, weight in row["embedding"].items()}
            assert set(found) == set(places.tolist())
            for place, weight in zip(places.tolist(), weights.tolist(), strict=True):
                assert found[place] == pytest.approx(weight, rel=1e-3)
        fewer = server.client.post("/v1/embeddings", json={**body, "dimensions": 8}).json()
        assert [len(row["embedding"]) for row in fewer["data"]] == [8] * len(SENTENCES)
        refused = server.client.post("/v1/embeddings", json={**body, "encoding_format": "base64"})
        assert refused.status_code == 400
        assert "vectors are sparse" in refused.json()["error"]["message"]


def test_an_adapter_for_another_model_is_refused_before_an_engine_starts(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    random_adapter(folder, "gem")
    path = folder / "galley_embedding.json"
    settings = json.loads(path.read_text())
    settings["base"]["hidden_size"] = 64
    path.write_text(json.dumps(settings))
    with (
        pytest.raises(
            AssertionError, match=r"error: embedding\.adapter: .* was trained for .*hidden_size=64"
        ),
        galley_worker(OPTIONS, "--embedding", json.dumps({"adapter": str(folder)})),
    ):
        pass
