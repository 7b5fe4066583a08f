"""Which headers cross the gateway."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from galley.headers import for_client, for_worker, header, request_id

names = st.sampled_from([b"accept", b"x-a", b"x-b", b"cookie", b"authorization", b"content-type"])
values = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=12).map(str.encode)


@given(st.lists(st.tuples(names, values), max_size=8))
def test_end_to_end_headers_keep_their_order_and_repeat(headers):
    passed = [(name.encode(), value.encode()) for name, value in for_worker(headers, b"id").items()]
    assert passed == [*headers, (b"x-request-id", b"id")]
    assert for_client(headers, b"id", "w-0")[: len(headers)] == headers


@pytest.mark.parametrize(
    "name",
    [
        "connection",
        "keep-alive",
        "proxy-authorization",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "host",
        "accept-encoding",
    ],
)
def test_headers_of_one_connection_do_not_pass(name):
    assert name not in for_worker([(name.encode(), b"x")], b"id")


def test_the_connection_header_names_further_ones_in_any_case_and_number():
    headers = [
        (b"connection", b"close, X-One"),
        (b"connection", b"x-two"),
        (b"x-one", b"1"),
        (b"x-two", b"2"),
    ]
    assert list(for_worker(headers, b"id")) == ["x-request-id"]
    answer = [(b"Connection", b"X-One"), (b"X-One", b"1"), (b"X-Three", b"3")]
    assert for_client(answer, b"id", "w-0") == [
        (b"x-three", b"3"),
        (b"x-request-id", b"id"),
        (b"x-galley-worker", b"w-0"),
    ]


def test_what_the_gateway_sets_itself_is_not_taken_over():
    headers = [
        (b"Content-Length", b"5"),
        (b"Date", b"x"),
        (b"X-Request-Id", b"theirs"),
        (b"X-Galley-Worker", b"w"),
    ]
    assert for_client(headers, b"mine", "w-0") == [(b"x-request-id", b"mine"), (b"x-galley-worker", b"w-0")]


@pytest.mark.parametrize(("value", "text"), [("naïve".encode(), "naïve"), (b"na\xefve", "naïve")])
def test_values_beyond_ascii(value, text):
    assert for_worker([(b"x-a", value)], b"id")["x-a"] == text


def test_the_first_of_several_values_is_taken():
    assert header([(b"a", b"1"), (b"a", b"2")], b"a") == b"1"
    assert header([], b"a") is None


def test_new_request_ids_differ():
    assert request_id([]) != request_id([])
    assert request_id([(b"x-request-id", b"mine")]) == b"mine"
