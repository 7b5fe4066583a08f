"""A KV cache too small for its requests preempts them; answers and vectors stay what they were."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

import pytest

from loadtest import reference
from loadtest.servers import FLOAT32, Server, galley_worker
from tests.e2e.texts import long_text
from tests.support.shallow_model import LAYERS

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.engine

# layers x keys and values x 3 heads x 64 x 4 bytes, 128 tokens a block
BLOCK_BYTES = LAYERS * 2 * 3 * 64 * 4 * 128


@pytest.fixture(scope="module")
def engine(shallow: str) -> Iterator[Server]:
    """Room for 12 blocks, 1,536 tokens in all."""
    options = {**FLOAT32, "max-model-len": 1024, "kv-cache-memory-bytes": 12 * BLOCK_BYTES}
    options |= {"max-num-batched-tokens": 128, "max-num-seqs": 8, "no-scheduler-reserve-full-isl": True}
    with galley_worker(options, weights=shallow) as server:
        yield server


def test_preempted_chats_and_embeddings_are_unchanged(
    engine: Server, plain_shallow: Server, shallow: str
) -> None:
    prompts = [f"Tell me a story about {thing}." for thing in ("a whale", "a clock", "a bridge", "a farmer")]
    texts = [long_text(60, seed=seed) for seed in (1, 2, 3)]
    with ThreadPoolExecutor(4) as pool:
        alone = list(pool.map(partial(plain_shallow.chat, max_tokens=260, ignore_eos=True), prompts))
    before = engine.metric("vllm:num_preemptions_total")
    with ThreadPoolExecutor(7) as pool:
        chats = [pool.submit(engine.chat, prompt, max_tokens=260, ignore_eos=True) for prompt in prompts]
        vectors = [pool.submit(engine.embed, text) for text in texts]
        together = [chat.result() for chat in chats]
        pooled = [vector.result()[0] for vector in vectors]
    assert engine.metric("vllm:num_preemptions_total") > before
    contents = [
        [answer["choices"][0]["message"]["content"] for answer in answers] for answers in (alone, together)
    ]
    assert contents[0] == contents[1]
    for text, vector in zip(texts, pooled, strict=True):
        assert reference.cosine(vector, reference.embed(text, weights=shallow)) > 0.999
