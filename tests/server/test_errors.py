"""Every error has one status, one sentence and OpenAI's form."""

from __future__ import annotations

import string

import orjson
import pytest

from galley.errors import ErrorKind, GatewayError, Outcome, json_type


def details(kind: ErrorKind) -> dict:
    fields = [name for _, name, _, _ in string.Formatter().parse(kind.value.sentence) if name]
    return {name: 1.5 if name in ("seconds", "limit") else f"<{name}>" for name in fields}


@pytest.mark.parametrize("kind", ErrorKind)
def test_each_kind_is_a_sentence_in_openais_form(kind):
    error = GatewayError(kind, **details(kind))
    body = orjson.loads(error.body())
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["code"] == kind.name.lower()
    assert error.message.endswith(".")
    assert "{" not in error.message
    assert str(error) == error.message
    assert 400 <= kind.status < 600


def test_statuses_and_outcomes_agree():
    for kind in ErrorKind:
        expected = {
            Outcome.CLIENT_ERROR: {400, 404, 405, 413},
            Outcome.CANCELLED: {499},
            Outcome.UNAVAILABLE: {503},
            Outcome.TIMEOUT: {504},
            Outcome.WORKER_ERROR: {502},
            Outcome.INTERNAL: {500},
        }
        assert kind.status in expected[kind.outcome]


def test_unavailable_says_when_to_come_back():
    for kind in ErrorKind:
        headers = dict(GatewayError(kind, **details(kind)).headers())
        assert (b"retry-after" in headers) == (kind.status == 503)
    assert dict(GatewayError(ErrorKind.DRAINING).headers())[b"connection"] == b"close"


def test_what_a_client_sent_is_shown_in_part_only():
    error = GatewayError(ErrorKind.MODEL_NOT_FOUND, model="x" * 10_000, available="m")
    assert len(error.message) < 250


def test_only_failures_before_any_answer_may_be_tried_again():
    retryable = {kind for kind in ErrorKind if GatewayError(kind, **details(kind)).retryable}
    assert retryable == {ErrorKind.WORKER_UNREACHABLE, ErrorKind.WORKER_CLOSED}


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (None, "null"),
        (True, "a boolean"),
        (1, "a number"),
        (1.5, "a number"),
        ("", "a string"),
        ([], "an array"),
        ({}, "an object"),
    ],
)
def test_types_are_named_as_json_names_them(value, name):
    assert json_type(value) == name
