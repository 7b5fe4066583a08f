"""The Prometheus configuration: what its rules name exists, and a real Prometheus scrapes a real gateway."""

from __future__ import annotations

import ast
import asyncio
import importlib.util
import os
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from galley.config import ModelConfig
from galley.engine_metrics import SCRAPE_SECONDS, merged_metrics
from galley.errors import Outcome
from galley.metrics import Metrics
from galley.workers import WorkerPool
from loadtest.servers import free_port, running
from tests.support.mock_stack import MODEL, WORKER, mock_stack

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from loadtest.servers import Server
    from tests.support.mock_stack import MockStack

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "prometheus"
CONFIG = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
RULES = [
    rule for group in yaml.safe_load((FOLDER / "rules.yml").read_text())["groups"] for rule in group["rules"]
]
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}
SCRAPED_SECONDS = 30.0

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed (apt-get install prometheus)"
)
needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="prometheus is not installed (apt-get install prometheus)"
)


def metric_names(expression: str) -> set[str]:
    """The metrics that a PromQL expression reads."""
    expression = re.sub(r'"[^"]*"', "", expression)
    expression = re.sub(r"\{[^}]*\}|\[[^\]]*\]", "", expression)
    expression = re.sub(r"\b(by|on|ignoring|without|group_left|group_right)\s*\([^)]*\)", "", expression)
    words = re.findall(r"\b([a-zA-Z_][a-zA-Z0-9_:]*)\b(?!\s*\()", expression)
    return {word for word in words if word not in {"and", "or", "unless", "bool", "e"}}


def base_names(names: set[str]) -> set[str]:
    """The families of a client library: without what a histogram or a counter appends to its name."""
    return {re.sub(r"_(bucket|sum|count|total)$", "", name) for name in names}


def vllm_families() -> set[str]:
    """The names that vLLM's own statistics logger gives its metrics, read from its source."""
    package = importlib.util.find_spec("vllm")
    if package is None or package.origin is None:
        pytest.skip("vllm is not installed")
    source = Path(package.origin).parent / "v1" / "metrics" / "loggers.py"
    return {
        keyword.value.value
        for call in ast.walk(ast.parse(source.read_text()))
        if isinstance(call, ast.Call)
        for keyword in call.keywords
        if keyword.arg == "name"
        and isinstance(keyword.value, ast.Constant)
        and str(keyword.value.value).startswith("vllm:")
    }


def gateway_families() -> set[str]:
    """What a gateway exposes at /metrics, and adds to its workers' metrics at /metrics/workers."""
    model = ModelConfig(name=MODEL, urls=("http://127.0.0.1:9",))
    registry = Metrics(WorkerPool([model])).registry
    added = re.findall(r"^# TYPE (\S+)", asyncio.run(merged_metrics([(WORKER, None)])), re.MULTILINE)
    return {family.name for family in registry.collect()} | set(added)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.get("alert") or rule["record"])
def test_every_metric_of_a_rule_exists(rule: dict[str, Any]) -> None:
    recorded = {other["record"] for other in RULES if "record" in other}
    built_in = {"up"}
    names = metric_names(rule["expr"]) - recorded - built_in
    assert metric_names(rule["expr"]), "the expression reads nothing"
    engine = {name for name in names if name.startswith("vllm:")}
    assert base_names(engine) <= base_names(vllm_families() if engine else set())
    assert base_names(names - engine) <= base_names(gateway_families())


def test_every_way_a_request_can_end_is_counted_as_failed_or_not() -> None:
    expression = next(
        rule["expr"] for rule in RULES if rule.get("record") == "model:galley_requests_failed:ratio_rate5m"
    )
    failed = set(re.search(r'outcome=~"([^"]*)"', expression)[1].split("|"))
    assert failed == set(Outcome) - {Outcome.OK, Outcome.CLIENT_ERROR, Outcome.CANCELLED}


def test_the_first_token_threshold_is_a_bound_of_a_bucket() -> None:
    threshold = float(ALERTS["GalleyFirstTokenSlow"]["expr"].rsplit(">", 1)[1])
    metrics = Metrics(WorkerPool([ModelConfig(name=MODEL)]))
    metrics.of_stream(MODEL, "chat").ttft.observe(0)
    exposed = {sample.labels.get("le") for family in metrics.registry.collect() for sample in family.samples}
    assert str(threshold) in exposed


def test_a_scrape_outlasts_what_the_gateway_gives_its_workers() -> None:
    def seconds(value: str) -> float:
        return float(value.removesuffix("s"))

    timeout = seconds(CONFIG["global"]["scrape_timeout"])
    assert SCRAPE_SECONDS < timeout <= seconds(CONFIG["global"]["scrape_interval"])


@needs_promtool
def test_promtool_accepts_the_configuration_and_the_rules() -> None:
    check = ["promtool", "check", "config", str(FOLDER / "prometheus.yml")]
    found = subprocess.run(check, capture_output=True, text=True, check=False, timeout=60)
    assert found.returncode == 0, found.stdout + found.stderr
    assert f"{len(RULES)} rules found" in found.stdout


@needs_promtool
def test_alerts_fire_on_what_they_are_for() -> None:
    tests = Path(__file__).with_name("rules.test.yml")
    covered = {
        case["alertname"]
        for test in yaml.safe_load(tests.read_text())["tests"]
        for case in test["alert_rule_test"]
        if case.get("exp_alerts")
    }
    assert covered == set(ALERTS)
    command = ["promtool", "test", "rules", tests.name]
    found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, cwd=tests.parent)
    assert found.returncode == 0, found.stdout + found.stderr


