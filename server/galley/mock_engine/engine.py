"""The mock engine: an ASGI application with a worker's routes, and `/mock/...` to script and to ask it."""

from __future__ import annotations

import asyncio
import base64
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import orjson

from galley.mock_engine import answers, dialects
from galley.mock_engine.gates import Gates
from galley.mock_engine.playback import Broken, Playback
from galley.mock_engine.script import HEADER, MEMBER, Script, ScriptError
from galley.workers import Signal

if TYPE_CHECKING:
    from collections.abc import Callable

    from galley.mock_engine.answers import Answer

KEPT_REQUESTS = 1000

Document = dict[str, Any]


@dataclass
class Seen:
    """A request that came in, and what became of it.

    Attributes:
        disconnected: the other side left before the answer was complete.
        ended: nothing is done for it any more.
    """

    method: str
    path: str
    query: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes = b""
    disconnected: bool = False
    ended: bool = False

    @property
    def document(self) -> Any:
        return orjson.loads(self.body)

    def header(self, name: str) -> str | None:
        wanted = name.lower().encode("latin-1")
        return next((value.decode("latin-1") for key, value in self.headers if key == wanted), None)

    def as_json(self) -> Document:
        return {
            "method": self.method,
            "path": self.path,
            "headers": [[key.decode("latin-1"), value.decode("latin-1")] for key, value in self.headers],
            "body_base64": base64.b64encode(self.body).decode("ascii"),
            "disconnected": self.disconnected,
            "ended": self.ended,
        }


@dataclass
class Counters:
    """What `/metrics` reports; requests in tokens as vLLM names them."""

    running: int = 0
    succeeded: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0


