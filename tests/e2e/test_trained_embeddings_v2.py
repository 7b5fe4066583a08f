"""Trained ways to embed on runner V2, CUDA's default, through Triton's interpreter."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from loadtest import reference
from loadtest.servers import FLOAT32, Server, galley_worker
from tests.e2e.texts import PROMPTS, SHORT_TEXTS, long_text
from tests.support.adapters import random_adapter

pytestmark = pytest.mark.engine

V2_ON_CPU = Path(__file__).parents[1] / "support" / "v2_on_cpu"
ENVIRONMENT = {"PYTHONPATH": str(V2_ON_CPU), "TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
OPTIONS = {**FLOAT32, "max-model-len": 1024, "max-num-batched-tokens": 64, "max-num-seqs": 8}
TEXTS = [SHORT_TEXTS[0], long_text(25, seed=3), SHORT_TEXTS[1]]  # the second is longer than a step


def content_of(server: Server, prompt: str) -> str:
    content: str = server.chat(prompt, max_tokens=8)["choices"][0]["message"]["content"]
    return content


@pytest.mark.parametrize(
    ("method", "sizes"), [("gem", {"tokens": 2, "combine": "mean"}), ("nv-embed", {"heads": 2})]
)
def test_vectors_equal_the_reference_beside_chats_that_stay_the_same(
    plain_engine: Server, method: str, sizes: dict[str, Any], tmp_path: Path
) -> None:
    tensors = random_adapter(tmp_path / "adapter", method, **sizes)
    chats = [content_of(plain_engine, prompt) for prompt in PROMPTS[:2]]
    flags = ("--embedding", json.dumps({"adapter": str(tmp_path / "adapter")}))
    with galley_worker(OPTIONS, *flags, env=ENVIRONMENT) as server, ThreadPoolExecutor(5) as pool:
        (worker,) = server.client.get("/galley/status").json()["workers"]
        assert worker["runner_version"] == 2
        asked = [pool.submit(content_of, server, prompt) for prompt in PROMPTS[:2]]
        vectors = [pool.submit(server.embed, text) for text in TEXTS]
        assert [chat.result() for chat in asked] == chats
        for text, vector in zip(TEXTS, vectors, strict=True):
            expected = (
                reference.gem(text, tensors)
                if method == "gem"
                else reference.nv_embed(text, tensors, sizes["heads"])
            )
            assert reference.cosine(vector.result()[0], expected) > 0.9999
