"""Token counts: asking a worker for them on a stream, and finding them in what it answers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson

if TYPE_CHECKING:
    from galley.inbound import Head
    from galley.routes import Route

_ASKED = b'"stream_options":{"include_usage":true},'
_TAIL_BYTES = 4096  # usage is near the end of a unary answer; embeddings before it can be megabytes
_USAGE = re.compile(rb'"usage"\s*:\s*\{')
_PROMPT = re.compile(rb'"(?:prompt|input)_tokens"\s*:\s*(\d{1,18})\b')
_COMPLETION = re.compile(rb'"(?:completion|output)_tokens"\s*:\s*(\d{1,18})\b')
_USAGE_BYTES = 4096  # of the usage object itself


@dataclass(frozen=True, slots=True)
class TokenCount:
    prompt: int
    completion: int


def ask_for_usage(body: bytes, head: Head, route: Route) -> bytes | None:
    """The body that makes the worker report token counts at the end of the stream.

    Returns None where it does so already, where the route needs no asking, or where the request is one that
    the worker should see (and refuse) as it came. The bytes stay the same but for the added member, unless
    the client sent stream options of its own.
    """
    if not (route.asks_usage and head.stream):
        return None
    if "stream_options" not in head.document:
        start = body.index(b"{") + 1
        return b"".join((body[:start], _ASKED, body[start:]))
    options = head.document["stream_options"]
    if options is None:
        options = {}
    if not isinstance(options, dict) or options.get("include_usage", False) not in (False, None):
        return None
    # Without include_usage the worker ignores this one, and so it must not take effect now.
    asked = {name: value for name, value in options.items() if name != "continuous_usage_stats"}
    return orjson.dumps({**head.document, "stream_options": {**asked, "include_usage": True}})


def count_in_answer(body: bytes) -> TokenCount | None:
    """The counts in a unary JSON answer, found without parsing it."""
    return _count_at_end(body, max(0, len(body) - _TAIL_BYTES)) or _count_at_end(body, 0)


def count_in_event(event: dict[str, Any]) -> TokenCount | None:
    """The counts in one parsed event of any dialect."""
    holder = event.get("response") or event.get("message") or event
    usage = holder.get("usage") if isinstance(holder, dict) else None
    if not isinstance(usage, dict):
        return None
    prompt = usage.get("prompt_tokens", usage.get("input_tokens"))
    completion = usage.get("completion_tokens", usage.get("output_tokens"))
    return TokenCount(_whole(prompt), _whole(completion))


def _count_at_end(body: bytes, start: int) -> TokenCount | None:
    position = body.rfind(b'"usage"', start)
    if position < 0 or not _USAGE.match(body, position):
        return None
    usage = body[position : position + _USAGE_BYTES]
    prompt, completion = _PROMPT.search(usage), _COMPLETION.search(usage)
    if prompt is None:
        return None
    return TokenCount(int(prompt[1]), int(completion[1]) if completion else 0)


def _whole(value: Any) -> int:
    return value if isinstance(value, int) and value > 0 else 0