@dataclass
class MockEngine:
    """A worker that needs no model.

    Attributes:
        models: names it answers to; the first is its default.
        script: what requests meet that bring no script of their own.
        healthy: what `/health` says.
        requests: the last ones that came to the worker's routes.
    """

    models: tuple[str, ...] = ("mock",)
    script: Script = field(default_factory=Script)
    healthy: bool = True
    gates: Gates = field(default_factory=Gates)
    counters: Counters = field(default_factory=Counters)
    requests: deque[Seen] = field(default_factory=lambda: deque(maxlen=KEPT_REQUESTS))
    changed: Signal = field(default_factory=Signal)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        path = scope["path"]
        if scope["method"] == "POST" and (route := _ROUTES.get(path)):
            await self._serve(route, scope, receive, send)
            return
        playback = Playback(scope, send, Script(), self.gates)
        if path.startswith("/mock/"):
            await self._control(path[len("/mock/") :], scope["method"], await _read(receive), playback)
            return
        self.requests.append(Seen(scope["method"], path, scope["query_string"], scope["headers"], ended=True))
        await self._get(path, playback)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until something is true of the engine; looked at whenever a request changes."""
        while not condition():
            await self.changed.wait()

    async def _serve(
        self, route: Callable[[MockEngine, Document, Script], Answer], scope: Any, receive: Any, send: Any
    ) -> None:
        seen = Seen(scope["method"], scope["path"], scope["query_string"], scope["headers"])
        seen.body = await _read(receive)
        self.requests.append(seen)
        self.counters.running += 1
        self.changed.notify()
        task = asyncio.current_task()
        assert task is not None
        watcher = asyncio.create_task(_watch(receive, seen, task))
        try:
            await self._answer(route, seen, Playback(scope, send, self.script, self.gates))
        except asyncio.CancelledError:
            if not seen.disconnected:
                raise
            task.uncancel()
        except Broken:
            pass
        finally:
            watcher.cancel()
            seen.ended = True
            self.counters.running -= 1
            self.changed.notify()

    async def _answer(
        self, route: Callable[[MockEngine, Document, Script], Answer], seen: Seen, playback: Playback
    ) -> None:
        try:
            document = orjson.loads(seen.body)
            if not isinstance(document, dict):
                raise ScriptError("the body is not an object")
            if MEMBER in document:
                playback.script = playback.script.with_changes(document[MEMBER])
            if (header := seen.header(HEADER.decode("ascii"))) is not None:
                playback.script = playback.script.with_changes(orjson.loads(header))
            answer = route(self, document, playback.script)
        except ValueError as error:
            await playback.play_body(400, _error(str(error)))
            return
        await playback.play(answer)
        self.counters.succeeded += 1
        self.counters.prompt_tokens += answer.prompt_tokens
        self.counters.generation_tokens += answer.completion_tokens

    async def _get(self, path: str, playback: Playback) -> None:
        if path == "/health":
            await playback.play_body(200 if self.healthy else 503, b"")
        elif path == "/v1/models":
            cards = [answers.model_card(name) for name in self.models]
            await playback.play_body(200, orjson.dumps({"object": "list", "data": cards}))
        elif path == "/version":
            await playback.play_body(200, b'{"version":"mock"}')
        elif path == "/metrics":
            await playback.play_body(200, self.metrics().encode(), b"text/plain; version=0.0.4")
        else:
            await playback.play_body(404, _error(f"the mock engine has no {path}"))

    async def _control(self, path: str, method: str, body: bytes, playback: Playback) -> None:
        """`/mock/script` (POST), `/mock/requests` (GET, DELETE), `/mock/gates/NAME/hold` and `/release`
        (POST).
        """
        parts = path.split("/")
        answer: Any = {}
        if (method, path) == ("POST", "script"):
            try:
                self.script = Script().with_changes(orjson.loads(body or b"{}"))
            except ValueError as error:
                await playback.play_body(400, _error(str(error)))
                return
        elif (method, path) == ("GET", "requests"):
            answer = {"requests": [seen.as_json() for seen in self.requests]}
        elif (method, path) == ("DELETE", "requests"):
            self.requests.clear()
        elif method == "POST" and len(parts) == 3 and parts[0] == "gates" and parts[2] in ("hold", "release"):
            (self.gates.hold if parts[2] == "hold" else self.gates.release)(parts[1])
        else:
            await playback.play_body(404, _error(f"the mock engine has no {method} /mock/{path}"))
            return
        await playback.play_body(200, orjson.dumps(answer))

    def metrics(self) -> str:
        """The few of vLLM's series that gateways and dashboards read."""
        model = f'model_name="{self.models[0]}"'
        counters = self.counters
        series = (
            ("vllm:num_requests_running", "gauge", "Requests in execution.", "", counters.running),
            ("vllm:num_requests_waiting", "gauge", "Requests waiting.", "", 0),
            ("vllm:prompt_tokens_total", "counter", "Prefill tokens.", "", counters.prompt_tokens),
            (
                "vllm:generation_tokens_total",
                "counter",
                "Generated tokens.",
                "",
                counters.generation_tokens,
            ),
            (
                "vllm:request_success_total",
                "counter",
                "Finished requests.",
                ',finished_reason="length"',
                counters.succeeded,
            ),
        )
        return "".join(
            f"# HELP {name} {text}\n# TYPE {name} {kind}\n{name}{{{model}{labels}}} {float(value)}\n"
            for name, kind, text, labels, value in series
        )

    def model_of(self, document: Document) -> str:
        """The model that a request names.

        Raises:
            ScriptError: the engine does not have it.
        """
        name = document.get("model") or self.models[0]
        if name not in self.models:
            raise ScriptError(f"model: found {name!r}, expected one of {', '.join(self.models)}")
        return str(name)


_ROUTES: dict[str, Callable[[MockEngine, Document, Script], Answer]] = {
    "/v1/chat/completions": lambda engine, document, script: answers.chat(
        document, engine.model_of(document), script.tokens
    ),
    "/v1/completions": lambda engine, document, script: answers.completions(
        document, engine.model_of(document), script.tokens
    ),
    "/v1/responses": lambda engine, document, script: dialects.responses(
        document, engine.model_of(document), script.tokens
    ),
    "/v1/messages": lambda engine, document, script: dialects.messages(
        document, engine.model_of(document), script.tokens
    ),
    "/v1/embeddings": lambda engine, document, _: answers.embeddings(document, engine.model_of(document)),
    "/tokenize": lambda engine, document, _: answers.tokenize(document),
    "/detokenize": lambda engine, document, _: answers.detokenize(document),
}


async def _read(receive: Any) -> bytes:
    parts = []
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


async def _watch(receive: Any, seen: Seen, task: asyncio.Task[Any]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    if not seen.ended:
        seen.disconnected = True
        task.cancel()


def _error(message: str) -> bytes:
    error = {"message": message, "type": "BadRequestError", "param": None, "code": 400}
    return orjson.dumps({"error": error})
