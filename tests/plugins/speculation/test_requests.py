from __future__ import annotations

from typing import Any

import pytest
from vllm.sampling_params import SamplingParams, StructuredOutputsParams

from galley_plugins.speculation.requests import Terms, drafting_limit, scope_of


@pytest.mark.parametrize(
    ("extra", "limit"),
    [
        (None, 8),
        ({}, 8),
        ({"speculation": False}, 0),
        ({"speculation": 0}, 0),
        ({"speculation": "false"}, 0),
        ({"speculation": True}, 8),
        ({"max_draft_tokens": 3}, 3),
        ({"max_draft_tokens": 50}, 8),
        ({"max_draft_tokens": 0}, 0),
        ({"max_draft_tokens": 2.0}, 2),
        ({"speculation": False, "max_draft_tokens": 3}, 0),
    ],
)
def test_requests_may_draft_less(extra: dict[str, Any] | None, limit: int) -> None:
    assert drafting_limit(extra, 8) == limit


@pytest.mark.parametrize(
    "extra",
    [
        {"speculation": "perhaps"},
        {"speculation": 2},
        {"max_draft_tokens": -1},
        {"max_draft_tokens": 1.5},
        {"max_draft_tokens": "many"},
        {"max_draft_tokens": True},
    ],
)
def test_wrong_values_are_named(extra: dict[str, Any]) -> None:
    (name,) = extra
    with pytest.raises(ValueError, match=f"vllm_xargs.{name}: found .*, expected"):
        drafting_limit(extra, 8)


def test_scopes() -> None:
    assert scope_of(None, 4, "worker") == scope_of({"speculation_scope": "a"}, 5, "worker")
    assert scope_of(None, 4, "request") != scope_of(None, 5, "request")
    one, same = ({"speculation_scope": "a"} for _ in range(2))
    assert scope_of(one, 4, "key") == scope_of(same, 5, "key")
    assert scope_of(one, 4, "key") != scope_of({"speculation_scope": "b"}, 4, "key")
    assert scope_of(None, 4, "key") != scope_of(None, 5, "key")
    assert 0 <= scope_of(one, 4, "key") < 2**60


@pytest.mark.parametrize(
    ("fields", "alone"),
    [
        ({}, False),
        ({"temperature": 0.7, "top_p": 0.9, "top_k": 5, "seed": 3}, False),
        ({"presence_penalty": 1.0, "bad_words": ["x"], "logprobs": 5}, False),
        ({"min_p": 0.1}, True),
        ({"logit_bias": {5: 1.0}}, True),
        ({"min_tokens": 5}, True),
        ({"min_tokens": 3}, False),
        ({"logprobs": -1}, True),
    ],
)
def test_requests_that_vllm_serves_by_their_batch_row_stand_alone(
    fields: dict[str, Any], alone: bool
) -> None:
    params = SamplingParams(**fields)
    assert Terms.of(params, 8, custom_processors=False).limit(3) == (0 if alone else 8)
    assert Terms.of(params, 8, custom_processors=True).limit(3) == 0


def test_drafts_end_where_the_answer_does() -> None:
    """The last token needs no draft: it comes with the step that verifies the one before."""
    terms = Terms.of(SamplingParams(max_tokens=10), 8, custom_processors=False)
    assert [terms.limit(generated) for generated in (0, 1, 2, 8, 9, 10)] == [8, 8, 7, 1, 0, 0]
    assert Terms.of(SamplingParams(max_tokens=None), 8, custom_processors=False).limit(10**6) == 8


def test_a_request_may_shorten_its_drafts() -> None:
    params = SamplingParams(max_tokens=10, extra_args={"max_draft_tokens": 3})
    terms = Terms.of(params, 8, custom_processors=False)
    assert [terms.limit(generated) for generated in (0, 6, 7)] == [3, 3, 2]
    off = Terms.of(SamplingParams(extra_args={"speculation": False}), 8, custom_processors=False)
    assert off.limit(0) == 0
    with pytest.raises(ValueError, match="max_draft_tokens"):
        Terms.of(SamplingParams(extra_args={"max_draft_tokens": -1}), 8, custom_processors=False)


def test_drafts_beside_a_grammar_are_chains() -> None:
    structured = SamplingParams(structured_outputs=StructuredOutputsParams(json_object=True))
    assert not Terms.of(structured, 8, custom_processors=False).tree
    assert Terms.of(SamplingParams(), 8, custom_processors=False).tree
