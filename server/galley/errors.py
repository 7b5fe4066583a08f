"""Every way a request can end badly: one closed enum, mapped to HTTP and to OpenAI's error object here
alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, StrEnum
from typing import Any

import orjson

RETRY_AFTER_SECONDS = 2  # about one probe period: a worker that restarts is asked again soon, not hammered
_SHOWN_CHARACTERS = 128  # of anything the client sent, so that an error cannot be made large


class Outcome(StrEnum):
    """How a request ended; a label of `galley_requests_total`."""

    OK = "ok"
    CLIENT_ERROR = "client_error"
    CANCELLED = "cancelled"
    UNAVAILABLE = "unavailable"
    TIMEOUT = "timeout"
    WORKER_ERROR = "worker_error"
    INTERNAL = "internal"


@dataclass(frozen=True)
class _Form:
    status: int
    type: str
    outcome: Outcome
    sentence: str


def _client(status: int, sentence: str) -> _Form:
    return _Form(status, "invalid_request_error", Outcome.CLIENT_ERROR, sentence)


def _unavailable(sentence: str) -> _Form:
    return _Form(503, "service_unavailable_error", Outcome.UNAVAILABLE, sentence)


def _worker(status: int, outcome: Outcome, sentence: str) -> _Form:
    return _Form(status, "worker_error", outcome, sentence)


class ErrorKind(Enum):
    """The name in lower case is the `code` that clients see."""

    INVALID_JSON = _client(400, "The request body is not valid JSON: {detail}.")
    INVALID_BODY = _client(400, "The request body is {found}, expected a JSON object.")
    INVALID_TYPE = _client(400, "{param}: found {found}, expected {expected}.")
    MODEL_REQUIRED = _client(400, "model: missing, expected one of: {available}.")
    TASK_UNSUPPORTED = _client(400, "The model {model} does not {task}; it is configured for: {tasks}.")
    MODEL_NOT_FOUND = _client(404, "The model {model} does not exist, expected one of: {available}.")
    WORKER_NOT_FOUND = _client(404, "There is no worker {worker}, expected one of: {available}.")
    ROUTE_NOT_FOUND = _client(404, "There is no route {method} {path}.")
    METHOD_NOT_ALLOWED = _client(405, "{path} was asked with {method}, expected {allowed}.")
    BODY_TOO_LARGE = _client(413, "The request body is larger than the limit of {limit} bytes.")
    CLIENT_GONE = _Form(
        499, "client_closed_request", Outcome.CANCELLED, "The client closed the connection before the answer."
    )
    INTERNAL_ERROR = _Form(500, "internal_error", Outcome.INTERNAL, "The gateway failed on this request.")
    NO_READY_WORKER = _unavailable("No worker of the model {model} is ready: {states}.")
    DRAINING = _unavailable("The server is shutting down and takes no new requests.")
    SHUT_DOWN = _unavailable("The server shut down before the answer was complete.")
    WORKER_UNREACHABLE = _unavailable("The worker {worker} refused the connection.")
    CONNECT_TIMEOUT = _unavailable("The worker {worker} did not accept a connection within {seconds:g} s.")
    WORKER_CLOSED = _worker(
        502, Outcome.WORKER_ERROR, "The worker {worker} closed the connection without an answer."
    )
    WORKER_DIED = _worker(
        502, Outcome.WORKER_ERROR, "The worker {worker} closed the connection in the middle of its answer."
    )
    WORKER_INVALID = _worker(
        502, Outcome.WORKER_ERROR, "The worker {worker} sent an answer that is not HTTP."
    )
    FIRST_BYTE_TIMEOUT = _worker(
        504, Outcome.TIMEOUT, "The worker {worker} sent no answer within {seconds:g} s."
    )
    IDLE_TIMEOUT = _worker(
        504,
        Outcome.TIMEOUT,
        "The worker {worker} sent nothing for {seconds:g} s in the middle of its answer.",
    )

    @property
    def code(self) -> str:
        return self.name.lower()

    @property
    def status(self) -> int:
        return self.value.status

    @property
    def outcome(self) -> Outcome:
        return self.value.outcome


# The worker cannot have answered, and nothing was relayed: the request may go to a worker once more.
_RETRYABLE = frozenset({ErrorKind.WORKER_UNREACHABLE, ErrorKind.WORKER_CLOSED})
_CLOSES_CONNECTION = frozenset({ErrorKind.DRAINING, ErrorKind.SHUT_DOWN})


class GatewayError(Exception):
    """A request that the gateway answers itself; `details` fill the sentence of its kind."""

    def __init__(self, kind: ErrorKind, **details: Any) -> None:
        self.kind = kind
        self.param = details.get("param") or ("model" if "model" in details else None)
        shown = {key: _shorten(value) for key, value in details.items()}
        self.message = kind.value.sentence.format(**shown)
        self.allowed: str | None = details.get("allowed")
        super().__init__(self.message)

    @property
    def retryable(self) -> bool:
        return self.kind in _RETRYABLE

    def object(self) -> dict[str, Any]:
        """The `error` member of OpenAI's answer."""
        return {
            "message": self.message,
            "type": self.kind.value.type,
            "param": self.param,
            "code": self.kind.code,
        }

    def body(self) -> bytes:
        return orjson.dumps({"error": self.object()})

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Headers beside the content type and length."""
        found = []
        if self.kind.status == 503:
            found.append((b"retry-after", b"%d" % RETRY_AFTER_SECONDS))
        if self.kind in _CLOSES_CONNECTION:
            found.append((b"connection", b"close"))
        if self.allowed:
            found.append((b"allow", self.allowed.encode("ascii")))
        return found


def json_type(value: Any) -> str:
    """The JSON name of a parsed value's type, for error messages."""
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "an array"}
    return names.get(type(value), "an object")


def _shorten(value: Any) -> Any:
    if isinstance(value, str) and len(value) > _SHOWN_CHARACTERS:
        return value[:_SHOWN_CHARACTERS] + "..."
    return value
