"""Which routes there are, and how the gateway drains."""

from __future__ import annotations

import asyncio

import pytest

from galley.routes import PASSED_THROUGH, route_of

pytestmark = pytest.mark.anyio

CHAT = {"model": "mock", "messages": [{"role": "user", "content": "Bread, please"}]}
OWN = ("/v1/models", "/v1/models/mock", "/health", "/health/live", "/health/ready", "/metrics", "/workers")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/"),
        ("POST", "/nothing"),
        ("POST", "/v1/chat/completions/"),
        ("POST", "//v1/chat/completions"),
        ("POST", "/v1/load_lora_adapter"),
        ("POST", "/sleep"),
        ("POST", "/reset_prefix_cache"),
        ("POST", "/collective_rpc"),
        ("GET", "/v1/responses/a/b"),
        ("GET", "/v1/responses/..%2Fmetrics"),
        ("GET", "/docs"),
        ("GET", "/openapi.json"),
        ("GET", "/v1/models/"),
        ("GET", "/health/"),
    ],
)
async def test_what_is_not_in_the_table_does_not_exist(rig, method, path):
    answer = await rig.client.request(method, path)
    assert answer.status_code == 404
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert not rig.engine.requests


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v1/chat/completions", "POST"),
        ("DELETE", "/v1/embeddings", "POST"),
        ("POST", "/version", "GET, HEAD"),
        ("OPTIONS", "/v1/responses/resp_1", "GET, HEAD"),
        *(("POST", path, "GET, HEAD") for path in OWN),
    ],
)
async def test_a_wrong_method_is_told_the_right_ones(rig, method, path, allowed):
    answer = await rig.client.request(method, path)
    assert answer.status_code == 405
    assert answer.headers["allow"] == allowed
    error = answer.json()["error"]
    assert error["code"] == "method_not_allowed"
    assert error["message"] == f"{path} was asked with {method}, expected {allowed}."


@pytest.mark.parametrize("path", OWN)
async def test_head_is_get_without_the_body(rig, path):
    got, head = await rig.client.get(path), await rig.client.head(path)
    assert got.status_code == head.status_code == 200
    assert head.content == b""
    assert head.headers["content-type"] == got.headers["content-type"]
    assert "content-length" in head.headers


def test_every_route_is_found_by_its_path_and_only_that():
    for route in PASSED_THROUGH:
        assert route_of(route.path.replace("{id}", "resp_a-1")) is route
    assert route_of("/v1/responses/" + "x" * 129) is None
    assert route_of("/v1/responses/a\n") is None


async def test_draining_refuses_new_work_and_ends_when_the_old_is_done(rig):
    held = asyncio.create_task(rig.chat(mock={"gates": {"headers": "held"}}))
    await rig.engine.gates.reached("held")
    rig.gateway.begin_drain()
    assert rig.gateway.draining
    refused = await rig.chat()
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "draining"
    assert refused.headers["connection"] == "close"
    assert "retry-after" in refused.headers
    for path in ("/health", "/health/ready"):
        health = await rig.client.get(path)
        assert health.status_code == 503
        assert health.json() == {"status": "draining", "running": 1}
    assert (await rig.client.get("/health/live")).status_code == 200
    assert await rig.gateway.drained(0.01) is False
    rig.engine.gates.release("held")
    assert await rig.gateway.drained(10) is True
    assert (await held).status_code == 200


async def test_an_answer_that_does_not_end_is_cut_off_with_an_error(rig):
    held = asyncio.create_task(rig.chat(mock={"gates": {"body": "held"}}))
    await rig.engine.gates.reached("held")
    rig.gateway.begin_drain()
    assert rig.gateway.abort() == 1
    assert await rig.gateway.drained(10) is True
    answer = await held
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "shut_down"
    await rig.engine.until(lambda: rig.engine.requests[0].disconnected)


async def test_a_stream_that_does_not_end_is_cut_off_with_an_error_event(rig):
    document = {**CHAT, "stream": True, "mock": {"gates": {"token-2": "held"}}}
    async with rig.client.stream("POST", "/v1/chat/completions", json=document) as answer:
        lines = answer.aiter_lines()
        assert (await anext(lines)).startswith("data: ")
        assert rig.gateway.abort() == 1
        rest = [line async for line in lines if line]
    assert answer.status_code == 200
    assert '"code":"shut_down"' in rest[-2]
    assert rest[-1] == "data: [DONE]"
    await rig.engine.until(lambda: rig.engine.requests[0].disconnected)


async def test_nothing_but_http_is_served(rig):
    await rig.gateway({"type": "websocket"}, None, None)


async def test_the_lifespan_opens_and_closes_the_relay(rig):
    await rig.gateway.relay.close()
    asked = iter([{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}])
    told = []

    async def receive():
        return next(asked)

    async def send(message):
        if not told:
            assert (await rig.chat()).status_code == 200
        told.append(message["type"])

    await rig.gateway({"type": "lifespan"}, receive, send)
    assert told == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
