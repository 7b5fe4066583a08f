"""What goes to the worker and what comes back, as bytes."""

from __future__ import annotations

import asyncio
import contextlib
import json

import httpx
import orjson
import pytest

from galley.config import ModelConfig
from galley.mock_engine import Script

pytestmark = pytest.mark.anyio

CHAT = {"model": "mock", "messages": [{"role": "user", "content": "Bread, please"}]}
STREAM = {**CHAT, "stream": True}


async def test_a_unary_answer_is_the_workers_answer(rig):
    answer = await rig.chat()
    direct = await rig.direct()
    assert answer.status_code == 200
    assert answer.content == direct.content
    assert answer.headers["content-length"] == str(len(direct.content))


@pytest.mark.parametrize(
    "body",
    [
        b' \n{"model" : "mock", "messages":[{"role":"user","content":"na\\u00efve \xf0\x9f\x9a\xa2"}] }\n',
        b'{"model":"mock","messages":[],"model":"mock","seed":123456789012345678901234567890,"x":1.10}',
        json.dumps({**CHAT, "padding": "x" * 3_000_000}).encode(),
    ],
    ids=["spaces and escapes", "repeated key and long number", "three megabytes"],
)
async def test_the_worker_receives_the_clients_bytes(rig, body):
    answer = await rig.client.post(
        "/v1/chat/completions", content=body, headers={"content-type": "application/json"}
    )
    assert answer.status_code == 200
    assert rig.engine.requests[-1].body == body


async def test_a_stream_is_what_the_worker_alone_would_have_sent(rig):
    answer = await rig.post(document=STREAM)
    direct = await rig.direct(document=STREAM)
    assert b'"system_fingerprint":"mock-engine"' in direct.content
    assert answer.content == direct.content
    assert answer.headers["content-type"] == direct.headers["content-type"]
    assert rig.engine.requests[-2].body == (
        b'{"stream_options":{"include_usage":true},' + rig.engine.requests[-1].body[1:]
    )


async def test_so_is_a_stream_of_several_choices_once_the_fingerprint_is_known(rig):
    await rig.post(document=STREAM)
    answer = await rig.post(document={**STREAM, "n": 3})
    direct = await rig.direct(document={**STREAM, "n": 3})
    assert direct.content.count(b"system_fingerprint") == 3
    assert answer.content == direct.content


@pytest.mark.parametrize(
    "options",
    [None, {}, {"include_usage": False}, {"include_usage": None}, {"continuous_usage_stats": True}],
)
async def test_options_that_do_not_ask_for_usage_get_none(rig, options):
    document = {**STREAM, "stream_options": options}
    answer = await rig.post(document=document)
    assert b'"usage"' not in answer.content
    assert answer.content == (await rig.direct(document=STREAM)).content
    assert rig.engine.requests[-2].document["stream_options"]["include_usage"] is True


async def test_usage_that_the_client_asked_for_stays(rig):
    options = {"include_usage": True, "continuous_usage_stats": True}
    document = {**STREAM, "stream_options": options}
    answer = await rig.post(document=document)
    assert answer.content == (await rig.direct(document=document)).content
    assert answer.content.count(b'"usage"') == 9
    assert rig.engine.requests[-2].body == rig.engine.requests[-1].body


async def test_nothing_is_rewritten_when_stream_tokens_are_not_counted(make_rig):
    rig = await make_rig(count_stream_tokens=False)
    answer = await rig.post(document=STREAM)
    assert rig.engine.requests[-1].document == STREAM
    assert answer.content == (await rig.direct(document=STREAM)).content
    assert not rig.metric("galley_tokens_total", model="mock", direction="completion")


