"""OpenAI-shaped answers that follow from the request: the same request always gets the same bytes."""

from __future__ import annotations

import base64
import struct
import zlib
from dataclasses import dataclass
from typing import Any

import orjson

CREATED = 1_700_000_000
FINGERPRINT = "mock-engine"
DEFAULT_TOKENS = 8
DIMENSIONS = 8

# Some of more than one byte a character, so that cuts within a character happen.
_VOCABULARY = (
    *("ship", "galley", "proof", "draft", "token", "bread", "oven", "plate", "crew", "tide", "harbour"),
    *("naïve", "café", "smörgåsbord", "厨房", "🚢"),
)


@dataclass(frozen=True)
class Answer:
    """What an engine says to one request.

    Attributes:
        head: first part of a stream, before any token.
        tokens: the events of a stream, one for each token.
        tail: what ends the stream.
        body: the whole answer where it is not streamed.
    """

    prompt_tokens: int
    completion_tokens: int
    head: bytes = b""
    tokens: tuple[bytes, ...] = ()
    tail: bytes = b""
    body: bytes = b""

    @property
    def is_stream(self) -> bool:
        return bool(self.tokens)


def event(value: Any, name: str | None = None) -> bytes:
    data = value if isinstance(value, bytes) else orjson.dumps(value)
    prefix = b"event: %b\n" % name.encode() if name else b""
    return b"%bdata: %b\n\n" % (prefix, data)


