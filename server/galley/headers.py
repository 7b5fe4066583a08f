"""Headers across the gateway: end-to-end ones pass in both directions, those of one connection stay on it."""

from __future__ import annotations

import random
import re
from typing import TYPE_CHECKING

from multidict import CIMultiDict

if TYPE_CHECKING:
    from collections.abc import Iterable

RawHeaders = list[tuple[bytes, bytes]]

REQUEST_ID = b"x-request-id"
WORKER = b"x-galley-worker"

_HOP_BY_HOP = frozenset(
    (
        b"connection",
        b"http2-settings",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    )
)
# Made anew for the connection to the worker; `expect` was answered by the gateway's own server, and an answer
# that the gateway reads must not be compressed.
_NOT_TO_WORKER = _HOP_BY_HOP | {b"accept-encoding", b"host", b"content-length", b"expect", REQUEST_ID}
# The gateway's server dates every answer itself.
_NOT_TO_CLIENT = _HOP_BY_HOP | {b"content-length", b"date", REQUEST_ID, WORKER}

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")


def header(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> bytes | None:
    """The first value of a header; names are in lower case, as ASGI has them."""
    return next((value for key, value in headers if key == name), None)


def request_id(headers: RawHeaders) -> bytes:
    """The client's request id if it is short and plain, otherwise a new one."""
    given = header(headers, REQUEST_ID)
    if given is not None and _REQUEST_ID.fullmatch(given):
        return given
    return b"%032x" % random.getrandbits(128)


def for_worker(headers: RawHeaders, request_id: bytes) -> CIMultiDict[str]:
    """The client's end-to-end headers, for the request to the worker."""
    dropped = _dropped(headers, _NOT_TO_WORKER)
    passed = [(name.decode("latin-1"), _text(value)) for name, value in headers if name not in dropped]
    passed.append(("x-request-id", request_id.decode("ascii")))
    return CIMultiDict(passed)


def for_client(headers: Iterable[tuple[bytes, bytes]], request_id: bytes, worker: str) -> RawHeaders:
    """The worker's end-to-end headers, for the answer to the client; without a content length."""
    lowered = [(name.lower(), value) for name, value in headers]
    dropped = _dropped(lowered, _NOT_TO_CLIENT)
    passed = [item for item in lowered if item[0] not in dropped]
    passed.append((REQUEST_ID, request_id))
    passed.append((WORKER, worker.encode("latin-1", "replace")))
    return passed


def _dropped(headers: RawHeaders, always: frozenset[bytes]) -> frozenset[bytes]:
    """`always`, and whatever the Connection headers name: those belong to the connection as well."""
    connection = [value for name, value in headers if name == b"connection"]
    if not connection:
        return always
    return always.union(token.strip().lower() for value in connection for token in value.split(b","))


def _text(value: bytes) -> str:
    # The client library writes header text as UTF-8, so that what is UTF-8 already comes out as the same
    # bytes.
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return value.decode("latin-1")
