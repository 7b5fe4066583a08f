"""What is logged of a request, and what never is."""

from __future__ import annotations

import json
import logging

import pytest
import structlog

from galley import logs
from galley.config import GatewayConfig

pytestmark = pytest.mark.anyio

CHAT = {"model": "mock", "messages": [{"role": "user", "content": "a secret prompt"}]}


@pytest.fixture
def configured(capsys):
    """Configure logging for one test; `lines()` are what came out since."""
    root = logging.getLogger()
    before = (root.handlers, root.level)

    def configure(**options):
        logs.configure(GatewayConfig(**{"log_format": "json", **options}))
        return lambda: [line for line in capsys.readouterr().err.splitlines() if line]

    yield configure
    root.handlers, level = before[0], before[1]
    root.setLevel(level)
    structlog.reset_defaults()


async def logged(rig, lines, **request) -> dict:
    rig.gateway.relay._config = rig.gateway.relay._config.model_copy(update={"access_log": True})
    await rig.client.post("/v1/chat/completions", **request)
    await rig.idle()
    [entry] = [json.loads(line) for line in lines()]
    return entry


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_is_one_line_without_secrets(configured, rig, stream):
    lines = configured()
    headers = {"authorization": "Bearer secret", "x-request-id": "req-1"}
    entry = await logged(rig, lines, json={**CHAT, "stream": stream}, headers=headers)
    assert entry.pop("timestamp").endswith("Z")
    assert 0 < entry.pop("ms") < 10_000
    assert entry == {
        "message": "request",
        "level": "info",
        "request_id": "req-1",
        "method": "POST",
        "route": "chat",
        "model": "mock",
        "worker": "mock-0",
        "status": 200,
        "outcome": "ok",
        "stream": stream,
        "prompt_tokens": 3,
        "completion_tokens": 8,
    }


async def test_a_failure_is_logged_with_its_code(configured, rig):
    entry = await logged(rig, configured(), json={**CHAT, "model": "a secret name"})
    assert (entry["status"], entry["outcome"], entry["code"]) == (404, "client_error", "model_not_found")
    assert entry["model"] == "unknown"
    assert "secret" not in json.dumps(entry)


async def test_a_client_that_left_is_a_499(configured, rig):
    rig.gateway.relay._config = rig.gateway.relay._config.model_copy(update={"access_log": True})
    lines = configured()
    async with rig.raw({**CHAT, "mock": {"gates": {"headers": "held"}}}):
        await rig.engine.gates.reached("held")
    await rig.idle()
    [entry] = [json.loads(line) for line in lines()]
    assert (entry["status"], entry["outcome"]) == (499, "cancelled")


async def test_no_line_where_none_is_wanted(configured, rig):
    lines = configured()
    await rig.chat()
    await rig.idle()
    assert lines() == []


async def test_a_fault_of_the_gateway_is_logged_with_its_traceback(configured, rig, monkeypatch):
    lines = configured(log_level="error")
    monkeypatch.setattr(rig.pool, "choose", lambda *_, **__: 1 / 0)
    assert (await rig.chat()).status_code == 500
    [entry] = [json.loads(line) for line in lines()]
    assert entry["level"] == "error"
    assert "ZeroDivisionError" in entry["exception"]


def test_levels_and_the_console_form(configured):
    lines = configured(log_format="console", log_level="warning")
    log = structlog.get_logger("test")
    log.info("not this")
    log.warning("this", worker="w-0", empty=None)
    [line] = lines()
    assert "this" in line
    assert "worker=w-0" in line
    assert "empty" not in line


def test_libraries_speak_in_the_same_form(configured):
    lines = configured(log_level="debug")
    logging.getLogger("some_package").warning("careful: %s", 3)
    logging.getLogger("some_package").info("chatter")
    [entry] = [json.loads(line) for line in lines()]
    assert (entry["message"], entry["level"]) == ("careful: 3", "warning")
