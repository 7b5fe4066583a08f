"""Workers that die, hang or refuse, at every moment of a request; and what the client reads then."""

from __future__ import annotations

import asyncio

import openai
import orjson
import pytest

pytestmark = pytest.mark.anyio

CHAT = {"model": "mock", "messages": [{"role": "user", "content": "Bread, please"}]}
STREAM = {**CHAT, "stream": True}


def events(content: bytes) -> list[bytes]:
    assert content.endswith(b"\n\n")
    return content.removesuffix(b"\n\n").split(b"\n\n")


def data(event: bytes) -> dict:
    line = next(line for line in event.splitlines() if line.startswith(b"data: "))
    return orjson.loads(line[6:])


async def collect(stream, into: list) -> None:
    async for each in stream:
        into.append(each)  # noqa: PERF401  # what came before the error is kept


def count(rig, outcome: str, route: str = "chat") -> float | None:
    return rig.metric("galley_requests_total", model="mock", route=route, outcome=outcome)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fault", "status", "code", "tries"),
    [
        ("close", 502, "worker_closed", 2),
        ("reset", 502, "worker_closed", 2),
        ("garbage", 502, "worker_invalid", 1),
        ("reset-after-headers", 502, "worker_died", 1),
    ],
)
async def test_a_worker_that_dies_before_its_first_byte(rig, fault, status, code, tries, stream):
    answer = await rig.chat(stream=stream, mock={"fault": fault})
    assert answer.status_code == status
    error = answer.json()["error"]
    assert error["code"] == code
    assert error["type"] == "worker_error"
    assert "mock-0" in error["message"]
    await rig.idle()
    assert len(rig.engine.requests) == tries
    assert count(rig, "worker_error") == 1


async def test_a_worker_that_dies_within_a_unary_answer(rig):
    answer = await rig.chat(mock={"fault": "reset-mid-body", "pad": 1_000_000})
    assert answer.status_code == 502
    assert answer.json()["error"]["code"] == "worker_died"
    assert len(rig.engine.requests) == 1  # it may have been worked on, so that it is not sent again


@pytest.mark.parametrize(("fault", "after"), [("reset-mid-stream", 1), ("half-event", 3), ("half-event", 0)])
async def test_a_worker_that_dies_within_a_stream(rig, fault, after):
    answer = await rig.chat(stream=True, mock={"fault": fault, "fault_after": after})
    assert answer.status_code == 200
    *before, error, done = events(answer.content)
    assert len(before) == 1 + after
    assert all(data(event)["choices"] for event in before)
    assert data(error)["error"]["code"] == "worker_died"
    assert done == b"data: [DONE]"
    await rig.idle()
    assert count(rig, "worker_error") == 1


async def test_the_official_client_raises_an_api_error_within_a_stream(rig):
    async with openai.AsyncOpenAI(base_url=f"{rig.url}/v1", api_key="-", max_retries=0) as client:
        stream = await client.chat.completions.create(
            **CHAT, stream=True, extra_body={"mock": {"fault": "half-event", "fault_after": 2}}
        )
        seen = []
        with pytest.raises(openai.APIError, match="middle of its answer"):
            await collect(stream, seen)
        assert len(seen) == 3
        responses = await client.responses.create(
            model="mock",
            input="Bread",
            stream=True,
            extra_body={"mock": {"fault": "reset-mid-stream", "fault_after": 2}},
        )
        seen = []
        with pytest.raises(openai.APIError, match="middle of its answer"):
            await collect(responses, seen)
        assert seen[-1].type == "response.output_text.delta"


async def test_the_error_event_of_the_responses_api_goes_on_counting(rig):
    document = {"model": "mock", "input": "Bread", "stream": True, "mock": {"fault": "half-event"}}
    answer = await rig.post("/v1/responses", document)
    *_, last, error = events(answer.content)
    assert error.startswith(b"event: error\n")
    assert data(error)["type"] == "error"
    assert data(error)["code"] == "worker_died"
    assert data(error)["sequence_number"] == data(last)["sequence_number"] + 1


async def test_the_error_event_of_the_messages_api(rig):
    answer = await rig.post("/v1/messages", {**STREAM, "max_tokens": 4, "mock": {"fault": "half-event"}})
    error = events(answer.content)[-1]
    assert error.startswith(b"event: error\n")
    assert data(error)["type"] == "error"
    assert data(error)["error"]["message"]
    answer = await rig.post("/v1/messages", {**CHAT, "mock": {"fault": "reset"}})
    assert answer.status_code == 502
    assert answer.json()["type"] == "error"


