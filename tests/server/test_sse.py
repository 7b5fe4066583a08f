"""Event streams as bytes: however they are cut, the same bytes leave, and only on event boundaries."""

from __future__ import annotations

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from galley.errors import ErrorKind, GatewayError
from galley.routes import Dialect
from galley.sse import EventStream, error_event, split_events
from galley.usage import TokenCount

DIED = GatewayError(ErrorKind.WORKER_DIED, worker="w-0")


def chunk(text: str, finish: str | None = None, **members) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish}
    return b"data: " + orjson.dumps({"id": "c", "choices": [choice], **members}) + b"\n\n"


USED = {"prompt_tokens": 7, "total_tokens": 10, "completion_tokens": 3}
USAGE = b"data: " + orjson.dumps({"id": "c", "choices": [], "usage": USED}) + b"\n\n"
PRINTED = (
    b"data: " + orjson.dumps({"id": "c", "choices": [], "usage": USED, "system_fingerprint": "fp"}) + b"\n\n"
)
DONE = b"data: [DONE]\n\n"

ODD = (b'data: {"usage": not JSON\n\n', b'data: {"usage": null}\n\n', b'data: ["usage"]\n\n')

texts = st.text(max_size=20) | st.sampled_from(
    ['"usage"', "usage", '"finish_reason":"', "\n\n", "\r\n\r\n", "🚢"]
)
lines = st.sampled_from([b"\n", b"\r\n"])
bodies = st.lists(
    st.one_of(
        texts.map(chunk),
        texts.map(lambda text: chunk(text, "stop")),
        st.sampled_from(
            [b": still here\n\n", b"event: ping\ndata: {}\n\n", b"data: not JSON \xff\n\n", *ODD, DONE]
        ),
    ),
    max_size=12,
)


@st.composite
def cut(draw, data: bytes) -> list[bytes]:
    places = sorted(draw(st.sets(st.integers(0, len(data)), max_size=12)))
    return [data[a:b] for a, b in zip([0, *places], [*places, len(data)], strict=True) if a != b]


def run(stream: EventStream, pieces: list[bytes]) -> list[bytes]:
    return [*(stream.feed(piece) for piece in pieces), stream.end()]


@given(st.data(), bodies, st.booleans(), lines)
def test_a_stream_cut_anywhere_passes_unchanged(data, body, hide, line):
    whole = b"".join(body).replace(b"\n", line)
    sent = run(EventStream(hide_usage=hide), data.draw(cut(whole)))
    assert b"".join(sent) == whole


@given(st.data(), bodies)
def test_bytes_leave_on_event_boundaries_only(data, body):
    stream = EventStream(hide_usage=True)
    for piece in data.draw(cut(b"".join(body))):
        sent = stream.feed(piece)
        assert sent == b"" or sent.endswith(b"\n\n")
        sent.decode("utf-8", "strict" if b"\xff" not in sent else "replace")


@given(st.data(), bodies, lines)
def test_usage_that_nobody_asked_for_is_taken_out_and_counted(data, body, line):
    before = b"".join(body).replace(b"\n", line)
    hidden, done = USAGE.replace(b"\n", line), DONE.replace(b"\n", line)
    stream = EventStream(hide_usage=True)
    sent = run(stream, data.draw(cut(before + hidden + done)))
    assert b"".join(sent) == before + done
    assert stream.count == TokenCount(7, 3)


@given(st.data(), st.lists(texts, max_size=5))
def test_the_fingerprint_returns_to_the_last_content_event(data, contents):
    with_usage = b"".join([*map(chunk, contents), chunk("end", "stop"), PRINTED, DONE])
    without = b"".join([*map(chunk, contents), chunk("end", "stop", system_fingerprint="fp"), DONE])
    stream = EventStream(hide_usage=True)
    assert b"".join(run(stream, data.draw(cut(with_usage)))) == without
    assert stream.fingerprint == b'"fp"'


def test_a_known_fingerprint_is_put_on_every_choice_that_ends():
    stream = EventStream(hide_usage=True, fingerprint=b'"fp"')
    sent = run(stream, [chunk("a", "stop"), chunk("b"), chunk("c", "stop"), PRINTED + DONE])
    ended = [chunk(text, "stop", system_fingerprint="fp") for text in ("a", "c")]
    assert b"".join(sent) == ended[0] + chunk("b") + ended[1] + DONE


def test_a_fingerprint_that_is_there_is_not_put_twice():
    event = chunk("a", "stop", system_fingerprint="fp")
    assert b"".join(run(EventStream(hide_usage=True, fingerprint=b'"fp"'), [event + PRINTED])) == event


@given(st.data(), bodies)
def test_usage_that_was_asked_for_stays(data, body):
    whole = b"".join([*body, USAGE, DONE])
    stream = EventStream()
    assert b"".join(run(stream, data.draw(cut(whole)))) == whole
    assert stream.count == TokenCount(7, 3)


def test_a_worker_that_always_reports_usage_is_left_alone():
    whole = chunk("a", usage=USED) + chunk("b", "stop", usage=USED) + USAGE + DONE
    assert b"".join(run(EventStream(hide_usage=True), [whole])) == whole


def test_usage_that_is_null_on_content_events_is_not_the_final_one():
    whole = chunk("a", usage=None) + chunk("b", "stop", usage=None)
    assert b"".join(run(EventStream(hide_usage=True), [whole, USAGE])) == whole


def test_whole_events_are_the_same_object_as_they_came():
    piece = chunk("a")
    assert EventStream(hide_usage=True).feed(piece) is piece


def test_a_stream_that_ends_within_an_event_ends_as_it_came():
    stream = EventStream()
    assert stream.feed(b"data: a\n\ndata: b") == b"data: a\n\n"
    assert stream.end() == b"data: b"


@given(st.data(), bodies, st.sampled_from(Dialect))
def test_an_error_follows_whole_events(data, body, dialect):
    whole = b"".join(body)
    pieces = data.draw(cut(whole))
    stopped = data.draw(st.integers(0, len(pieces)))
    stream = EventStream(hide_usage=True)
    sent = b"".join(stream.feed(piece) for piece in pieces[:stopped])
    sent += stream.abort(DIED, dialect)
    error = error_event(DIED, dialect)
    assert sent.endswith(error)
    before = sent.removesuffix(error)
    assert whole.startswith(before)
    assert before == b"" or before.endswith(b"\n\n")


def test_errors_in_each_dialect():
    openai = error_event(DIED, Dialect.OPENAI)
    assert openai.endswith(b"\n\ndata: [DONE]\n\n")
    assert orjson.loads(openai.split(b"\n")[0][6:])["error"]["code"] == "worker_died"
    last = b'data: {"sequence_number":41}\n\ndata: {"sequence_number": 42}\n\n'
    responses = orjson.loads(error_event(DIED, Dialect.RESPONSES, last).split(b"data: ")[1])
    assert (responses["type"], responses["sequence_number"], responses["code"]) == (
        "error",
        43,
        "worker_died",
    )
    anthropic = orjson.loads(error_event(DIED, Dialect.ANTHROPIC).split(b"data: ")[1])
    assert anthropic["type"] == "error"
    assert anthropic["error"]["message"] == DIED.message


@pytest.mark.parametrize("line", [b"\n", b"\r\n", b"\r"])
def test_events_end_with_any_kind_of_line(line):
    events = [b"data: a" + line * 2, b"event: b" + line + b"data: c" + line * 2]
    assert split_events(b"".join(events)) == events
    assert EventStream().feed(b"".join(events) + b"data: d") == b"".join(events)
