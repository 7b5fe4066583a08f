"""Every drafter of runner V1 leaves the answers as they are; `hybrid` in float32 has a module of its own."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from loadtest.servers import FLOAT32, Server, galley_worker
from tests.e2e.spec_prompts import spec_prompts
from tests.support.shallow_model import LAYERS

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.engine

OPTIONS = {**FLOAT32, "max-num-seqs": 16, "max-num-batched-tokens": 256}
# layers x keys and values x 3 heads x 64 x 4 bytes, 32 tokens a block: one request of the longest kind fits,
# the stories together do not.
SMALL_CACHE = {
    "kv-cache-memory-bytes": 66 * LAYERS * 2 * 3 * 64 * 4 * 32,
    "no-scheduler-reserve-full-isl": True,
}
TOKENS = 48
MANY, FEW = 16, 4  # prompts at batch 8 and at batch 1
STOP = {"stop": ["\n\n", "tea"]}
STORIES = [
    f"Tell me a story about {hero}."
    for first in ("a brave", "an old", "a small", "the last")
    for hero in (f"{first} whale", f"{first} clock", f"{first} bridge", f"{first} farmer")
]
LONG = {"max_tokens": 200, "ignore_eos": True}
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "city": {"type": "string"}},
    "required": ["name", "age", "city"],
    "additionalProperties": False,
}
GRAMMAR = {"response_format": {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}}
DRAFTED, ACCEPTED = "galley_speculation_draft_tokens_total", "galley_speculation_accepted_tokens_total"
PREEMPTED = "vllm:num_preemptions_total"


def texts(server: Server, prompts: list[str], width: int, **fields: Any) -> list[str]:
    def ask(prompt: str) -> str:
        answer = server.chat(prompt, **{"max_tokens": TOKENS, **fields})
        text: str = answer["choices"][0]["message"]["content"]
        return text

    with ThreadPoolExecutor(width) as pool:
        return list(pool.map(ask, prompts))


@pytest.fixture(scope="module")
def plain(plain_shallow: Server) -> dict[str, list[str]]:
    """Answers of vLLM itself, without plugins."""
    prompts = spec_prompts(60)
    return {
        "greedy": texts(plain_shallow, prompts[:MANY], 16),
        "stop": texts(plain_shallow, prompts[:FEW], 8, **STOP),
        "grammar": texts(plain_shallow, prompts[:FEW], 8, **GRAMMAR),
        "stories": texts(plain_shallow, STORIES, 16, **LONG),
    }


@pytest.fixture(scope="module", params=["trigram", "recycling", "prompt-lookup"])
def engine(request: pytest.FixtureRequest, plain: dict[str, list[str]], shallow: str) -> Iterator[Server]:
    options = {**OPTIONS, **SMALL_CACHE}
    with galley_worker(
        options, "--speculation", json.dumps({"method": request.param}), weights=shallow
    ) as server:
        yield server


@pytest.mark.parametrize(("width", "count"), [(8, MANY), (1, FEW)])
def test_greedy_answers_are_the_same(
    engine: Server, plain: dict[str, list[str]], width: int, count: int
) -> None:
    before = engine.metric(ACCEPTED)
    assert texts(engine, spec_prompts(60)[:count], width) == plain["greedy"][:count]
    assert engine.metric(ACCEPTED) > before + count


def test_the_answers_went_through_branches(engine: Server, request: pytest.FixtureRequest) -> None:
    """What these methods draft is a matter of texts and tables, not of how fast the machine is."""
    trees, wins = (
        engine.metric(f"galley_speculation_{name}_total") for name in ("tree_steps", "branch_wins")
    )
    if request.node.callspec.params["engine"] == "prompt-lookup":
        assert (trees, wins) == (0, 0)
    else:
        assert trees > 20
        assert wins > 0


def test_answers_preempted_amid_their_drafts_are_the_same(
    engine: Server, plain: dict[str, list[str]]
) -> None:
    accepted, preempted = engine.metric(ACCEPTED), engine.metric(PREEMPTED)
    assert texts(engine, STORIES, len(STORIES), **LONG) == plain["stories"]
    assert engine.metric(ACCEPTED) > accepted
    assert engine.metric(PREEMPTED) > preempted


def test_stop_strings_end_answers_where_they_did(engine: Server, plain: dict[str, list[str]]) -> None:
    assert texts(engine, spec_prompts(60)[:FEW], 8, **STOP) == plain["stop"]


def test_grammars_give_what_they_gave(engine: Server, plain: dict[str, list[str]]) -> None:
    answers = texts(engine, spec_prompts(60)[:FEW], 8, **GRAMMAR)
    assert answers == plain["grammar"]
    assert all(answer.startswith("{") for answer in answers)


def test_hybrid_drafts_in_the_models_own_type() -> None:
    """bfloat16, which near-ties keep from comparing token for token."""
    with galley_worker({**OPTIONS, "dtype": "bfloat16"}, "--speculation", '{"method": "hybrid"}') as server:
        answers = texts(server, spec_prompts(60)[:FEW], 4)
        assert all(len(answer) > 20 for answer in answers)
        assert 0 < server.metric(ACCEPTED) <= server.metric(DRAFTED)
        sampled = texts(server, spec_prompts(60)[:2], 2, temperature=0.8, seed=1)
        assert all(len(answer) > 20 for answer in sampled)