@pytest.mark.parametrize(
    ("path", "document", "prompt", "completion"),
    [
        ("/v1/chat/completions", CHAT, 2, 8),
        ("/v1/chat/completions", STREAM, 2, 8),
        ("/v1/completions", {"model": "mock", "prompt": "one two three", "stream": True}, 3, 8),
        ("/v1/responses", {"model": "mock", "input": "one two three"}, 3, 8),
        ("/v1/responses", {"model": "mock", "input": "one two three", "stream": True}, 3, 8),
        ("/v1/messages", {**CHAT, "max_tokens": 5}, 2, 5),
        ("/v1/messages", {**STREAM, "max_tokens": 5}, 2, 5),
        ("/v1/embeddings", {"model": "mock", "input": ["a b", "c"], "dimensions": 1500}, 3, 0),
    ],
)
async def test_tokens_are_counted_on_every_route(rig, path, document, prompt, completion):
    answer = await rig.post(path, document)
    await rig.idle()
    assert answer.status_code == 200
    assert rig.metric("galley_tokens_total", model="mock", direction="prompt") == prompt
    assert rig.metric("galley_tokens_total", model="mock", direction="completion") == completion


async def test_end_to_end_headers_pass_and_those_of_the_connection_do_not(rig):
    headers = [
        ("connection", "keep-alive, x-only-here"),
        ("x-only-here", "1"),
        ("te", "trailers"),
        ("proxy-authorization", "Basic secret"),
        ("authorization", "Bearer key"),
        ("x-two", "a"),
        ("x-two", "b"),
        ("x-name", "naïve".encode()),
    ]
    answer = await rig.client.post("/v1/chat/completions", json=CHAT, headers=headers)
    seen = rig.engine.requests[-1]
    assert answer.status_code == 200
    names = [name for name, _ in seen.headers]
    assert {b"x-only-here", b"te", b"proxy-authorization"}.isdisjoint(names)
    assert seen.header("authorization") == "Bearer key"
    assert [value for name, value in seen.headers if name == b"x-two"] == [b"a", b"b"]
    assert dict(seen.headers)[b"x-name"] == "naïve".encode()
    assert seen.header("host") == rig.listeners[0].url.removeprefix("http://")
    assert names.count(b"content-length") == 1
    assert names.count(b"user-agent") == 1


async def test_no_header_is_invented_for_the_worker(rig):
    async with rig.raw(CHAT) as (reader, _):
        await reader.readuntil(b"\r\n\r\n")
    await rig.idle()
    names = {name for name, _ in rig.engine.requests[-1].headers}
    assert names == {b"host", b"content-type", b"content-length", b"x-request-id"}


@pytest.mark.parametrize("given", ["req-1.A:b/c+d=@", "x" * 128])
async def test_a_request_id_is_kept_and_passed_on(rig, given):
    answer = await rig.chat(headers={"x-request-id": given})
    assert answer.headers["x-request-id"] == given
    assert rig.engine.requests[-1].header("x-request-id") == given
    assert answer.headers["x-galley-worker"] == "mock-0"


@pytest.mark.parametrize("given", [None, "", "x" * 129, "two words", 'quo"te'])
async def test_a_request_id_is_made_where_there_is_no_good_one(rig, given):
    answer = await rig.chat(headers={} if given is None else {"x-request-id": given})
    made = answer.headers["x-request-id"]
    assert len(made) == 32
    assert made.isalnum()
    assert rig.engine.requests[-1].header("x-request-id") == made


async def test_an_error_of_the_worker_passes_through(rig):
    answer = await rig.chat(mock={"fault": "error"})
    assert answer.status_code == 500
    assert answer.json()["error"]["message"] == "scripted"
    await rig.idle()
    assert rig.metric("galley_requests_total", model="mock", route="chat", outcome="worker_error") == 1


async def test_a_refusal_of_the_worker_passes_through(rig):
    answer = await rig.chat(mock={"fault": "no such fault"})
    assert answer.status_code == 400
    await rig.idle()
    assert rig.metric("galley_requests_total", model="mock", route="chat", outcome="client_error") == 1


async def test_a_large_answer_passes_whole(rig):
    answer = await rig.chat(mock={"pad": 5_000_000})
    assert len(answer.content) > 5_000_000
    assert answer.json()["object"] == "chat.completion"


@pytest.mark.parametrize("fault", ["drip", "split-character"])
@pytest.mark.parametrize("stream", [False, True])
async def test_pieces_that_cut_characters_and_events_change_nothing(rig, fault, stream):
    document = {**CHAT, "stream": stream}
    answer = await rig.post(document={**document, "mock": {"fault": fault}})
    assert answer.content == (await rig.direct(document=document)).content


