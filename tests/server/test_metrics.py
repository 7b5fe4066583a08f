"""The metrics' contract: names, types, labels."""

from __future__ import annotations

import re

from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from galley.config import ModelConfig
from galley.errors import Outcome
from galley.metrics import Metrics
from galley.workers import State, Worker, WorkerPool

CONTRACT = {
    "galley_requests": ("counter", {"model", "route", "outcome"}),
    "galley_time_to_first_token_seconds": ("histogram", {"model", "route", "le"}),
    "galley_inter_token_latency_seconds": ("histogram", {"model", "route", "le"}),
    "galley_request_duration_seconds": ("histogram", {"model", "route", "le"}),
    "galley_gateway_overhead_seconds": ("histogram", {"model", "route", "le"}),
    "galley_tokens": ("counter", {"model", "direction"}),
    "galley_retries": ("counter", {"model"}),
    "galley_in_flight_requests": ("gauge", {"model", "worker"}),
    "galley_worker_state": ("gauge", {"worker", "state"}),
    "galley_worker_restarts": ("counter", {"worker"}),
}


def exposed():
    pool = WorkerPool((ModelConfig(name="m"),))
    pool.add(Worker("m-0", "m", "http://w"))
    metrics = Metrics(pool)
    metrics.of("m", "chat").duration.observe(1)
    metrics.of_stream("m", "chat").ttft.observe(1)
    metrics.retries.labels("m").inc()
    text = generate_latest(metrics.registry).decode()
    return metrics, {family.name: family for family in text_string_to_metric_families(text)}


def test_names_types_and_labels():
    _, families = exposed()
    for name, (kind, labels) in CONTRACT.items():
        family = families[name]
        assert family.type == kind
        assert family.documentation.endswith(".")
        assert {label for sample in family.samples for label in sample.labels} == labels
    assert {name for name in families if name.startswith("galley_")} == set(CONTRACT)
    assert all(re.fullmatch(r"[a-z_]+", name) for name in families)


def test_every_outcome_and_state_has_a_series_from_the_start():
    _, families = exposed()
    outcomes = {sample.labels["outcome"] for sample in families["galley_requests"].samples}
    assert outcomes == {outcome.value for outcome in Outcome}
    states = {sample.labels["state"]: sample.value for sample in families["galley_worker_state"].samples}
    assert set(states) == {state.value for state in State}
    assert sum(states.values()) == 1


def test_series_are_looked_up_once():
    metrics, _ = exposed()
    assert metrics.of("m", "chat") is metrics.of("m", "chat")
    assert metrics.of_stream("m", "chat") is metrics.of_stream("m", "chat")


def test_gateways_do_not_share_their_metrics():
    one, other = exposed()[0], exposed()[0]
    one.retries.labels("m").inc()
    assert other.registry.get_sample_value("galley_retries_total", {"model": "m"}) == 1