@needs_promtool
@pytest.mark.parametrize("path", ["/metrics", "/metrics/workers"])
def test_promtool_can_read_what_the_gateway_exposes(prometheus: Prometheus, path: str) -> None:
    text = prometheus.stack.gateway.client.get(path).content
    found = subprocess.run(
        ["promtool", "check", "metrics"], input=text, capture_output=True, check=False, timeout=60
    )
    # Status 3 is advice about names; what cannot be parsed is status 1.
    assert found.returncode in (0, 3), found.stderr.decode()


class Prometheus:
    """A running Prometheus and what it scrapes."""

    def __init__(self, server: Server, stack: MockStack) -> None:
        self.server = server
        self.stack = stack

    def query(self, expression: str) -> list[dict[str, Any]]:
        return self.get("query", query=expression)["result"]

    def get(self, path: str, **parameters: str) -> Any:
        answer = self.server.client.get(f"/api/v1/{path}", params=parameters)
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]

    def value(self, expression: str) -> float | None:
        found = self.query(expression)
        return float(found[0]["value"][1]) if found else None

    def eventually(self, condition: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + SCRAPED_SECONDS
        while not (found := condition()):
            assert time.monotonic() < deadline, "Prometheus does not show it"
            time.sleep(0.2)
        return found


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Prometheus with the repository's configuration, but for its targets and its pace."""
    if shutil.which("prometheus") is None:
        pytest.skip("prometheus is not installed (apt-get install prometheus)")
    folder = tmp_path_factory.mktemp("prometheus")
    with mock_stack(folder) as stack:
        config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
        for job in config["scrape_configs"]:
            job["static_configs"] = [{"targets": [stack.gateway.url.removeprefix("http://")]}]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        shutil.copy(FOLDER / "rules.yml", folder)
        port = free_port()
        command = ["prometheus", f"--config.file={folder}/prometheus.yml"]
        command += [f"--storage.tsdb.path={folder}/data", f"--web.listen-address=127.0.0.1:{port}"]
        with running(command, dict(os.environ), port, health="/-/ready") as server:
            send_requests(stack)
            yield Prometheus(server, stack)


def send_requests(stack: MockStack) -> None:
    """One whole chat, one streamed, and an embedding."""
    chat = {"model": MODEL, "messages": [{"role": "user", "content": "Bread, please"}], "max_tokens": 5}
    for document in (chat, {**chat, "stream": True}):
        stack.gateway.client.post("/v1/chat/completions", json=document).raise_for_status()
    embedding = {"model": MODEL, "input": "Bread"}
    stack.gateway.client.post("/v1/embeddings", json=embedding).raise_for_status()


@needs_prometheus
def test_prometheus_scrapes_the_gateway(prometheus: Prometheus) -> None:
    prometheus.eventually(lambda: prometheus.value('up{job="galley"}') == 1)
    ok = f'galley_requests_total{{model="{MODEL}",route="chat",outcome="ok"}}'
    prometheus.eventually(lambda: prometheus.value(ok) == 2)
    assert prometheus.value(f'galley_requests_total{{model="{MODEL}",route="embeddings",outcome="ok"}}') == 1
    assert prometheus.value('galley_tokens_total{direction="completion"}') == 10
    assert prometheus.value("galley_time_to_first_token_seconds_count") == 1


@needs_prometheus
def test_prometheus_scrapes_the_engines_through_the_gateway(prometheus: Prometheus) -> None:
    prometheus.eventually(lambda: prometheus.value("vllm:generation_tokens_total") == 10)
    [sample] = prometheus.query("vllm:generation_tokens_total")
    labels = {"job": "galley-workers", "worker": WORKER, "model_name": MODEL}
    assert labels.items() <= sample["metric"].items()
    assert prometheus.value(f'galley_worker_scrape_up{{worker="{WORKER}"}}') == 1


@needs_prometheus
def test_prometheus_evaluates_every_rule(prometheus: Prometheus) -> None:
    def health() -> dict[str, str]:
        groups = prometheus.get("rules")["groups"]
        return {rule["name"]: rule["health"] for group in groups for rule in group["rules"]}

    prometheus.eventually(lambda: set(health().values()) == {"ok"})
    assert len(health()) == len(RULES)
    ready = f'instance_model:galley_workers_ready:sum{{model="{MODEL}"}}'
    prometheus.eventually(lambda: prometheus.value(ready) == 1)


@needs_prometheus
def test_every_metric_that_rules_read_of_the_gateway_is_scraped(prometheus: Prometheus) -> None:
    read = {name for rule in RULES for name in metric_names(rule["expr"]) if name.startswith("galley_")}
    prometheus.eventually(lambda: read <= set(prometheus.get("label/__name__/values")))


@needs_prometheus
def test_losing_the_only_worker_is_seen(prometheus: Prometheus) -> None:
    """Last in this file: the worker does not come back."""
    prometheus.stack.engine.process.kill()
    prometheus.stack.engine.process.wait(10)

    def pending() -> set[str]:
        return {alert["labels"]["alertname"] for alert in prometheus.get("alerts")["alerts"]}

    scraped = f'galley_worker_scrape_up{{worker="{WORKER}"}}'
    prometheus.eventually(lambda: prometheus.value(scraped) == 0)
    # No second alert for one cause: metrics are missed of ready workers alone.
    prometheus.eventually(lambda: pending() == {"GalleyModelUnavailable"})
