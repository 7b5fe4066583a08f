"""The gateway's own routes: models, health, metrics and workers. None of them is on the hot path."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson
from fastapi import FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from galley.engine_metrics import merged_metrics, scrape, scraper
from galley.errors import RETRY_AFTER_SECONDS, ErrorKind, GatewayError
from galley.workers import State

if TYPE_CHECKING:
    from galley.metrics import Metrics
    from galley.relay import Relay
    from galley.workers import Worker, WorkerPool


@dataclass(frozen=True)
class Status:
    """What the own routes may look at."""

    pool: WorkerPool
    relay: Relay

    def readiness(self) -> tuple[bool, dict[str, Any]]:
        """Whether every model can be served, and the state of each for a reader."""
        if not self.relay.accepting:
            return False, {"status": "draining", "running": len(self.relay.running)}
        models = {model.name: self.pool.states(model.name) for model in self.pool.models}
        ready = self.pool.is_ready()
        return ready, {"status": "ready" if ready else "not ready", "models": models}


def create_endpoints(status: Status, metrics: Metrics) -> FastAPI:
    """The FastAPI application behind the relay."""
    app = FastAPI(openapi_url=None, redirect_slashes=False)
    pool = status.pool

    @app.get("/v1/models")
    async def list_models() -> Response:
        return _json({"object": "list", "data": list(model_cards(pool).values())})

    @app.get("/v1/models/{name:path}")
    async def get_model(name: str) -> Response:
        card = model_cards(pool).get(name)
        if card is None:
            raise GatewayError(ErrorKind.MODEL_NOT_FOUND, model=repr(name), available=", ".join(pool.names))
        return _json(card)

    @app.get("/health/live")
    async def live() -> Response:
        return _json({"status": "live"})

    @app.get("/health")
    @app.get("/health/ready")
    async def ready() -> Response:
        is_ready, report = status.readiness()
        if is_ready:
            return _json(report)
        return _json(report, 503, {"retry-after": str(RETRY_AFTER_SECONDS)})

    @app.get("/metrics")
    async def gateway_metrics() -> Response:
        return Response(generate_latest(metrics.registry), headers={"content-type": CONTENT_TYPE_LATEST})

    @app.get("/metrics/workers")
    async def worker_metrics() -> Response:
        text = await merged_metrics([(worker.id, worker.url) for worker in pool.workers])
        return Response(text, headers={"content-type": CONTENT_TYPE_LATEST})

    @app.get("/workers")
    async def list_workers() -> Response:
        return _json({"workers": [describe(worker) for worker in pool.workers]})

    @app.get("/workers/{worker_id}/metrics")
    async def one_worker_metrics(worker_id: str) -> Response:
        worker = pool.get(worker_id)
        if worker is None:
            known = ", ".join(worker.id for worker in pool.workers)
            raise GatewayError(ErrorKind.WORKER_NOT_FOUND, worker=repr(worker_id), available=known)
        async with scraper() as client:
            text = await scrape(client, worker.url)
        if text is None:
            raise GatewayError(ErrorKind.WORKER_UNREACHABLE, worker=worker_id)
        return Response(text, headers={"content-type": CONTENT_TYPE_LATEST})

    app.add_exception_handler(GatewayError, _answer_gateway_error)
    app.add_exception_handler(HTTPException, _answer_http_error)
    app.add_exception_handler(Exception, _answer_fault)
    return app


def model_cards(pool: WorkerPool) -> dict[str, dict[str, Any]]:
    """What `/v1/models` lists, by name: the workers' entries, or a plain one where no worker gave any yet."""
    cards: dict[str, dict[str, Any]] = {}
    for worker in sorted(pool.workers, key=lambda worker: worker.state is not State.READY):
        for card in worker.cards:
            cards.setdefault(card["id"], card)
    for name in pool.names:
        cards.setdefault(name, {"id": name, "object": "model", "created": 0, "owned_by": "galley"})
    return {name: cards[name] for name in pool.names}


def describe(worker: Worker) -> dict[str, Any]:
    """One worker for an operator."""
    return {
        "id": worker.id,
        "model": worker.model,
        "url": worker.url,
        "external": worker.external,
        "state": worker.state.value,
        "reason": worker.reason or None,
        "since": worker.since,
        "in_flight": worker.in_flight,
        "restarts": worker.restarts,
    }


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(orjson.dumps(value), status, headers, "application/json")


def _error(error: GatewayError) -> Response:
    headers = {name.decode("ascii"): value.decode("ascii") for name, value in error.headers()}
    return Response(error.body(), error.kind.status, headers, "application/json")


async def _answer_gateway_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, GatewayError)
    return _error(error)


async def _answer_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    asked = {"method": request.scope["method"], "path": request.url.path}
    if error.status_code == 405:
        return _error(GatewayError(ErrorKind.METHOD_NOT_ALLOWED, allowed="GET, HEAD", **asked))
    return _error(GatewayError(ErrorKind.ROUTE_NOT_FOUND, **asked))


async def _answer_fault(request: Request, error: Exception) -> Response:
    return _error(GatewayError(ErrorKind.INTERNAL_ERROR))
