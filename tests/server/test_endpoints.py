"""The gateway's own routes, as clients, probes and operators read them."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from galley.config import ModelConfig

pytestmark = pytest.mark.anyio

TWO = (ModelConfig(name="one", aliases=("uno",)), ModelConfig(name="org/two"))


async def test_models_are_merged_over_workers(make_rig):
    rig = await make_rig(models=TWO, replicas=2)
    adapter = {"id": "adapter", "object": "model", "parent": "one", "max_model_len": 64}
    rig.pool.get("one-0").set_cards([{"id": "one", "max_model_len": 4096}, {"id": "uno"}])
    rig.pool.get("one-1").set_cards([{"id": "one", "max_model_len": 4096}, adapter])
    listed = (await rig.client.get("/v1/models")).json()
    assert listed["object"] == "list"
    assert [card["id"] for card in listed["data"]] == ["one", "uno", "org/two", "adapter"]
    assert listed["data"][0]["max_model_len"] == 4096
    assert listed["data"][3] == adapter
    assert listed["data"][2] == {"id": "org/two", "object": "model", "created": 0, "owned_by": "galley"}


async def test_one_model_by_its_name(make_rig):
    rig = await make_rig(models=TWO)
    rig.pool.get("one-0").set_cards([{"id": "one", "max_model_len": 4096}])
    assert (await rig.client.get("/v1/models/one")).json() == {"id": "one", "max_model_len": 4096}
    assert (await rig.client.get("/v1/models/org/two")).json()["id"] == "org/two"
    missing = await rig.client.get("/v1/models/three")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"
    assert "'three'" in missing.json()["error"]["message"]


async def test_the_card_of_a_ready_worker_comes_first(make_rig):
    rig = await make_rig(replicas=2)
    rig.pool.get("mock-0").set_cards([{"id": "mock", "max_model_len": 1}])
    rig.pool.get("mock-1").set_cards([{"id": "mock", "max_model_len": 2}])
    rig.pool.get("mock-0").mark_down("gone")
    assert (await rig.client.get("/v1/models/mock")).json()["max_model_len"] == 2


async def test_readiness_is_that_every_model_has_a_worker(make_rig):
    rig = await make_rig(models=TWO, replicas=2)
    assert (await rig.client.get("/health")).status_code == 200
    rig.pool.get("one-0").mark_down("exit code 9")
    ready = await rig.client.get("/health/ready")
    assert ready.status_code == 200
    rig.pool.get("one-1").mark_unhealthy("no answer")
    for path in ("/health", "/health/ready"):
        answer = await rig.client.get(path)
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "2"
        assert answer.json() == {
            "status": "not ready",
            "models": {
                "one": {"one-0": "down (exit code 9)", "one-1": "unhealthy (no answer)"},
                "org/two": {"org/two-0": "ready", "org/two-1": "ready"},
            },
        }
    live = await rig.client.get("/health/live")
    assert (live.status_code, live.json()) == (200, {"status": "live"})


async def test_workers_as_an_operator_sees_them(rig):
    worker = rig.workers[0]
    worker.mark_down("exit code 9")
    worker.mark_starting(worker_url := rig.listeners[0].url)
    [seen] = (await rig.client.get("/workers")).json()["workers"]
    since = seen.pop("since")
    assert since == pytest.approx(worker.since)
    assert seen == {
        "id": "mock-0",
        "model": "mock",
        "url": worker_url,
        "external": False,
        "state": "starting",
        "reason": None,
        "in_flight": 0,
        "restarts": 1,
    }


async def test_the_gateways_metrics_parse_and_follow_what_happens(rig):
    await rig.chat()
    await rig.chat(model="nobody's")
    await rig.idle()
    answer = await rig.client.get("/metrics")
    families = {family.name: family for family in text_string_to_metric_families(answer.text)}
    samples = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families.values()
        for sample in family.samples
    }
    done = (("model", "mock"), ("outcome", "ok"), ("route", "chat"))
    refused = (("model", "unknown"), ("outcome", "client_error"), ("route", "chat"))
    assert samples["galley_requests_total", done] == 1
    assert samples["galley_requests_total", refused] == 1
    assert samples["galley_worker_state", (("state", "ready"), ("worker", "mock-0"))] == 1
    assert samples["galley_worker_state", (("state", "down"), ("worker", "mock-0"))] == 0
    assert samples["galley_worker_restarts_total", (("worker", "mock-0"),)] == 0
    overhead = samples["galley_gateway_overhead_seconds_sum", (("model", "mock"), ("route", "chat"))]
    duration = samples["galley_request_duration_seconds_sum", (("model", "mock"), ("route", "chat"))]
    assert 0 < overhead < duration
    assert "nobody" not in answer.text
    assert any(name.startswith("process_") for name in families)


async def test_engines_are_scraped_together(make_rig):
    rig = await make_rig(models=TWO)
    await rig.post(document={"model": "one", "messages": []})
    await rig.listeners[1].stop()
    answer = await rig.client.get("/metrics/workers")
    families = list(text_string_to_metric_families(answer.text))
    names = [family.name for family in families]
    assert len(names) == len(set(names))
    samples = {
        (sample.name, sample.labels["worker"]): sample.value
        for family in families
        for sample in family.samples
    }
    assert samples["vllm:request_success_total", "one-0"] == 1
    assert ("vllm:request_success_total", "org/two-0") not in samples
    assert samples["galley_worker_scrape_up", "one-0"] == 1
    assert samples["galley_worker_scrape_up", "org/two-0"] == 0


async def test_one_engine_is_scraped_as_it_is(rig):
    answer = await rig.client.get("/workers/mock-0/metrics")
    assert answer.text == rig.engine.metrics()
    assert answer.headers["content-type"].startswith("text/plain")
    missing = await rig.client.get("/workers/mock-7/metrics")
    assert missing.status_code == 404
    assert missing.json()["error"]["message"] == "There is no worker 'mock-7', expected one of: mock-0."
    await rig.listeners[0].stop()
    assert (await rig.client.get("/workers/mock-0/metrics")).status_code == 503
    rig.workers[0].mark_down("gone")
    assert (await rig.client.get("/workers/mock-0/metrics")).status_code == 503


async def test_a_fault_in_an_own_route_is_an_openai_error(rig, monkeypatch):
    monkeypatch.setattr(type(rig.pool), "names", property(lambda _: 1 / 0))
    answer = await rig.client.get("/v1/models")
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal_error"
