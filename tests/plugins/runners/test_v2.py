"""What only runner V2 does; the rest is in test_both.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest


@pytest.fixture
def runner(runner_of: Any) -> Any:
    return runner_of("v2")


def test_a_preempted_embedding_comes_back_as_a_new_request(
    runner: Any, step: Any, embedding: Any, prompts: Any
) -> None:
    rows = prompts.rows(6)
    runner.run(step([("e", rows[:4], 0)], new=[embedding("e", 6)]))
    runner.run(step(preempted={"e"}))
    output = runner.run(step([("e", rows[:5], 0)], new=[embedding("e", 6)]))
    assert output.pooler_output == [None]
    output = runner.run(step([("e", rows[5:], 5)]))
    np.testing.assert_allclose(output.pooler_output[0], prompts.mean(rows), atol=1e-6)
    assert output.sampled_token_ids == [[]]


def test_vectors_of_a_step_that_failed_do_not_reach_the_next_one(
    runner: Any, step: Any, chat: Any, embedding: Any, prompts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(*_: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as failing:
        failing.setattr(runner, "finish_step", out_of_memory)
        with pytest.raises(MemoryError):
            runner.run(step([("e", prompts.rows(2), 0)], new=[embedding("e", 2)]))
    output = runner.run(step([("c", prompts.rows(2), 0)], new=[chat("c", 2)], finished={"e"}))
    assert output is runner.output
    assert output.pooler_output is None


def test_vectors_wait_on_the_host(runner: Any, step: Any, embedding: Any, prompts: Any) -> None:
    output = runner.run(step([("e", prompts.rows(2), 0)], new=[embedding("e", 2)]))
    assert output.pooler_output[0].device.type == "cpu"
