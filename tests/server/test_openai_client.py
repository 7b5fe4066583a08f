"""The official client against the gateway, with no change but the base URL."""

from __future__ import annotations

import openai
import pytest

from galley.mock_engine.answers import vector, words

pytestmark = pytest.mark.anyio

MESSAGES = [{"role": "user", "content": "Bread, please"}]
TEXT = "".join(words("Bread, please/0", 6))


@pytest.fixture
async def client(rig):
    async with openai.AsyncOpenAI(base_url=f"{rig.url}/v1", api_key="-", max_retries=0) as client:
        yield client


async def test_chat(client):
    answer = await client.chat.completions.create(model="mock", messages=MESSAGES, max_tokens=6)
    assert answer.choices[0].message.content == TEXT
    assert answer.usage.completion_tokens == 6


async def test_streaming_chat(client):
    stream = await client.chat.completions.create(model="mock", messages=MESSAGES, max_tokens=6, stream=True)
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == TEXT
    assert all(chunk.usage is None for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason == "length"


async def test_streaming_chat_with_usage(client):
    stream = await client.chat.completions.create(
        model="mock", messages=MESSAGES, max_tokens=6, stream=True, stream_options={"include_usage": True}
    )
    *_, last = [chunk async for chunk in stream]
    assert last.choices == []
    assert last.usage.completion_tokens == 6


async def test_completions(client):
    answer = await client.completions.create(model="mock", prompt="Bread", max_tokens=3)
    assert answer.choices[0].text == "".join(words("Bread", 3))
    stream = await client.completions.create(model="mock", prompt="Bread", max_tokens=3, stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == answer.choices[0].text


async def test_responses(client):
    answer = await client.responses.create(model="mock", input="Bread", max_output_tokens=4)
    assert answer.output_text == "".join(words("Bread", 4))
    stream = await client.responses.create(model="mock", input="Bread", max_output_tokens=4, stream=True)
    events = [event async for event in stream]
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == answer.output_text
    assert events[-1].response.usage.output_tokens == 4


@pytest.mark.parametrize("encoding", [openai.omit, "float", "base64"])
async def test_embeddings(client, encoding):
    answer = await client.embeddings.create(
        model="mock", input=["bread", "oven"], dimensions=16, encoding_format=encoding
    )
    assert [item.index for item in answer.data] == [0, 1]
    if encoding != "base64":
        assert answer.data[1].embedding == pytest.approx(vector("oven", 16))
    assert answer.usage.prompt_tokens == 2


async def test_models(client):
    assert [model.id async for model in client.models.list()] == ["mock"]
    assert (await client.models.retrieve("mock")).id == "mock"


async def test_errors_have_the_clients_own_classes(client, rig):
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        await client.chat.completions.create(model="other", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError, match="stream: found a string"):
        await client.chat.completions.create(model="mock", messages=MESSAGES, extra_body={"stream": "x"})
    rig.workers[0].mark_down("exit code 1")
    with pytest.raises(openai.InternalServerError, match="No worker of the model mock") as caught:
        await client.chat.completions.create(model="mock", messages=MESSAGES)
    assert caught.value.status_code == 503
    assert caught.value.code == "no_ready_worker"
    assert caught.value.request_id
