"""What an embedding request is to either runner, whether its outputs come at once or later."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

TOKEN = 7


@pytest.fixture(params=["v1", "v2"])
def version(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[False, True], ids=["synchronous", "asynchronous"])
def runner(request: pytest.FixtureRequest, version: str, runner_of: Any) -> Any:
    return runner_of(version, asynchronous=request.param)


def awaited(output: Any) -> ModelRunnerOutput:
    return output.get_output() if isinstance(output, AsyncModelRunnerOutput) else output


def vectors(output: Any) -> list[list[float] | None]:
    pooled = awaited(output).pooler_output
    assert pooled is not None
    return [None if vector is None else vector.tolist() for vector in pooled]


def test_embed_is_served_beside_the_runners_own_tasks(runner: Any) -> None:
    assert runner.get_supported_tasks() == ("generate", "embed")


def test_a_vector_appears_only_in_the_step_that_completes_its_prompt(
    runner: Any, step: Any, embedding: Any, prompts: Any
) -> None:
    rows = prompts.rows(9)
    first = runner.run(step([("e", rows[:4], 0)], new=[embedding("e", 9)]))
    assert vectors(first) == [None]
    assert vectors(runner.run(step([("e", rows[4:8], 4)]))) == [None]
    (vector,) = vectors(runner.run(step([("e", rows[8:], 8)])))
    np.testing.assert_allclose(vector, prompts.mean(rows), atol=1e-6)


def test_chats_keep_their_tokens_and_embeddings_bring_none(
    runner: Any, step: Any, chat: Any, embedding: Any, prompts: Any
) -> None:
    short, long = prompts.rows(3), prompts.rows(8)
    new = [chat("c", 2), embedding("short", 3), chat("d", 6), embedding("long", 8)]
    rows = [("c", prompts.rows(2), 0), ("short", short, 0), ("d", prompts.rows(4), 0), ("long", long[:5], 0)]
    output = awaited(runner.run(step(rows, new=new, unfinished={"d"})))
    assert output.sampled_token_ids == [[TOKEN], [], [], []]  # d's prompt is not complete yet
    of_c, of_short, of_d, of_long = vectors(output)
    assert (of_c, of_d, of_long) == (None, None, None)
    np.testing.assert_allclose(of_short, prompts.mean(short), atol=1e-6)

    rows = [("long", long[5:], 5), ("c", prompts.rows(1), 2), ("d", prompts.rows(2), 4)]
    output = awaited(runner.run(step(rows, finished={"short"})))
    assert output.sampled_token_ids == [[], [TOKEN], [TOKEN]]
    of_long, of_c, of_d = vectors(output)
    assert (of_c, of_d) == (None, None)
    np.testing.assert_allclose(of_long, prompts.mean(long), atol=1e-6)


def test_a_step_without_embedding_rows_gives_the_output_of_vllm_itself(
    runner: Any, step: Any, chat: Any, embedding: Any, prompts: Any
) -> None:
    output = runner.run(step([("c", prompts.rows(2), 0)], new=[chat("c", 2)]))
    assert output is runner.output
    # Also while an embedding waits for its next chunk.
    rows = prompts.rows(6)
    runner.run(step([("e", rows[:3], 0)], new=[embedding("e", 6)]))
    output = runner.run(step([("c", prompts.rows(1), 2)]))
    assert output is runner.output
    assert awaited(output).pooler_output is None
    assert awaited(output).sampled_token_ids == [[TOKEN]]
    (vector,) = vectors(runner.run(step([("e", rows[3:], 3)])))
    np.testing.assert_allclose(vector, prompts.mean(rows), atol=1e-6)


def test_an_output_is_as_asynchronous_as_the_one_of_vllm(
    runner: Any, step: Any, embedding: Any, prompts: Any
) -> None:
    output = runner.run(step([("e", prompts.rows(2), 0)], new=[embedding("e", 2)]))
    assert isinstance(output, AsyncModelRunnerOutput) == isinstance(runner.output, AsyncModelRunnerOutput)


@pytest.mark.parametrize("computed", [2, 6], ids=["aborted", "complete"])
def test_a_finished_embedding_is_forgotten(
    runner: Any, step: Any, chat: Any, embedding: Any, prompts: Any, computed: int
) -> None:
    rows = prompts.rows(6)
    runner.run(step([("e", rows[:computed], 0)], new=[embedding("e", 6)]))
    assert len(runner.embedding.pooler) == 1
    runner.run(step([("c", prompts.rows(2), 0)], new=[chat("c", 2)], finished={"e", "unknown"}))
    assert len(runner.embedding.pooler) == 0
    # Its id may come back as a chat, which is none of the pooler's business.
    output = runner.run(step([("e", prompts.rows(2), 0)], new=[chat("e", 2)]))
    assert output is runner.output
    assert awaited(output).sampled_token_ids == [[TOKEN]]


def test_an_id_that_ends_and_returns_in_the_same_step_is_a_new_prompt(
    runner: Any, step: Any, embedding: Any, prompts: Any
) -> None:
    runner.run(step([("e", prompts.rows(3), 0)], new=[embedding("e", 6)]))
    rows = prompts.rows(2)
    (vector,) = vectors(runner.run(step([("e", rows, 0)], new=[embedding("e", 2)], finished={"e"})))
    np.testing.assert_allclose(vector, prompts.mean(rows), atol=1e-6)


def test_rows_that_were_read_from_the_prefix_cache_are_missed(
    runner: Any, step: Any, embedding: Any, prompts: Any
) -> None:
    with pytest.raises(ValueError, match=r"request e: .* at token 16, expected 0"):
        runner.run(step([("e", prompts.rows(4), 16)], new=[embedding("e", 20)]))


def test_the_last_tokens_row_is_the_vector_where_that_was_asked(
    version: str, runner_of: Any, step: Any, embedding: Any, prompts: Any
) -> None:
    runner, rows = runner_of(version, "last"), prompts.rows(5)
    runner.run(step([("e", rows[:3], 0)], new=[embedding("e", 5)]))
    (vector,) = vectors(runner.run(step([("e", rows[3:], 3)])))
    np.testing.assert_allclose(vector, prompts.last(rows), atol=1e-6)
