"""Requests that are wrong, too large, or for a model that cannot serve them."""

from __future__ import annotations

import asyncio

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from galley.config import ModelConfig
from galley.errors import GatewayError
from galley.inbound import read_head
from galley.routes import route_of

pytestmark = pytest.mark.anyio

CHAT = {"model": "mock", "messages": [{"role": "user", "content": "Bread, please"}]}
PATH = "/v1/chat/completions"
TWO = (
    ModelConfig(name="one", tasks=frozenset({"generate"})),
    ModelConfig(name="two", tasks=frozenset({"embed"})),
)


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        (b"", "invalid_json", "not valid JSON"),
        (b'{"model": "mock"', "invalid_json", "not valid JSON"),
        (b'{"model": "\xff"}', "invalid_json", "not valid JSON"),
        (b"[" * 5000, "invalid_json", "not valid JSON"),
        (b'["mock"]', "invalid_body", "is an array, expected a JSON object"),
        (b"null", "invalid_body", "is null"),
        (b'"mock"', "invalid_body", "is a string"),
        (b"1.5", "invalid_body", "is a number"),
        (b'{"model": 3}', "invalid_type", "model: found a number, expected a string"),
        (b'{"model": {}}', "invalid_type", "model: found an object, expected a string"),
        (b'{"stream": "yes"}', "invalid_type", "stream: found a string, expected true or false"),
        (b'{"stream": 1}', "invalid_type", "stream: found a number, expected true or false"),
    ],
)
async def test_a_body_that_is_wrong_is_refused_with_what_was_found(rig, body, code, message):
    answer = await rig.client.post(PATH, content=body)
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert error["code"] == code
    assert error["type"] == "invalid_request_error"
    assert message in error["message"]
    assert not rig.engine.requests
    await rig.idle()
    labels = {"model": "unknown", "route": "chat", "outcome": "client_error"}
    assert rig.metric("galley_requests_total", **labels) == 1


@given(st.binary(max_size=60) | st.text(max_size=30).map(str.encode))
def test_no_body_breaks_the_reader(body):
    try:
        head = read_head(route_of(PATH), body, b"")
    except GatewayError as error:
        assert error.kind.status == 400  # noqa: PT017
        orjson.loads(error.body())
    else:
        assert isinstance(head.document, dict)


@pytest.mark.parametrize("members", [{}, {"model": None}, {"stream": None}])
async def test_the_only_model_serves_requests_that_name_none(rig, members):
    document = {"messages": CHAT["messages"], **members}
    answer = await rig.post(document=document)
    assert answer.status_code == 200
    assert rig.engine.requests[-1].document == document


@pytest.mark.parametrize("path", [PATH, "/detokenize", "/tokenize", "/v1/embeddings"])
async def test_several_models_ask_for_a_name(make_rig, path):
    rig = await make_rig(models=TWO)
    answer = await rig.post(path, {"tokens": [1]})
    assert answer.status_code == 400
    assert answer.json()["error"] == {
        "message": "model: missing, expected one of: one, two.",
        "type": "invalid_request_error",
        "param": "model",
        "code": "model_required",
    }
    assert (await rig.client.get("/version")).status_code == 400
    assert (await rig.client.get("/version?model=two&model=x")).status_code == 200
    assert (await rig.client.get("/version?model=")).status_code == 400


async def test_an_unknown_model_is_not_found(rig):
    answer = await rig.chat(model="x" * 1000)
    error = answer.json()["error"]
    assert answer.status_code == 404
    assert error["code"] == "model_not_found"
    assert error["param"] == "model"
    assert "expected one of: mock" in error["message"]
    assert len(error["message"]) < 300
    await rig.idle()
    assert rig.metric("galley_requests_total", model="unknown", route="chat", outcome="client_error") == 1


async def test_a_long_list_of_models_is_cut(make_rig):
    models = tuple(ModelConfig(name=f"m{number}") for number in range(25))
    rig = await make_rig(models=models, ready=False)
    answer = await rig.chat(model="x")
    assert answer.json()["error"]["message"].endswith("m19 and 5 more.")


async def test_a_model_is_not_asked_for_what_it_cannot_do(make_rig):
    rig = await make_rig(models=TWO)
    answer = await rig.post("/v1/embeddings", {"model": "one", "input": "x"})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == (
        "The model one does not embed; it is configured for: generate."
    )
    assert (await rig.post("/v1/embeddings", {"model": "two", "input": "x"})).status_code == 200
    assert (await rig.chat(model="two")).status_code == 400
    assert (await rig.chat(model="one")).status_code == 200


async def test_a_known_model_without_a_ready_worker_is_unavailable(make_rig):
    rig = await make_rig(ready=False)
    answer = await rig.chat()
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) > 0
    assert answer.json()["error"]["message"] == "No worker of the model mock is ready: mock-0 starting."
    await rig.idle()
    assert rig.metric("galley_requests_total", model="mock", route="chat", outcome="unavailable") == 1


async def test_a_model_without_any_worker_is_unavailable(make_rig):
    rig = await make_rig(replicas=0)
    answer = await rig.chat()
    assert answer.status_code == 503
    assert answer.json()["error"]["message"] == "No worker of the model mock is ready: none was started."


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_over_the_limit_is_refused_and_the_connection_goes_on(make_rig, chunked):
    rig = await make_rig(max_body_bytes=1024)

    async def pieces():
        for _ in range(40):
            yield b"x" * 65_536

    content = pieces() if chunked else b"x" * 40 * 65_536
    answer = await rig.client.post(PATH, content=content)
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "body_too_large"
    assert "1024 bytes" in answer.json()["error"]["message"]
    assert (await rig.chat()).status_code == 200


async def test_a_body_at_the_limit_passes(make_rig):
    rig = await make_rig(max_body_bytes=1024)
    body = orjson.dumps(CHAT)
    padding = b" " * (1024 - len(body))
    assert (await rig.client.post(PATH, content=body + padding)).status_code == 200
    assert (await rig.client.post(PATH, content=body + padding + b" ")).status_code == 413


async def test_a_client_that_waits_for_leave_to_send_is_told_to_hang_up(make_rig):
    rig = await make_rig(max_body_bytes=1024)
    host, port = rig.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"POST %b HTTP/1.1\r\nhost: x\r\n" % PATH.encode())
    writer.write(b"content-length: 5000\r\nexpect: 100-continue\r\n\r\n")
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"connection: close" in answer


async def test_a_client_that_waits_for_leave_gets_it(rig):
    body = orjson.dumps(CHAT)
    host, port = rig.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"POST %b HTTP/1.1\r\nhost: x\r\nconnection: close\r\n" % PATH.encode())
    writer.write(b"content-length: %d\r\nexpect: 100-continue\r\n\r\n" % len(body))
    assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    writer.write(body)
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    assert answer.startswith(b"HTTP/1.1 200")
    assert rig.engine.requests[-1].header("expect") is None


@pytest.mark.parametrize(
    "head",
    [
        b"content-length: 5\r\ncontent-length: 6\r\n",
        b"content-length: 5\r\ntransfer-encoding: chunked\r\n",
        b"content-length: -1\r\n",
        b"content-length: five\r\n",
    ],
)
async def test_a_head_that_could_smuggle_a_request_never_reaches_a_worker(rig, head):
    host, port = rig.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"POST %b HTTP/1.1\r\nhost: x\r\n%b\r\nhello" % (PATH.encode(), head))
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    assert answer.startswith(b"HTTP/1.1 400")
    assert not rig.engine.requests
