"""What only runner V1 does; the rest is in test_both.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT


@pytest.fixture
def runner(runner_of: Any) -> Any:
    return runner_of("v1")


def test_a_preempted_embedding_resumes_at_its_first_token(
    runner: Any, step: Any, embedding: Any, prompts: Any
) -> None:
    rows = prompts.rows(6)
    runner.run(step([("e", rows[:4], 0)], new=[embedding("e", 6)]))
    runner.run(step(preempted={"e"}))
    assert runner.run(step([("e", rows[:5], 0)])).pooler_output == [None]  # resumed, which is not new
    output = runner.run(step([("e", rows[5:], 5)]))
    np.testing.assert_allclose(output.pooler_output[0], prompts.mean(rows), atol=1e-6)
    assert output.sampled_token_ids == [[]]


def test_a_pipeline_rank_without_hidden_states_leaves_pooling_to_the_last(
    runner: Any, step: Any, embedding: Any, prompts: Any
) -> None:
    runner.run(step([("e", prompts.rows(2), 0)], new=[embedding("e", 4)]))
    runner.execute_model_state = None
    assert runner.sample_tokens(None) is EMPTY_MODEL_RUNNER_OUTPUT
    assert EMPTY_MODEL_RUNNER_OUTPUT.pooler_output is None


def test_a_row_that_was_discarded_is_kept_again_for_the_next_request(
    runner: Any, step: Any, chat: Any, embedding: Any, prompts: Any
) -> None:
    runner.run(step([("e", prompts.rows(2), 0)], new=[embedding("e", 2)]))
    output = runner.run(step([("c", prompts.rows(2), 0)], new=[chat("c", 2)], finished={"e"}))
    assert output.sampled_token_ids == [[7]]