def text_of(value: Any) -> str:
    """All text within a prompt, messages or input, in order."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return " ".join(text_of(item) for item in value)
    if isinstance(value, dict):
        return text_of(value.get("content", value.get("text", "")))
    return "" if value is None else str(value)


def count_tokens(text: str) -> int:
    return max(1, len(text.split()))


def words(seed: str, count: int) -> list[str]:
    """`count` tokens of generated text; joined they read as words."""
    number = zlib.crc32(seed.encode())
    picked = []
    for position in range(count):
        number = zlib.crc32(b"%d" % position, number)
        picked.append(_VOCABULARY[number % len(_VOCABULARY)])
    return [word if position == 0 else " " + word for position, word in enumerate(picked)]


def usage(prompt: int, completion: int) -> dict[str, Any]:
    return {"prompt_tokens": prompt, "total_tokens": prompt + completion, "completion_tokens": completion}


def chat(document: dict[str, Any], model: str, length: int | None) -> Answer:
    """`/v1/chat/completions`, with `n`, `stream` and `stream_options`."""
    prompt = text_of(document.get("messages"))
    count = _length(document, length)
    choices = int(document.get("n") or 1)
    texts = [words(f"{prompt}/{index}", count) for index in range(choices)]
    identity = f"chatcmpl-{zlib.crc32(prompt.encode()):08x}"
    used = usage(count_tokens(prompt), count * choices)
    if not document.get("stream"):
        full = [
            {
                "index": index,
                "message": {"role": "assistant", "content": "".join(text)},
                "logprobs": None,
                "finish_reason": "length",
            }
            for index, text in enumerate(texts)
        ]
        return _whole(_object(identity, "chat.completion", model, full), used)

    def chunk(index: int, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}
        return _object(identity, "chat.completion.chunk", model, [choice])

    head = b"".join(event(chunk(index, {"role": "assistant", "content": ""})) for index in range(choices))
    contents = [[{"content": word} for word in text] for text in texts]
    chunks = _interleave([[chunk(index, delta) for delta in text] for index, text in enumerate(contents)])
    return _stream(document, identity, "chat.completion.chunk", model, head, chunks, choices, used)


def completions(document: dict[str, Any], model: str, length: int | None) -> Answer:
    """`/v1/completions` of one prompt."""
    prompt = text_of(document.get("prompt"))
    count = _length(document, length)
    text = words(prompt, count)
    identity = f"cmpl-{zlib.crc32(prompt.encode()):08x}"
    used = usage(count_tokens(prompt), count)

    def choice(part: str, finish: str | None) -> dict[str, Any]:
        return {"index": 0, "text": part, "logprobs": None, "finish_reason": finish}

    if not document.get("stream"):
        return _whole(_object(identity, "text_completion", model, [choice("".join(text), "length")]), used)
    chunks = [_object(identity, "text_completion", model, [choice(part, None)]) for part in text]
    return _stream(document, identity, "text_completion", model, b"", chunks, 1, used)


def embeddings(document: dict[str, Any], model: str) -> Answer:
    """`/v1/embeddings` of a text, a list of texts, or token ids."""
    given = document.get("input")
    inputs = given if isinstance(given, list) and given and not isinstance(given[0], int) else [given]
    wants_base64 = document.get("encoding_format") == "base64"
    vectors = [vector(text_of(item), int(document.get("dimensions") or DIMENSIONS)) for item in inputs]
    data = [
        {
            "object": "embedding",
            "index": index,
            "embedding": base64.b64encode(struct.pack(f"<{len(each)}f", *each)).decode()
            if wants_base64
            else each,
        }
        for index, each in enumerate(vectors)
    ]
    prompt = sum(count_tokens(text_of(item)) for item in inputs)
    body = {"id": "embd-mock", "object": "list", "created": CREATED, "model": model, "data": data}
    return Answer(prompt, 0, body=orjson.dumps({**body, "usage": usage(prompt, 0)}))


def vector(text: str, dimensions: int) -> list[float]:
    """A vector of length 1 that follows from the text; its members are exact in 32 bits."""
    sign = [1.0 if zlib.crc32(f"{index}{text}".encode()) % 2 else -1.0 for index in range(dimensions)]
    return [struct.unpack("<f", struct.pack("<f", each / dimensions**0.5))[0] for each in sign]


def tokenize(document: dict[str, Any]) -> Answer:
    text = text_of(document.get("prompt", document.get("messages")))
    tokens = [zlib.crc32(word.encode()) % 50_000 for word in text.split()]
    body = {"count": len(tokens), "max_model_len": 4096, "tokens": tokens, "token_strs": None}
    return Answer(len(tokens), 0, body=orjson.dumps(body))


def detokenize(document: dict[str, Any]) -> Answer:
    tokens = document.get("tokens") or []
    return Answer(0, 0, body=orjson.dumps({"prompt": " ".join(str(token) for token in tokens)}))


def model_card(name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": CREATED,
        "owned_by": "mock-engine",
        "root": name,
        "parent": None,
        "max_model_len": 4096,
    }


def _object(identity: str, kind: str, model: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
    return {"id": identity, "object": kind, "created": CREATED, "model": model, "choices": choices}


def _whole(body: dict[str, Any], used: dict[str, Any]) -> Answer:
    body = {**body, "usage": used, "system_fingerprint": FINGERPRINT}
    return Answer(used["prompt_tokens"], used["completion_tokens"], body=orjson.dumps(body))


def _stream(
    document: dict[str, Any],
    identity: str,
    kind: str,
    model: str,
    head: bytes,
    chunks: list[dict[str, Any]],
    choices: int,
    used: dict[str, Any],
) -> Answer:
    """As vLLM does it: the fingerprint is on the last chunk of a choice, or on the usage chunk if there is
    one.
    """
    options = document.get("stream_options") or {}
    include = bool(options.get("include_usage"))
    for chunk in chunks[-choices:]:
        chunk["choices"][0]["finish_reason"] = "length"
        if not include:
            chunk["system_fingerprint"] = FINGERPRINT
    if include and options.get("continuous_usage_stats"):
        chunks = [{**chunk, "usage": usage(used["prompt_tokens"], n)} for n, chunk in enumerate(chunks, 1)]
    tail = event(b"[DONE]")
    if include:
        final = {**_object(identity, kind, model, []), "usage": used, "system_fingerprint": FINGERPRINT}
        tail = event(final) + tail
    return Answer(
        used["prompt_tokens"],
        used["completion_tokens"],
        head=head,
        tokens=tuple(event(chunk) for chunk in chunks),
        tail=tail,
    )


def _interleave(texts: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return [chunk for together in zip(*texts, strict=True) for chunk in together]


def _length(document: dict[str, Any], length: int | None) -> int:
    asked = document.get("max_completion_tokens") or document.get("max_tokens") or DEFAULT_TOKENS
    return length if length is not None else int(asked)