async def test_query_and_path_reach_the_worker_as_they_came(rig):
    answer = await rig.client.post("/v1/chat/completions?a=%2Fb&c=d%20e", json=CHAT)
    assert answer.status_code == 200
    assert rig.engine.requests[-1].query == b"a=%2Fb&c=d%20e"


async def test_every_event_leaves_when_it_came(rig):
    document = {**STREAM, "mock": {"tokens": 3, "gates": {"token-1": "a", "token-3": "b"}}}
    async with rig.client.stream("POST", "/v1/chat/completions", json=document) as answer:
        lines = answer.aiter_lines()

        async def content() -> str:
            async for line in lines:
                if line.startswith("data: {"):
                    return orjson.loads(line[6:])["choices"][0]["delta"]["content"]
            raise AssertionError

        assert await content() == ""
        await rig.engine.gates.reached("a")
        rig.engine.gates.release("a")
        assert await content()
        assert (await content()).startswith(" ")
        await rig.engine.gates.reached("b")
        assert rig.workers[0].in_flight == 1
        rig.engine.gates.release("b")
        async for _ in lines:
            pass
    await rig.idle()
    assert rig.metric("galley_inter_token_latency_seconds_count", model="mock", route="chat") >= 2
    assert rig.metric("galley_time_to_first_token_seconds_count", model="mock", route="chat") == 1


async def test_the_least_loaded_worker_takes_the_request(make_rig):
    rig = await make_rig(replicas=2)
    busy, free = rig.engines
    held = asyncio.create_task(rig.chat(mock={"gates": {"headers": "held"}}))
    await busy.gates.reached("held")
    served = [(await rig.chat()).headers["x-galley-worker"] for _ in range(4)]
    assert served == ["mock-1"] * 4
    assert (len(busy.requests), len(free.requests)) == (1, 4)
    busy.gates.release("held")
    assert (await held).headers["x-galley-worker"] == "mock-0"


async def test_equal_workers_take_turns(make_rig):
    rig = await make_rig(replicas=3)
    answers = [await rig.chat() for _ in range(9)]
    served = [answer.headers["x-galley-worker"] for answer in answers]
    assert {served.count(worker.id) for worker in rig.workers} == {3}
    assert len(set(served[:3])) == 3


async def test_aliases_are_served_by_the_models_workers(make_rig):
    rig = await make_rig(models=(ModelConfig(name="one", aliases=("uno",)), ModelConfig(name="two")))
    for name, worker in (("uno", "one-0"), ("two", "two-0"), ("one", "one-0")):
        answer = await rig.post(document={**CHAT, "model": name})
        assert answer.headers["x-galley-worker"] == worker
        assert answer.json()["model"] == name


async def test_names_that_only_the_worker_lists_are_served(rig):
    rig.engine.models = ("mock", "adapter")
    rig.workers[0].set_cards([{"id": "mock"}, {"id": "adapter"}])
    answer = await rig.chat(model="adapter")
    await rig.idle()
    assert answer.json()["model"] == "adapter"
    assert rig.metric("galley_requests_total", model="mock", route="chat", outcome="ok") == 1


async def test_routes_without_a_document_pass(rig):
    assert (await rig.client.get("/version")).json() == {"version": "mock"}
    head = await rig.client.head("/version")
    assert head.status_code == 200
    assert head.content == b""
    assert (await rig.client.get("/v1/responses/resp_1")).status_code == 404  # the mock engine stores none
    assert rig.engine.requests[-1].path == "/v1/responses/resp_1"


async def test_many_requests_at_once_all_end_and_leave_nothing(make_rig):
    rig = await make_rig(replicas=2)
    rig.engines[0].script = Script(token_delay=0.001)
    documents = [{**CHAT, "stream": bool(number % 2)} for number in range(60)]
    answers = await asyncio.gather(*(rig.post(document=document) for document in documents))
    await rig.idle()
    assert {answer.status_code for answer in answers} == {200}
    assert rig.metric("galley_requests_total", model="mock", route="chat", outcome="ok") == 60
    assert rig.metric("galley_request_duration_seconds_count", model="mock", route="chat") == 60
    assert rig.metric("galley_gateway_overhead_seconds_count", model="mock", route="chat") == 60


