"""The client's request: its body read once and within the limit, and the few fields that decide where it
goes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

import orjson

from galley.errors import ErrorKind, GatewayError, json_type
from galley.headers import header

if TYPE_CHECKING:
    from galley.asgi import Receive
    from galley.headers import RawHeaders
    from galley.routes import Route
    from galley.workers import WorkerPool

_LISTED_MODELS = 20  # in an error message


@dataclass(frozen=True, slots=True)
class Head:
    """What the gateway needs to know of a request.

    Attributes:
        model: as the client wrote it; None if it did not.
        stream: the client wants events.
        document: the parsed body; empty for routes without one.
    """

    model: str | None
    stream: bool
    document: dict[str, Any]


async def read_body(receive: Receive, headers: RawHeaders, limit: int) -> bytes:
    """The whole request body.

    Raises:
        GatewayError: BODY_TOO_LARGE, before reading anything if the client announced it; CLIENT_GONE.
    """
    announced = header(headers, b"content-length")
    if announced is not None and int(announced) > limit:
        raise GatewayError(ErrorKind.BODY_TOO_LARGE, limit=limit)
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise GatewayError(ErrorKind.CLIENT_GONE)
        part = message.get("body", b"")
        size += len(part)
        if size > limit:
            raise GatewayError(ErrorKind.BODY_TOO_LARGE, limit=limit)
        parts.append(part)
        if not message.get("more_body", False):
            return parts[0] if len(parts) == 1 else b"".join(parts)


def read_head(route: Route, body: bytes, query: bytes) -> Head:
    """Parse the body once and check the fields that the gateway acts on; the worker checks the rest.

    Raises:
        GatewayError: INVALID_JSON, INVALID_BODY or INVALID_TYPE.
    """
    if not route.has_document:
        return Head(_query_model(query), stream=False, document={})
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise GatewayError(ErrorKind.INVALID_JSON, detail=str(error)) from None
    if not isinstance(document, dict):
        raise GatewayError(ErrorKind.INVALID_BODY, found=json_type(document))
    model = document.get("model")
    if model is not None and not isinstance(model, str):
        raise GatewayError(ErrorKind.INVALID_TYPE, param="model", found=json_type(model), expected="a string")
    stream = document.get("stream")
    if stream is not None and not isinstance(stream, bool):
        raise GatewayError(
            ErrorKind.INVALID_TYPE, param="stream", found=json_type(stream), expected="true or false"
        )
    return Head(model, bool(stream), document)


def find_model(head: Head, route: Route, pool: WorkerPool) -> str:
    """The configured name of the model that the request is for; the only one if the request names none.

    Raises:
        GatewayError: MODEL_REQUIRED, MODEL_NOT_FOUND, or TASK_UNSUPPORTED for this route.
    """
    if head.model is not None:
        model = pool.resolve(head.model)
        if model is None:
            raise GatewayError(
                ErrorKind.MODEL_NOT_FOUND, model=repr(head.model), available=_listed(pool.names)
            )
    elif len(pool.models) == 1:
        model = pool.models[0]
    else:
        raise GatewayError(ErrorKind.MODEL_REQUIRED, param="model", available=_listed(pool.names))
    if route.task is not None and route.task not in model.tasks:
        raise GatewayError(
            ErrorKind.TASK_UNSUPPORTED,
            model=model.name,
            task=route.task,
            tasks=", ".join(sorted(model.tasks)),
        )
    return model.name


def _query_model(query: bytes) -> str | None:
    if b"model=" not in query:
        return None
    values = parse_qs(query.decode("latin-1")).get("model")
    return values[0] if values else None


def _listed(names: tuple[str, ...]) -> str:
    shown = ", ".join(names[:_LISTED_MODELS])
    return shown if len(names) <= _LISTED_MODELS else f"{shown} and {len(names) - _LISTED_MODELS} more"
