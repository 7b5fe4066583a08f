"""The official OpenAI client against `galley serve`, with nothing changed but the base URL."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import httpx
import jsonschema
import numpy as np
import openai
import pytest

from loadtest import reference
from tests.e2e.texts import SHORT_TEXTS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from loadtest.servers import Server

pytestmark = pytest.mark.engine

MODEL = "smollm2"
FRANCE = [{"role": "user", "content": "What is the capital of France?"}]
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 30},
        "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "unit", "days"],
    "additionalProperties": False,
}
WEATHER_TOOL = {"name": "get_weather", "description": "Weather of a city", "parameters": WEATHER}


@pytest.fixture(scope="module")
def client(galley: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{galley.url}/v1", api_key="none", timeout=600, max_retries=0) as client:
        yield client


def test_the_model_list_names_the_model(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another")


def test_a_chat_at_temperature_zero_names_paris(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=FRANCE, temperature=0, max_tokens=64)
    assert "Paris" in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_streamed_chat_says_what_the_whole_one_says(client: openai.OpenAI) -> None:
    options = {"model": MODEL, "messages": FRANCE, "temperature": 0, "max_tokens": 64}
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True))
    assert (
        "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    )
    assert all(chunk.usage is None for chunk in chunks)  # usage was not asked for
    with_usage = list(
        client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True})
    )
    assert with_usage[-1].choices == []
    assert with_usage[-1].usage == whole.usage


def test_completions_whole_and_streamed(client: openai.OpenAI) -> None:
    options = {"model": MODEL, "prompt": "One, two, three,", "max_tokens": 8, "temperature": 0}
    whole = client.completions.create(**options)
    assert "four" in whole.choices[0].text
    streamed = "".join(chunk.choices[0].text for chunk in client.completions.create(**options, stream=True))
    assert streamed == whole.choices[0].text


def test_responses_whole_and_streamed(client: openai.OpenAI) -> None:
    options = {"model": MODEL, "input": FRANCE[0]["content"], "temperature": 0, "max_output_tokens": 64}
    whole = client.responses.create(**options)
    assert "Paris" in whole.output_text
    events = list(client.responses.create(**options, stream=True))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == whole.output_text
    assert events[-1].type == "response.completed"
    assert events[-1].response.usage.output_tokens == whole.usage.output_tokens


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_required_tool_is_called_with_arguments_that_fit_its_schema(
    client: openai.OpenAI, choice: object
) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "What is the weather in Oslo for two days, in celsius?"}],
        tools=[{"type": "function", "function": WEATHER_TOOL}],
        tool_choice=choice,
        temperature=0,
        max_tokens=200,
    )
    (call, *_) = answer.choices[0].message.tool_calls
    assert call.function.name == "get_weather"
    jsonschema.validate(json.loads(call.function.arguments), WEATHER)


def test_a_conversation_goes_on_after_a_tool_call(client: openai.OpenAI) -> None:
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'},
    }
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[
            {"role": "user", "content": "What is the weather in Oslo?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call_1", "content": "It is raining in Oslo."},
        ],
        tools=[{"type": "function", "function": WEATHER_TOOL}],
        temperature=0,
        max_tokens=40,
    )
    message = answer.choices[0].message
    assert message.content or message.tool_calls


def test_json_mode_gives_an_object(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Give the name and age of a person as JSON."}],
        response_format={"type": "json_object"},
        temperature=0,
        max_tokens=400,
    )
    assert answer.choices[0].finish_reason == "stop"
    assert isinstance(json.loads(answer.choices[0].message.content), dict)


def test_a_json_schema_is_followed(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Weather request for Lima, one day."}],
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "weather", "schema": WEATHER, "strict": True},
        },
        temperature=0,
        max_tokens=200,
    )
    jsonschema.validate(json.loads(answer.choices[0].message.content), WEATHER)


def test_logprobs_come_with_alternatives(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=FRANCE, temperature=0, max_tokens=5, logprobs=True, top_logprobs=3
    )
    tokens = answer.choices[0].logprobs.content
    assert len(tokens) == 5
    for token in tokens:
        assert len(token.top_logprobs) == 3
        assert token.logprob == max(other.logprob for other in token.top_logprobs)  # greedy takes the best
        assert token.logprob <= 0


def test_n_gives_that_many_choices(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=FRANCE, n=3, temperature=1.0, seed=5, max_tokens=12
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]


def test_embeddings_equal_the_reference(client: openai.OpenAI) -> None:
    answer = client.embeddings.create(model=MODEL, input=SHORT_TEXTS)  # the client asks for base64 by itself
    assert [row.index for row in answer.data] == list(range(len(SHORT_TEXTS)))
    for text, row in zip(SHORT_TEXTS, answer.data, strict=True):
        assert reference.cosine(row.embedding, reference.embed(text)) > 0.999
    short = client.embeddings.create(
        model=MODEL, input=SHORT_TEXTS[0], dimensions=16, encoding_format="float"
    )
    assert len(short.data[0].embedding) == 16
    assert answer.usage.prompt_tokens == sum(reference.token_count(text) for text in SHORT_TEXTS)


def test_chats_and_embeddings_at_once(client: openai.OpenAI) -> None:
    with ThreadPoolExecutor(8) as pool:
        chats = [
            pool.submit(
                client.chat.completions.create, model=MODEL, messages=FRANCE, temperature=0, max_tokens=32
            )
            for _ in range(6)
        ]
        vectors = [pool.submit(client.embeddings.create, model=MODEL, input=text) for text in SHORT_TEXTS]
        assert all("Paris" in chat.result().choices[0].message.content for chat in chats)
        for text, vector in zip(SHORT_TEXTS, vectors, strict=True):
            assert reference.cosine(vector.result().data[0].embedding, reference.embed(text)) > 0.999


def test_an_instruction_is_read_and_not_pooled(client: openai.OpenAI) -> None:
    text, task = SHORT_TEXTS[1], "Find the city that a question is about"
    expected = reference.instructed(f"Instruct: {task}\nQuery: ", text)
    answer = client.embeddings.create(model=MODEL, input=text, extra_body={"instruction": task})
    assert reference.cosine(answer.data[0].embedding, expected) > 0.999
    assert reference.cosine(answer.data[0].embedding, reference.embed(text)) < 0.999
    plain = client.embeddings.create(model=MODEL, input=text, extra_body={"input_type": "document"})
    assert reference.cosine(plain.data[0].embedding, reference.embed(text)) > 0.999


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({"input_type": "banana"}, "input_type: found 'banana', expected one of query, document"),
        ({"instruction": 3}, "instruction: found int, expected a string"),
        ({"truncate": "middle"}, "truncate: found 'middle', expected true, false, 'start', 'end' or 'none'"),
    ],
)
def test_a_wrong_parameter_of_an_embedding_is_named(
    client: openai.OpenAI, extra: dict[str, object], expected: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=re.escape(expected)):
        client.embeddings.create(model=MODEL, input="x", extra_body=extra)


def test_raw_bytes_are_the_vectors_in_order(client: openai.OpenAI) -> None:
    body = {"model": MODEL, "input": SHORT_TEXTS, "encoding_format": "bytes_only"}
    answer = httpx.post(f"{client.base_url}embeddings", json=body)
    assert answer.headers["content-type"] == "application/octet-stream"
    vectors = np.frombuffer(answer.content, np.float32).reshape(len(SHORT_TEXTS), -1)
    for text, vector in zip(SHORT_TEXTS, vectors, strict=True):
        assert reference.cosine(vector.tolist(), reference.embed(text)) > 0.999
