"""Every metric of the gateway: names, labels and buckets, and nowhere else.

Labels are bounded: models come from the configuration (all other names share `unknown`), routes from the
route table, outcomes and states from enums, workers from the pool.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from galley.errors import Outcome
from galley.workers import State

if TYPE_CHECKING:
    from collections.abc import Iterable

    from prometheus_client import Metric

    from galley.workers import WorkerPool

disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each counter, which nobody reads

UNKNOWN_MODEL = "unknown"

REQUESTS = "galley_requests_total"
TIME_TO_FIRST_TOKEN = "galley_time_to_first_token_seconds"  # noqa: S105
INTER_TOKEN_LATENCY = "galley_inter_token_latency_seconds"  # noqa: S105
REQUEST_DURATION = "galley_request_duration_seconds"
GATEWAY_OVERHEAD = "galley_gateway_overhead_seconds"
TOKENS = "galley_tokens_total"
RETRIES = "galley_retries_total"
IN_FLIGHT = "galley_in_flight_requests"
WORKER_STATE = "galley_worker_state"
WORKER_RESTARTS = "galley_worker_restarts_total"
WORKER_SCRAPE_UP = "galley_worker_scrape_up"

_MILLISECOND = 0.001
_TTFT_BUCKETS = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_ITL_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2.5, 5)
_DURATION_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 60, 120, 240, 480, 960)
_OVERHEAD_BUCKETS = tuple(
    ms * _MILLISECOND for ms in (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 25, 50, 100)
)


class RouteMetrics:
    """The series of one model on one route, looked up once: finding a series costs more than adding to it."""

    __slots__ = ("completion_tokens", "duration", "outcomes", "overhead", "prompt_tokens")

    def __init__(self, metrics: Metrics, model: str, route: str) -> None:
        self.outcomes = {outcome: metrics.requests.labels(model, route, outcome.value) for outcome in Outcome}
        self.duration = metrics.duration.labels(model, route)
        self.overhead = metrics.overhead.labels(model, route)
        self.prompt_tokens = metrics.tokens.labels(model, "prompt")
        self.completion_tokens = metrics.tokens.labels(model, "completion")


class StreamMetrics:
    """The series of one model's streams on one route."""

    __slots__ = ("inter_token", "ttft")

    def __init__(self, metrics: Metrics, model: str, route: str) -> None:
        self.ttft = metrics.ttft.labels(model, route)
        self.inter_token = metrics.inter_token.labels(model, route)


class Metrics:
    """The metric families of one gateway, in a registry of their own."""

    def __init__(self, pool: WorkerPool) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            REQUESTS,
            "Requests answered, by how they ended.",
            ("model", "route", "outcome"),
            registry=self.registry,
        )
        self.ttft = Histogram(
            TIME_TO_FIRST_TOKEN,
            "From the arrival of a streaming request until its first event was relayed.",
            ("model", "route"),
            buckets=_TTFT_BUCKETS,
            registry=self.registry,
        )
        self.inter_token = Histogram(
            INTER_TOKEN_LATENCY,
            "Between two relayed chunks of a stream.",
            ("model", "route"),
            buckets=_ITL_BUCKETS,
            registry=self.registry,
        )
        self.duration = Histogram(
            REQUEST_DURATION,
            "From the arrival of a request until its last byte was relayed.",
            ("model", "route"),
            buckets=_DURATION_BUCKETS,
            registry=self.registry,
        )
        self.overhead = Histogram(
            GATEWAY_OVERHEAD,
            "Time the gateway added: from the body's end until the request goes to a worker, "
            "and from the worker's last byte until the answer is handed over.",
            ("model", "route"),
            buckets=_OVERHEAD_BUCKETS,
            registry=self.registry,
        )
        self.tokens = Counter(
            TOKENS,
            "Tokens that workers reported as used.",
            ("model", "direction"),
            registry=self.registry,
        )
        self.retries = Counter(
            RETRIES,
            "Requests sent to a worker once more after the first one took nothing.",
            ("model",),
            registry=self.registry,
        )
        for model in pool.models:
            self.retries.labels(model.name)
        self.registry.register(PoolCollector(pool))
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self._routes: dict[tuple[str, str], RouteMetrics] = {}
        self._streams: dict[tuple[str, str], StreamMetrics] = {}

    def of(self, model: str, route: str) -> RouteMetrics:
        found = self._routes.get((model, route))
        if found is None:
            found = self._routes[model, route] = RouteMetrics(self, model, route)
        return found

    def of_stream(self, model: str, route: str) -> StreamMetrics:
        found = self._streams.get((model, route))
        if found is None:
            found = self._streams[model, route] = StreamMetrics(self, model, route)
        return found


class PoolCollector(Collector):
    """Reads the workers' state when asked, so that no second account of it can go wrong."""

    def __init__(self, pool: WorkerPool) -> None:
        self._pool = pool

    def collect(self) -> Iterable[Metric]:
        in_flight = GaugeMetricFamily(
            IN_FLIGHT, "Requests dispatched to a worker and not ended.", labels=("model", "worker")
        )
        state = GaugeMetricFamily(
            WORKER_STATE, "1 for the state a worker is in, 0 for all others.", labels=("worker", "state")
        )
        restarts = CounterMetricFamily(
            WORKER_RESTARTS, "Times a worker was started again after it went down.", labels=("worker",)
        )
        for worker in self._pool.workers:
            in_flight.add_metric((worker.model, worker.id), worker.in_flight)
            restarts.add_metric((worker.id,), worker.restarts)
            for each in State:
                state.add_metric((worker.id, each.value), float(worker.state is each))
        return in_flight, state, restarts
