"""The mock engine is a worker that does what its script says."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import struct

import httpx
import orjson
import pytest

from galley.mock_engine import Fault, MockEngine, Script, listen, serve
from galley.mock_engine.script import ScriptError

pytestmark = pytest.mark.anyio

CHAT = {"model": "mock", "messages": [{"role": "user", "content": "Bread, please"}]}


@pytest.fixture
async def engine():
    engine = MockEngine(models=("mock", "alias"))
    async with listen(engine) as listener:
        engine.listener = listener
        yield engine


@pytest.fixture
async def client(engine):
    async with httpx.AsyncClient(base_url=engine.listener.url, timeout=20) as client:
        yield client


async def test_the_same_request_gets_the_same_bytes(client):
    for document in (CHAT, {**CHAT, "stream": True}):
        first, second = [await client.post("/v1/chat/completions", json=document) for _ in range(2)]
        assert first.content == second.content
    other = await client.post("/v1/chat/completions", json={**CHAT, "messages": [{"content": "Wine"}]})
    assert other.json()["choices"][0]["message"] != first.content


async def test_a_stream_says_what_the_unary_answer_says(client):
    unary = (await client.post("/v1/chat/completions", json={**CHAT, "n": 2})).json()
    stream = await client.post("/v1/chat/completions", json={**CHAT, "n": 2, "stream": True})
    texts = ["", ""]
    for line in stream.text.splitlines():
        if line.startswith("data: {"):
            [choice] = orjson.loads(line[6:])["choices"]
            texts[choice["index"]] += choice["delta"]["content"]
    assert texts == [choice["message"]["content"] for choice in unary["choices"]]


async def test_the_script_sets_the_number_of_tokens(client):
    answer = await client.post("/v1/completions", json={"prompt": "x", "mock": {"tokens": 40}})
    assert answer.json()["usage"]["completion_tokens"] == 40


async def test_a_script_comes_from_the_engine_the_request_or_a_header(client, engine):
    engine.script = Script(tokens=1)

    async def tokens(**request) -> int:
        answer = await client.post("/v1/completions", **request)
        return answer.json()["usage"]["completion_tokens"]

    assert await tokens(json={"prompt": "x"}) == 1
    assert await tokens(json={"prompt": "x", "mock": {"tokens": 2}}) == 2
    assert await tokens(json={"prompt": "x", "mock": {"tokens": 2}}, headers={"x-mock": '{"tokens":3}'}) == 3


async def test_a_script_over_http(client, engine):
    assert (await client.post("/mock/script", json={"fault": "error"})).status_code == 200
    assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 500
    assert engine.script.fault is Fault.ERROR
    wrong = await client.post("/mock/script", json={"fault": "none"})
    assert wrong.status_code == 400
    assert "expected one of hang, error" in wrong.json()["error"]["message"]
    assert (await client.post("/mock/script")).status_code == 200
    assert engine.script == Script()


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ([], "found list, expected an object"),
        ({"token": 1}, "script.token: unknown"),
        ({"tokens": "1"}, "script.tokens: found '1'"),
        ({"delay": -1}, "expected a number from 0 on"),
        ({"gates": {"end": 1}}, "script.gates"),
        ({"gates": []}, "script.gates"),
        ({"headers": [["a"]]}, "script.headers"),
        ({"fault": 3}, "script.fault"),
    ],
)
def test_scripts_that_cannot_be_followed(script, message):
    with pytest.raises(ScriptError, match=message.replace(".", r"\.")):
        Script().with_changes(script)


async def test_delays_pass(client):
    script = {"delay": 0.02, "token_delay": 0.01, "tokens": 3}
    started = asyncio.get_running_loop().time()
    await client.post("/v1/chat/completions", json={**CHAT, "stream": True, "mock": script})
    assert asyncio.get_running_loop().time() - started >= 0.05


@pytest.mark.parametrize("fault", [Fault.CLOSE, Fault.RESET, Fault.GARBAGE, Fault.RESET_AFTER_HEADERS])
@pytest.mark.parametrize("stream", [False, True])
async def test_faults_break_the_connection(client, engine, fault, stream):
    with pytest.raises(httpx.TransportError):
        await client.post("/v1/chat/completions", json={**CHAT, "stream": stream, "mock": {"fault": fault}})
    assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200
    assert engine.counters.running == 0


@pytest.mark.parametrize("fault", [Fault.RESET_MID_STREAM, Fault.HALF_EVENT])
async def test_faults_within_a_stream_come_after_whole_tokens(client, fault):
    document = {**CHAT, "stream": True, "mock": {"fault": fault, "fault_after": 2}}
    seen = b""
    async with client.stream("POST", "/v1/chat/completions", json=document) as answer:
        pieces = answer.aiter_raw()
        with contextlib.suppress(httpx.TransportError):
            async for piece in pieces:
                seen += piece
            pytest.fail("the connection was not broken")
    assert seen.count(b"\n\n") == 3
    assert seen.endswith(b"\n\n") == (fault is Fault.RESET_MID_STREAM)


async def test_a_gate_holds_until_it_is_released_over_http(client, engine):
    held = asyncio.create_task(
        client.post("/v1/chat/completions", json={**CHAT, "mock": {"gates": {"end": "g"}}})
    )
    await engine.gates.reached("g")
    assert engine.counters.running == 1
    assert "vllm:num_requests_running" in engine.metrics()
    assert (await client.post("/mock/gates/g/release")).status_code == 200
    assert (await held).status_code == 200
    assert (await client.post("/mock/gates/g/hold")).status_code == 200
    again = asyncio.create_task(
        client.post("/v1/chat/completions", json={**CHAT, "mock": {"gates": {"end": "g"}}})
    )
    await engine.gates.reached("g")
    engine.gates.release_all()
    assert (await again).status_code == 200


async def test_requests_are_kept_with_what_became_of_them(client, engine):
    await client.post("/v1/chat/completions", json=CHAT, headers={"x-two": "é".encode()})
    hang = {**CHAT, "mock": {"fault": "hang"}}
    with pytest.raises(httpx.ReadTimeout):
        await client.post("/v1/chat/completions", json=hang, timeout=0.1)
    await engine.until(lambda: engine.counters.running == 0)
    first, second = (await client.get("/mock/requests")).json()["requests"]
    assert base64.b64decode(first["body_base64"]) == engine.requests[0].body
    assert engine.requests[0].document == CHAT
    assert ["x-two", "Ã©"] in first["headers"]
    assert (first["disconnected"], second["disconnected"]) == (False, True)
    await client.delete("/mock/requests")
    assert not engine.requests


async def test_refusing_connections_and_coming_back(client, engine):
    await engine.listener.stop()
    with pytest.raises(httpx.ConnectError):
        await client.get("/health")
    await engine.listener.stop()
    await engine.listener.start()
    assert (await client.get("/health")).status_code == 200


async def test_health_models_and_metrics(client, engine):
    await client.post("/v1/chat/completions", json=CHAT)
    assert [card["id"] for card in (await client.get("/v1/models")).json()["data"]] == ["mock", "alias"]
    metrics = (await client.get("/metrics")).text
    assert 'vllm:generation_tokens_total{model_name="mock"} 8.0' in metrics
    assert 'vllm:prompt_tokens_total{model_name="mock"} 2.0' in metrics
    engine.healthy = False
    assert (await client.get("/health")).status_code == 503
    assert (await client.get("/version")).json() == {"version": "mock"}
    for path in ("/nothing", "/mock/nothing"):
        assert (await client.get(path)).status_code == 404


@pytest.mark.parametrize("body", [b"", b"[]", b'{"model":"other"}', b'{"mock":{"x":1}}'])
async def test_wrong_requests_are_refused(client, body):
    assert (await client.post("/v1/chat/completions", content=body)).status_code == 400


async def test_embeddings_have_length_one_and_both_encodings_agree(client):
    document = {"input": ["bread", "oven"], "dimensions": 4}
    floats = (await client.post("/v1/embeddings", json=document)).json()["data"]
    encoded = (await client.post("/v1/embeddings", json={**document, "encoding_format": "base64"})).json()[
        "data"
    ]
    for plain, coded in zip(floats, encoded, strict=True):
        assert list(struct.unpack("<4f", base64.b64decode(coded["embedding"]))) == plain["embedding"]
        assert sum(part * part for part in plain["embedding"]) == pytest.approx(1)
    ids = (await client.post("/v1/embeddings", json={"input": [1, 2, 3]})).json()
    assert len(ids["data"]) == 1


async def test_tokens_there_and_back(client):
    tokens = (await client.post("/tokenize", json={"prompt": "a b a"})).json()
    assert tokens["count"] == 3
    assert tokens["tokens"][0] == tokens["tokens"][2]
    text = (await client.post("/detokenize", json={"tokens": [1, 2]})).json()
    assert text == {"prompt": "1 2"}


async def test_text_within_parts_counts_as_text(client):
    parts = [{"role": "user", "content": [{"type": "text", "text": "one two"}]}, {"content": None}]
    answer = await client.post("/v1/chat/completions", json={"messages": parts})
    assert answer.json()["usage"]["prompt_tokens"] == 2


async def test_it_serves_on_a_port_until_it_is_cancelled(unused_port):
    task = asyncio.create_task(serve(port=unused_port, models=("mine",)))
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{unused_port}") as client:
        for _ in range(1000):
            try:
                answer = await client.get("/v1/models")
                break
            except httpx.ConnectError:
                await asyncio.sleep(0)
    assert answer.json()["data"][0]["id"] == "mine"
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.fixture
def unused_port() -> int:
    import socket

    with socket.socket() as plain:
        plain.bind(("127.0.0.1", 0))
        return plain.getsockname()[1]