async def test_a_worker_that_moved_is_reached_at_its_new_url(rig):
    assert (await rig.chat()).status_code == 200
    worker = rig.workers[0]
    worker.mark_down("exit code 1")
    refused = await rig.chat()
    assert refused.status_code == 503
    assert refused.json()["error"]["message"] == (
        "No worker of the model mock is ready: mock-0 down (exit code 1)."
    )
    await rig.listeners[0].stop()
    rig.listeners[0]._port = 0
    await rig.listeners[0].start()
    worker.mark_starting(rig.listeners[0].url)
    assert (await rig.chat()).status_code == 503
    worker.mark_ready()
    assert (await rig.chat()).status_code == 200


async def test_cookies_of_a_worker_go_to_the_client_and_not_to_the_next_request(rig):
    rig.engine.script = Script(headers=(("set-cookie", "a=1"), ("x-two", "1"), ("x-two", "2")))
    async with httpx.AsyncClient(base_url=rig.url) as one, httpx.AsyncClient(base_url=rig.url) as other:
        answer = await one.post("/v1/chat/completions", json=CHAT)
        await other.post("/v1/chat/completions", json=CHAT)
    assert answer.headers["set-cookie"] == "a=1"
    assert answer.headers.get_list("x-two") == ["1", "2"]
    assert rig.engine.requests[-1].header("cookie") is None


async def test_headers_of_the_workers_connection_stay_there(rig):
    rig.engine.script = Script(
        headers=(("connection", "x-hop"), ("x-hop", "1"), ("date", "long ago"), ("x-request-id", "other"))
    )
    answer = await rig.chat(headers={"x-request-id": "mine"})
    assert "x-hop" not in answer.headers
    assert answer.headers.get("date") != "long ago"
    assert answer.headers["x-request-id"] == "mine"


@contextlib.asynccontextmanager
async def canned(rig, answer: bytes):
    """A worker in place of the rig's that answers any request with these bytes and closes the connection."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length"))
        await reader.readexactly(int(length.split(b":")[1]))
        writer.write(answer)
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    rig.workers[0].mark_ready(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    try:
        yield
    finally:
        server.close()
        await server.wait_closed()


@pytest.mark.parametrize(
    ("answer", "status", "body"),
    [
        (b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: 0\r\n\r\n", 200, b""),
        (
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\ndata: 1\n\ndata: 2",
            200,
            b"data: 1\n\ndata: 2",
        ),
        (b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\ndata: 2", 200, b"data: 2"),
        (b"HTTP/1.0 200 OK\r\n\r\nto the end", 200, b"to the end"),
        (b"HTTP/1.1 302 Found\r\nlocation: /x\r\ncontent-length: 0\r\n\r\n", 302, b""),
        (b"HTTP/1.1 204 No Content\r\n\r\n", 204, b""),
        (b"HTTP/1.1 429 Too Many\r\ncontent-length: 2\r\nretry-after: 7\r\n\r\n{}", 429, b"{}"),
    ],
)
async def test_answers_of_any_form_pass(rig, answer, status, body):
    async with canned(rig, answer):
        got = await rig.chat()
    assert got.status_code == status
    assert got.content == body


async def test_a_server_that_ends_takes_the_request_with_it(rig):
    """Cancellation from outside is not swallowed, and nothing stays counted."""

    async def receive():
        if not sent:
            sent.append(1)
            return {"type": "http.request", "body": orjson.dumps({**CHAT, "mock": {"fault": "hang"}})}
        return await asyncio.get_running_loop().create_future()

    sent = []
    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "query_string": b""}
    scope |= {"raw_path": b"/v1/chat/completions", "headers": [(b"content-type", b"application/json")]}
    task = asyncio.create_task(rig.gateway(scope, receive, None))
    await rig.engine.until(lambda: rig.engine.counters.running == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await rig.idle()
    assert rig.metric("galley_requests_total", model="mock", route="chat", outcome="unavailable") == 1
