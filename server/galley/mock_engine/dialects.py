"""Answers of the two other dialects: the Responses API, and Anthropic's Messages API."""

from __future__ import annotations

import zlib
from typing import Any

import orjson

from galley.mock_engine.answers import CREATED, DEFAULT_TOKENS, Answer, count_tokens, event, text_of, words


def responses(document: dict[str, Any], model: str, length: int | None) -> Answer:
    """`/v1/responses` with one message of text."""
    prompt = text_of(document.get("input"))
    count = length if length is not None else int(document.get("max_output_tokens") or DEFAULT_TOKENS)
    text = words(prompt, count)
    prompt_tokens = count_tokens(prompt)
    done = _response(prompt, model, "completed", "".join(text), prompt_tokens, count)
    if not document.get("stream"):
        return Answer(prompt_tokens, count, body=orjson.dumps(done))
    started = _response(prompt, model, "in_progress", None, 0, 0)
    place = {"item_id": "msg_mock", "output_index": 0, "content_index": 0}
    empty = {"type": "output_text", "text": "", "annotations": []}
    events: list[dict[str, Any]] = [
        {"type": "response.created", "response": started},
        {"type": "response.in_progress", "response": started},
        {"type": "response.output_item.added", "output_index": 0, "item": _message("", "in_progress")},
        {"type": "response.content_part.added", **place, "part": empty},
    ]
    head = len(events)
    events += [
        {"type": "response.output_text.delta", **place, "delta": word, "logprobs": []} for word in text
    ]
    full = {**empty, "text": "".join(text)}
    events += [
        {"type": "response.output_text.done", **place, "text": full["text"], "logprobs": []},
        {"type": "response.content_part.done", **place, "part": full},
        {"type": "response.output_item.done", "output_index": 0, "item": done["output"][0]},
        {"type": "response.completed", "response": done},
    ]
    encoded = [event({**each, "sequence_number": number}, each["type"]) for number, each in enumerate(events)]
    return Answer(
        prompt_tokens,
        count,
        head=b"".join(encoded[:head]),
        tokens=tuple(encoded[head : head + count]),
        tail=b"".join(encoded[head + count :]),
    )


def messages(document: dict[str, Any], model: str, length: int | None) -> Answer:
    """`/v1/messages` with one block of text."""
    prompt = text_of(document.get("messages"))
    count = length if length is not None else int(document.get("max_tokens") or DEFAULT_TOKENS)
    text = words(prompt, count)
    prompt_tokens = count_tokens(prompt)
    message = {"id": "msg_mock", "type": "message", "role": "assistant", "model": model}
    ending = {"stop_reason": "max_tokens", "stop_sequence": None}
    if not document.get("stream"):
        content = [{"type": "text", "text": "".join(text)}]
        used = {"input_tokens": prompt_tokens, "output_tokens": count}
        body = {**message, "content": content, **ending, "usage": used}
        return Answer(prompt_tokens, count, body=orjson.dumps(body))
    start = {**message, "content": [], "usage": {"input_tokens": prompt_tokens, "output_tokens": 0}}
    block = {"type": "text", "text": ""}
    head = _named({"type": "message_start", "message": start}) + _named(
        {"type": "content_block_start", "index": 0, "content_block": block}
    )
    deltas = (
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": word}}
        for word in text
    )
    tail = (
        _named({"type": "content_block_stop", "index": 0})
        + _named({"type": "message_delta", "delta": ending, "usage": {"output_tokens": count}})
        + _named({"type": "message_stop"})
    )
    return Answer(prompt_tokens, count, head, tuple(_named(delta) for delta in deltas), tail)


def _named(value: dict[str, Any]) -> bytes:
    return event(value, value["type"])


def _message(text: str, status: str) -> dict[str, Any]:
    content = [{"type": "output_text", "text": text, "annotations": []}] if text else []
    return {
        "id": "msg_mock",
        "type": "message",
        "role": "assistant",
        "status": status,
        "content": content,
    }


def _response(
    prompt: str, model: str, status: str, text: str | None, prompt_tokens: int, completion_tokens: int
) -> dict[str, Any]:
    used = {
        "input_tokens": prompt_tokens,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": prompt_tokens + completion_tokens,
    }
    return {
        "id": f"resp_{zlib.crc32(prompt.encode()):08x}",
        "created_at": CREATED,
        "model": model,
        "object": "response",
        "output": [_message(text, "completed")] if text is not None else [],
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
        "status": status,
        "usage": used if text is not None else None,
    }
