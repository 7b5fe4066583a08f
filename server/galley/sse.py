"""Server-sent events as bytes: relayed whole events at a time, looked into only where token counts can be.

The relay must be able to put an error event behind whatever it has sent, so bytes leave on event boundaries
only. When the gateway asked for token counts that the client did not ask for, their event is taken out
again and what the worker left out because of it (the fingerprint on the last content event) is put back, so
that the client reads what the worker alone would have sent.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import orjson

from galley.routes import Dialect
from galley.usage import TokenCount, count_in_event

if TYPE_CHECKING:
    from galley.errors import GatewayError

_BOUNDARIES = (b"\r\n\r\n", b"\n\n", b"\r\r")
_BOUNDARY = re.compile(b"|".join(_BOUNDARIES))
_USAGE = b'"usage"'
_FINISHED = b'"finish_reason":"'
_FINGERPRINT = b'"system_fingerprint":'
_SEQUENCE = re.compile(rb'"sequence_number"\s*:\s*(\d{1,9})')
_SEQUENCE_TAIL = 65_536


class EventStream:
    """The way of one stream's bytes through the gateway.

    Attributes:
        count: the token counts seen so far.
    """

    def __init__(self, *, hide_usage: bool = False, fingerprint: bytes | None = None) -> None:
        """
        Args:
            hide_usage: the gateway asked for the usage event, the client did not.
            fingerprint: the worker's JSON-encoded `system_fingerprint`, where a stream has shown it before.
        """
        self.count: TokenCount | None = None
        self.fingerprint = fingerprint
        self._hide = hide_usage
        self._partial = b""
        self._finished = b""  # an event that ended a choice; the next event decides whether it is complete
        self._last = b""

    def feed(self, chunk: bytes) -> bytes:
        """Take bytes from the worker; return what may be sent on now, whole events or nothing."""
        if not self._partial and chunk.endswith(b"\n\n") and not self._is_looked_into(chunk):
            self._last = chunk
            return chunk
        return self._feed_slowly(chunk)

    def end(self) -> bytes:
        """The worker ended the stream: everything still held, also a last event without its boundary."""
        rest = self._release(self.fingerprint) + self._partial
        self._partial = b""
        return rest

    def abort(self, error: GatewayError, dialect: Dialect) -> bytes:
        """What ends the stream after a failure: held events that are whole, and an error event."""
        held = self._release(self.fingerprint)
        self._partial = b""
        return held + error_event(error, dialect, self._last)

    def _is_looked_into(self, chunk: bytes) -> bool:
        if self._finished or _USAGE in chunk:
            return True
        return self._hide and _FINISHED in chunk

    def _feed_slowly(self, chunk: bytes) -> bytes:
        data = self._partial + chunk if self._partial else chunk
        done = _last_boundary(data, len(self._partial))
        if done == 0:
            self._partial = data
            return b""
        whole, self._partial = data[:done], data[done:]
        self._last = whole
        if not self._is_looked_into(whole):
            return whole
        return b"".join(self._pass(event) for event in split_events(whole))

    def _pass(self, event: bytes) -> bytes:
        parsed = _parse(event) if _USAGE in event else None
        if parsed is not None:
            self._count(parsed)
            if self._hide and parsed.get("choices"):
                # Counts on a content event although the request did not ask for them: the worker always sends
                # them, and so the client expects the final ones as well.
                self._hide = not isinstance(parsed.get("usage"), dict)
            if self._hide and parsed.get("choices") == [] and isinstance(parsed.get("usage"), dict):
                return self._take_out(parsed)
        if not self._hide:
            return self._release(None) + event
        before = self._release(self.fingerprint)
        if _FINISHED in event and _FINGERPRINT not in event:
            self._finished = event
            return before
        return before + event

    def _take_out(self, parsed: dict[str, Any]) -> bytes:
        fingerprint = parsed.get("system_fingerprint")
        if isinstance(fingerprint, str):
            self.fingerprint = orjson.dumps(fingerprint)
        return self._release(self.fingerprint)

    def _release(self, fingerprint: bytes | None) -> bytes:
        event, self._finished = self._finished, b""
        if not event or fingerprint is None:
            return event
        end = event.rindex(b"}")
        return b"".join((event[:end], b",", _FINGERPRINT, fingerprint, event[end:]))

    def _count(self, parsed: dict[str, Any]) -> None:
        found = count_in_event(parsed)
        if found is None:
            return
        before = self.count or found
        self.count = TokenCount(max(before.prompt, found.prompt), max(before.completion, found.completion))


def split_events(data: bytes) -> list[bytes]:
    """Cut bytes that end on an event boundary into events; joined again they are the same bytes."""
    events = []
    start = 0
    for boundary in _BOUNDARY.finditer(data):
        events.append(data[start : boundary.end()])
        start = boundary.end()
    if start < len(data):
        events.append(data[start:])
    return events


def error_event(error: GatewayError, dialect: Dialect, last: bytes = b"") -> bytes:
    """An error as the last event of a stream.

    Args:
        last: events sent before, for the dialect that numbers its events.
    """
    if dialect is Dialect.OPENAI:
        return b"data: %b\n\ndata: [DONE]\n\n" % error.body()
    if dialect is Dialect.ANTHROPIC:
        return b"event: error\ndata: %b\n\n" % anthropic_body(error)
    numbers = _SEQUENCE.findall(last[-_SEQUENCE_TAIL:])
    body = {
        "type": "error",
        "sequence_number": int(numbers[-1]) + 1 if numbers else 0,
        "code": error.kind.code,
        "message": error.message,
        "param": error.param,
        "error": error.object(),  # where clients of this dialect look first
    }
    return b"event: error\ndata: %b\n\n" % orjson.dumps(body)


def anthropic_body(error: GatewayError) -> bytes:
    """The error object of the Messages API; OpenAI's is contained in it."""
    return orjson.dumps({"type": "error", "error": error.object()})


def _last_boundary(data: bytes, already: int) -> int:
    """The end of the last event boundary in `data`, 0 if there is none; the first `already` bytes have
    none.
    """
    start = max(0, already - 3)  # a boundary of four bytes may have begun there
    ends = (data.rfind(mark, start) + len(mark) for mark in _BOUNDARIES if data.find(mark, start) >= 0)
    return max(ends, default=0)


def _parse(event: bytes) -> dict[str, Any] | None:
    lines = (line[5:] for line in event.splitlines() if line.startswith(b"data:"))
    try:
        parsed = orjson.loads(b"\n".join(lines))
    except orjson.JSONDecodeError:
        return None
    return parsed if isinstance(parsed, dict) else None
