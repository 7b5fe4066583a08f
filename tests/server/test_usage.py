"""Asking for token counts, and finding them."""

from __future__ import annotations

import json

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from galley.inbound import Head
from galley.routes import route_of
from galley.usage import TokenCount, ask_for_usage, count_in_answer, count_in_event

CHAT = route_of("/v1/chat/completions")
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
documents = st.dictionaries(st.text(max_size=8), values, max_size=6)
spaces = st.text(" \n\t\r", max_size=3)


def head(document: dict, stream: bool = True) -> Head:
    return Head(None, stream, document)


@given(documents, spaces, spaces, st.booleans())
def test_asking_adds_one_member_and_leaves_the_bytes(document, before, after, escaped):
    document = {**document, "stream": True}
    document.pop("stream_options", None)
    body = (before + json.dumps(document, ensure_ascii=escaped, indent=1) + after).encode()
    asked = ask_for_usage(body, head(document), CHAT)
    assert orjson.loads(asked) == {**document, "stream_options": {"include_usage": True}}
    assert asked.replace(b'"stream_options":{"include_usage":true},', b"", 1) == body


@given(documents, st.sampled_from([None, {}, {"include_usage": False}, {"include_usage": None, "other": 1}]))
def test_asking_keeps_every_other_member(document, options):
    document = {**document, "stream": True, "stream_options": options}
    asked = orjson.loads(ask_for_usage(orjson.dumps(document), head(document), CHAT))
    assert asked["stream_options"] == {**(options or {}), "include_usage": True}
    assert {**asked, "stream_options": options} == document


def test_continuous_counts_that_had_no_effect_get_none():
    document = {"stream": True, "stream_options": {"continuous_usage_stats": True}}
    asked = orjson.loads(ask_for_usage(orjson.dumps(document), head(document), CHAT))
    assert asked["stream_options"] == {"include_usage": True}


@pytest.mark.parametrize("options", [{"include_usage": True}, "yes", [], {"include_usage": "no"}])
def test_a_request_that_asks_or_is_wrong_goes_as_it_came(options):
    document = {"stream": True, "stream_options": options}
    assert ask_for_usage(orjson.dumps(document), head(document), CHAT) is None


def test_only_streams_of_two_routes_are_asked():
    assert ask_for_usage(b"{}", head({}, stream=False), CHAT) is None
    for path in ("/v1/responses", "/v1/messages", "/v1/embeddings"):
        assert ask_for_usage(b'{"stream":true}', head({"stream": True}), route_of(path)) is None


def test_counts_in_an_answer():
    usage = {"prompt_tokens": 11, "total_tokens": 15, "completion_tokens": 4, "prompt_tokens_details": None}
    answer = {"choices": [{"message": {"content": '"usage":{"prompt_tokens":99}'}}], "usage": usage}
    assert count_in_answer(json.dumps(answer).encode()) == TokenCount(11, 4)
    assert count_in_answer(orjson.dumps(answer)) == TokenCount(11, 4)


def test_counts_behind_long_text_and_before_it():
    usage = {"prompt_tokens": 11, "completion_tokens": 4}
    assert count_in_answer(orjson.dumps({"text": "x" * 100_000, "usage": usage})) == TokenCount(11, 4)
    assert count_in_answer(orjson.dumps({"usage": usage, "text": "x" * 100_000})) == TokenCount(11, 4)


def test_embeddings_have_no_completion():
    usage = {"prompt_tokens": 11, "total_tokens": 11}
    assert count_in_answer(orjson.dumps({"data": [0.5] * 5000, "usage": usage})) == TokenCount(11, 0)


@pytest.mark.parametrize(
    "body", [b"", b"[]", b'{"usage":null}', b'{"a":"usage"}', b'{"usage":{"seconds":1}}', b"\xff"]
)
def test_no_counts(body):
    assert count_in_answer(body) is None


@given(st.integers(0, 10**9), st.integers(0, 10**9))
def test_counts_in_events_of_each_dialect(prompt, completion):
    chat = {"prompt_tokens": prompt, "completion_tokens": completion}
    other = {"input_tokens": prompt, "output_tokens": completion}
    expected = TokenCount(prompt, completion)
    assert count_in_event({"choices": [], "usage": chat}) == expected
    assert count_in_event({"type": "response.completed", "response": {"usage": other}}) == expected
    assert count_in_event({"type": "message_start", "message": {"usage": other}}) == expected


@pytest.mark.parametrize(
    "event", [{}, {"usage": None}, {"usage": []}, {"response": "x"}, {"message": {"usage": 1}}]
)
def test_events_without_counts(event):
    assert count_in_event(event) is None


def test_counts_that_are_no_numbers_are_nothing():
    assert count_in_event({"usage": {"prompt_tokens": "7", "completion_tokens": -1}}) == TokenCount(0, 0)
