"""Which paths are passed through to workers, and how each of them is treated.

An allow-list: what is not here and not one of the gateway's own routes does not exist, so that a worker's
administration (adapters, sleep, cache resets) cannot be reached through the gateway.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from typing import Literal

Task = Literal["generate", "embed"]


class Dialect(Enum):
    """How a route's stream announces an error and reports its token counts."""

    OPENAI = "openai"
    RESPONSES = "responses"
    ANTHROPIC = "anthropic"


@dataclass(frozen=True)
class Route:
    """One passed-through path.

    Attributes:
        name: value of the `route` label; the set of names is bounded by this table.
        task: what the model must be able to do; None if any model will do.
        has_document: the body is a JSON object that may name the model.
        asks_usage: streams report token counts only when asked.
    """

    name: str
    method: str
    path: str
    task: Task | None = None
    dialect: Dialect = Dialect.OPENAI
    has_document: bool = True
    asks_usage: bool = False

    @property
    def methods(self) -> tuple[str, ...]:
        return ("GET", "HEAD") if self.method == "GET" else (self.method,)


PASSED_THROUGH: tuple[Route, ...] = (
    Route("chat", "POST", "/v1/chat/completions", "generate", asks_usage=True),
    Route("chat_render", "POST", "/v1/chat/completions/render", "generate"),
    Route("completions", "POST", "/v1/completions", "generate", asks_usage=True),
    Route("completions_render", "POST", "/v1/completions/render", "generate"),
    Route("responses", "POST", "/v1/responses", "generate", Dialect.RESPONSES),
    Route("responses_get", "GET", "/v1/responses/{id}", "generate", Dialect.RESPONSES, has_document=False),
    Route(
        "responses_cancel",
        "POST",
        "/v1/responses/{id}/cancel",
        "generate",
        Dialect.RESPONSES,
        has_document=False,
    ),
    Route("messages", "POST", "/v1/messages", "generate", Dialect.ANTHROPIC),
    Route("count_tokens", "POST", "/v1/messages/count_tokens", "generate", Dialect.ANTHROPIC),
    Route("embeddings", "POST", "/v1/embeddings", "embed"),
    Route("pooling", "POST", "/pooling", "embed"),
    Route("classify", "POST", "/classify", "embed"),
    Route("score", "POST", "/score", "embed"),
    Route("score", "POST", "/v1/score", "embed"),
    Route("rerank", "POST", "/rerank", "embed"),
    Route("rerank", "POST", "/v1/rerank", "embed"),
    Route("rerank", "POST", "/v2/rerank", "embed"),
    Route("tokenize", "POST", "/tokenize"),
    Route("detokenize", "POST", "/detokenize"),
    Route("version", "GET", "/version", has_document=False),
)

_EXACT = {route.path: route for route in PASSED_THROUGH if "{" not in route.path}
_PATTERNS = tuple(
    (re.compile(re.escape(route.path).replace(r"\{id\}", "[A-Za-z0-9_-]{1,128}")), route)
    for route in PASSED_THROUGH
    if "{" in route.path
)


def route_of(path: str) -> Route | None:
    """The passed-through route at a path, whatever the method; None if the path is not passed through."""
    route = _EXACT.get(path)
    if route is not None:
        return route
    return next((route for pattern, route in _PATTERNS if pattern.fullmatch(path)), None)
