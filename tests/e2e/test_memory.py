"""Memories on runner V1, beside embeddings and speculation, against transformers and the memories' modules."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from loadtest import reference
from loadtest.servers import FLOAT32, NAME, Server, galley_worker
from tests.e2e.texts import SHORT_TEXTS, long_text
from tests.support.small_lora import make_lora
from tests.support.small_memory import MixReference, assert_greedy, make_memory

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.engine

EXAMPLE = Path(__file__).parents[2] / "plugins" / "galley_plugins" / "memory" / "examples" / "gazetteer.py"
OPTIONS = {
    **FLOAT32,
    # Beside LoRA, vLLM wants a step to hold every request's draft.
    "max-num-seqs": 12,
    "max-num-batched-tokens": 64,
    # Without, this model fills answers with white space.
    "structured-outputs-config": {"backend": "xgrammar", "disable_any_whitespace": True},
}
COLUMNS = torch.arange(300, 900)  # tokens that the second memory knows
TOKENS = 12
TUNED = "tuned"
DRAFTS = {"method": "hybrid", "max_draft_tokens": 4}
PROMPTS = ["The capital of France is", "red green blue, red green blue, red green", long_text(20, seed=4)]
# What requests send, and each memory's share then.
WEIGHTS: list[tuple[dict[str, Any], tuple[float, float]]] = [
    ({}, (0.3, 0.1)),
    ({"memory_weight": 0}, (0.0, 0.0)),
    ({"memory_weight": 0.8}, (0.6, 0.2)),
    ({"memory_weight.code": 0.5}, (0.3, 0.5)),
    ({"memory_weight.wiki": 1, "memory_weight.code": 0}, (1.0, 0.0)),
]


@dataclass(frozen=True)
class Engine:
    server: Server
    mix: MixReference
    tuned: MixReference

    def complete(self, prompt: str, **fields: Any) -> dict[str, Any]:
        body = {"model": NAME, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
        body |= {"logprobs": 1, "return_token_ids": True, **fields}
        answer = self.server.client.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        choice: dict[str, Any] = answer.json()["choices"][0]
        return choice

    def assert_answers(self, requests: list[tuple[str, dict[str, Any], tuple[float, float]]]) -> None:
        """All of them in the same batches."""
        with ThreadPoolExecutor(len(requests)) as pool:
            answers = list(pool.map(lambda each: self.complete(each[0], vllm_xargs=each[1]), requests))
        for (_, _, weights), answer in zip(requests, answers, strict=True):
            assert_greedy(self.mix, answer["prompt_token_ids"], answer, weights)


@pytest.fixture(scope="module")
def engine(shallow: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    model, folder = Path(shallow), tmp_path_factory.mktemp("memories")
    wiki = make_memory(folder / "wiki", model, layer=5, weight=0.3, seed=1)
    code = make_memory(folder / "code", model, layer=7, weight=0.9, seed=2, columns=COLUMNS)
    memories = [
        {"path": str(wiki), "name": "wiki"},
        {"path": str(code), "name": "code", "weight": 0.1},
    ]
    merged = make_lora(folder / "tuned", model)
    options = {
        **OPTIONS,
        "enable-lora": True,
        "max-lora-rank": 8,
        "lora-modules": [f"{TUNED}={folder / 'tuned'}"],
    }
    flags = ("--memory", json.dumps(memories), "--speculation", json.dumps(DRAFTS))
    with galley_worker(options, *flags, weights=shallow) as server:
        yield Engine(server, MixReference(model, [wiki, code]), MixReference(model, [wiki, code], merged))


def test_the_status_page_names_the_memories(engine: Engine) -> None:
    (worker,) = engine.server.client.get("/galley/status").json()["workers"]
    assert worker["memory"] == [
        {"name": "wiki", "layer": 5, "weight": 0.3},
        {"name": "code", "layer": 7, "weight": 0.1},
    ]


def test_without_weight_answers_are_the_models_own(engine: Engine) -> None:
    engine.assert_answers([(PROMPTS[0], {"memory_weight": 0}, (0.0, 0.0))])


@pytest.mark.parametrize("index", range(len(PROMPTS)))
def test_requests_of_different_weights_in_one_batch_get_their_own_mix(engine: Engine, index: int) -> None:
    engine.assert_answers([(PROMPTS[index], extra, weights) for extra, weights in WEIGHTS])


def test_memories_read_what_a_lora_adapter_makes_of_the_model(engine: Engine) -> None:
    with ThreadPoolExecutor(2 * len(WEIGHTS)) as pool:
        plain = pool.submit(engine.assert_answers, [(PROMPTS[0], *each) for each in WEIGHTS])
        answers = pool.map(lambda each: engine.complete(PROMPTS[0], model=TUNED, vllm_xargs=each[0]), WEIGHTS)
        for (_, weights), answer in zip(WEIGHTS, answers, strict=True):
            assert_greedy(engine.tuned, answer["prompt_token_ids"], answer, weights)
        plain.result()


def test_drafts_are_verified_by_the_mix_and_cached_prompts_change_nothing(engine: Engine) -> None:
    accepted, hits = "galley_speculation_accepted_tokens_total", "vllm:prefix_cache_hits_total"
    before = engine.server.metric(accepted), engine.server.metric(hits)
    for extra, weights in WEIGHTS[2:4]:  # said before, so that they are drafted now
        engine.assert_answers([(PROMPTS[2], extra, weights)])
    assert engine.server.metric(accepted) - before[0] >= TOKENS // 2
    assert engine.server.metric(hits) > before[1]
    assert engine.server.metric("galley_speculation_tree_steps_total") > 0


def test_log_probabilities_of_a_prompt_in_chunks_are_the_mixs(engine: Engine) -> None:
    extra, weights = WEIGHTS[3]
    answer = engine.complete(PROMPTS[2], prompt_logprobs=0, max_tokens=1, vllm_xargs=extra)
    ids = answer["prompt_token_ids"]
    assert len(ids) > OPTIONS["max-num-batched-tokens"]
    expected = engine.mix.log_probs(ids, weights)
    for place in range(1, len(ids)):
        found = answer["prompt_logprobs"][place][str(ids[place])]["logprob"]
        assert found == pytest.approx(expected[place - 1, ids[place]].item(), abs=2e-3)


def test_what_is_sampled_comes_from_the_memory_alone_where_it_is_all(engine: Engine) -> None:
    extra = {"memory_weight.wiki": 0, "memory_weight.code": 1}
    answer = engine.complete(PROMPTS[0], temperature=1.0, seed=3, max_tokens=24, vllm_xargs=extra)
    assert set(answer["token_ids"]) <= set(COLUMNS.tolist())
    assert len(set(answer["token_ids"])) > 4


def test_grammars_hold(engine: Engine) -> None:
    schema = {
        "type": "object",
        "properties": {"kind": {"enum": ["city", "river"]}, "large": {"type": "boolean"}},
        "required": ["kind", "large"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "place", "schema": schema}}
    for extra, _ in WEIGHTS[2:4]:
        choice = engine.server.chat(
            "Describe Paris.", max_tokens=40, response_format=wanted, vllm_xargs=extra
        )["choices"][0]
        found = json.loads(choice["message"]["content"])
        assert found["kind"] in ("city", "river")
        assert found["large"] in (True, False)


def test_embeddings_are_the_models_own(engine: Engine, shallow: str) -> None:
    texts = [SHORT_TEXTS[0], long_text(60, seed=3)]
    with ThreadPoolExecutor(4) as pool:
        requests = [(PROMPTS[0], extra, weights) for extra, weights in WEIGHTS[:2]]
        answers = pool.submit(engine.assert_answers, requests)
        vectors = [pool.submit(engine.server.embed, text) for text in texts]
        for text, vector in zip(texts, vectors, strict=True):
            expected = reference.embed(text, weights=shallow)
            assert reference.cosine(vector.result()[0], expected) > 0.9999
        answers.result()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"memory_weight": 1.5}, "memory_weight: found 1.5, expected a number from 0 to 1"),
        ({"memory_weight.wikipedia": 0.1}, "found memory_weight.wikipedia, expected memory_weight, memory"),
        ({"memory_weight.wiki": 0.95}, "add up to 1.05 (wiki 0.95, code 0.1), expected 1 at most"),
    ],
)
def test_wrong_weights_are_the_clients_error(engine: Engine, extra: dict[str, Any], message: str) -> None:
    body = {"model": NAME, "prompt": "Hi", "max_tokens": 1, "vllm_xargs": extra}
    answer = engine.server.client.post("/v1/completions", json=body)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


def test_the_example_asks_with_the_memory_and_without(engine: Engine, tmp_path: Path) -> None:
    def run(*arguments: str) -> str:
        command = [sys.executable, str(EXAMPLE), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("write", str(tmp_path), "--facts", "2")
    assert len((tmp_path / "corpus.jsonl").read_text().splitlines()) == 2 * 8
    said = run("ask", str(tmp_path), "--url", engine.server.url, "--model", NAME)
    assert "right: 0 of 2 without the memory, 0 with it" in said  # these memories hold noise
