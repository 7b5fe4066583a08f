"""A KV cache too small for its requests preempts them in the midst of drafts; answers stay what they were."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from loadtest import reference
from loadtest.servers import FLOAT32, Server, galley_worker
from tests.e2e.texts import long_text
from tests.support.shallow_model import LAYERS

pytestmark = pytest.mark.engine

# layers x keys and values x 3 heads x 64 x 4 bytes, 32 tokens a block
BLOCK_BYTES = LAYERS * 2 * 3 * 64 * 4 * 32


def test_preempted_drafts_leave_answers_unchanged(plain_shallow: Server, shallow: str) -> None:
    # Four stories need 20 blocks in the end. However unevenly drafts let them get ahead, one leaves the others
    # less than they need of 10, of which one request of the longest kind may need 8.
    options = {**FLOAT32, "max-model-len": 256, "kv-cache-memory-bytes": 10 * BLOCK_BYTES, "max-num-seqs": 8}
    options |= {"max-num-batched-tokens": 128, "no-scheduler-reserve-full-isl": True}
    prompts = [f"Tell me a story about {thing}." for thing in ("a whale", "a clock", "a bridge", "a farmer")]
    fields = {"max_tokens": 120, "ignore_eos": True}
    with ThreadPoolExecutor(4) as pool:
        alone = list(pool.map(partial(plain_shallow.chat, **fields), prompts))
    with galley_worker(options, "--speculation", json.dumps({"method": "hybrid"}), weights=shallow) as server:
        for width in (3, 4):  # with branches, and in a batch too large for them
            before = server.metric("vllm:num_preemptions_total")
            accepted = server.metric("galley_speculation_accepted_tokens_total")
            with ThreadPoolExecutor(8) as pool:
                chats = [pool.submit(server.chat, prompt, **fields) for prompt in prompts[-width:]]
                chats += [pool.submit(server.chat, prompts[0], **fields) for _ in range(width - 2)]
                vectors = [pool.submit(server.embed, long_text(30, seed=seed)) for seed in (1, 2)]
                together = [chat.result() for chat in chats]
                pooled = [vector.result()[0] for vector in vectors]
            expected = [*alone[-width:], *[alone[0]] * (width - 2)]
            for one, other in zip(expected, together, strict=True):
                assert one["choices"][0]["message"]["content"] == other["choices"][0]["message"]["content"]
            assert server.metric("vllm:num_preemptions_total") > before
            assert server.metric("galley_speculation_accepted_tokens_total") > accepted
            for seed, vector in zip((1, 2), pooled, strict=True):
                assert (
                    reference.cosine(vector, reference.embed(long_text(30, seed=seed), weights=shallow))
                    > 0.999
                )