async def test_another_worker_takes_what_the_first_one_refused(make_rig):
    rig = await make_rig(replicas=2)
    await rig.listeners[0].stop()
    answers = [await rig.chat() for _ in range(4)]
    assert {answer.status_code for answer in answers} == {200}
    assert {answer.headers["x-galley-worker"] for answer in answers} == {"mock-1"}
    assert rig.metric("galley_retries_total", model="mock") == 1  # then it is known to refuse
    assert rig.workers[0].state == "unhealthy"


async def test_a_request_that_breaks_every_worker_is_tried_twice_and_no_more(make_rig):
    rig = await make_rig(replicas=3)
    answer = await rig.chat(mock={"fault": "close"})
    assert answer.status_code == 502
    assert sum(len(engine.requests) for engine in rig.engines) == 2
    assert max(len(engine.requests) for engine in rig.engines) == 1


async def test_an_idle_connection_that_the_worker_closed_costs_no_request(rig):
    await rig.chat()
    listener = rig.listeners[0]
    await listener.stop()
    await listener.start()
    assert (await rig.chat()).status_code == 200


async def test_nobody_listens_and_then_the_worker_is_back(rig):
    listener = rig.listeners[0]
    await listener.stop()
    answer = await rig.chat()
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "2"
    assert answer.json()["error"]["code"] == "worker_unreachable"
    answer = await rig.chat()
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "no_ready_worker"
    assert "connection refused" in answer.json()["error"]["message"]
    await listener.start()
    rig.workers[0].mark_ready()
    assert (await rig.chat()).status_code == 200


async def test_a_request_between_choice_and_restart_fails_cleanly(rig):
    rig.workers[0].url = None
    answer = await rig.chat()
    assert answer.status_code == 503
    rig.workers[0].url = rig.listeners[0].url


@pytest.mark.parametrize("stream", [False, True])
async def test_a_worker_that_takes_a_request_and_never_answers(make_rig, stream):
    rig = await make_rig(timeouts={"first_byte": 0.05})
    answer = await rig.chat(stream=stream, mock={"fault": "hang"})
    assert answer.status_code == 504
    assert answer.json()["error"]["code"] == "first_byte_timeout"
    assert "0.05 s" in answer.json()["error"]["message"]
    await rig.engine.until(lambda: rig.engine.requests[0].ended)
    assert rig.engine.requests[0].disconnected
    assert len(rig.engine.requests) == 1
    await rig.idle()
    assert count(rig, "timeout") == 1


async def test_a_worker_that_falls_silent_within_a_stream(make_rig):
    rig = await make_rig(timeouts={"idle": 0.05})
    answer = await rig.chat(stream=True, mock={"gates": {"token-3": "never"}})
    *before, error, done = events(answer.content)
    assert len(before) == 3
    assert data(error)["error"]["code"] == "idle_timeout"
    assert done == b"data: [DONE]"
    await rig.engine.until(lambda: rig.engine.requests[0].disconnected)


async def test_a_worker_that_falls_silent_within_a_unary_answer(make_rig):
    rig = await make_rig(timeouts={"idle": 0.05})
    answer = await rig.chat(mock={"gates": {"body": "never"}})
    assert answer.status_code == 504
    assert answer.json()["error"]["code"] == "idle_timeout"


async def test_a_long_answer_has_no_limit_on_the_whole(make_rig):
    rig = await make_rig(timeouts={"first_byte": 0.2, "idle": 0.2})
    answer = await rig.chat(stream=True, mock={"tokens": 30, "token_delay": 0.01})
    assert len(events(answer.content)) == 32


async def test_a_worker_that_accepts_no_connection(make_rig):
    rig = await make_rig(timeouts={"connect": 0.05})
    # A full queue of connections: the kernel answers no more of them.
    held = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0, backlog=0, start_serving=False)
    socket = held.sockets[0]
    socket._sock.listen(0)
    port = socket.getsockname()[1]
    clients = []
    for _ in range(3):
        client = asyncio.open_connection("127.0.0.1", port)
        clients.append(asyncio.create_task(asyncio.wait_for(client, 0.05)))
    await asyncio.wait(clients)
    rig.workers[0].mark_ready(f"http://127.0.0.1:{port}")
    answer = await rig.chat()
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "connect_timeout"
    for client in clients:
        if client.exception() is None:
            client.result()[1].close()
    held.close()
    await held.wait_closed()


async def test_a_fault_of_the_gateway_itself_is_an_answer_too(rig, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(rig.pool, "choose", broken)
    answer = await rig.chat()
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal_error"
    await rig.idle()
    assert count(rig, "internal") == 1
