"""Load on an OpenAI-compatible server, by users who chat and users who embed texts.

Each user sends its next request when the last one is answered, so the number of users is the concurrency.
What a user sends follows from `--seed` and its number alone. Beside the requests, each stream adds entries of
the type SSE: its time to first token and the gaps between its tokens.
"""

from __future__ import annotations

import itertools
import json
import random
import time
from typing import TYPE_CHECKING, Any, ClassVar

import requests
from locust import HttpUser, constant, events, task

if TYPE_CHECKING:
    from collections.abc import Iterator

    from locust.argument_parser import LocustArgumentParser
    from locust.clients import ResponseContextManager

CHAT = "/v1/chat/completions"
EMBEDDINGS = "/v1/embeddings"
SYSTEM = "You are the cook of a small ship. Answer in a few plain sentences."
QUESTIONS = (
    "What can I cook with {} and {} for a crew of {count}?",
    "How long do {} keep in a damp hold, and how long do {} keep, for {count} days at sea?",
    "Write a short note to the crew: {count} portions of {}, none of {}.",
    "Which is better before a night watch of {count} hours, {} or {}?",
)
FOODS = (
    "barley",
    "beans",
    "dried fish",
    "lemons",
    "lentils",
    "oats",
    "onions",
    "potatoes",
    "rice",
    "ship's biscuit",
)


@events.init_command_line_parser.add_listener
def add_options(parser: LocustArgumentParser) -> None:
    group = parser.add_argument_group("Galley")
    group.add_argument("--model", default="smollm2", help="model that all requests name")
    group.add_argument("--max-tokens", type=int, default=32, help="length of an answer in tokens")
    group.add_argument("--temperature", type=float, default=0.0)
    group.add_argument("--batch", type=int, default=8, help="texts in a batch of embeddings")
    group.add_argument("--dimensions", type=int, default=0, help="of an embedding; 0: what the model gives")
    group.add_argument("--seed", type=int, default=0, help="what the users say follows from it")


class Failure(Exception):  # noqa: N818
    """An answer that is not what was asked for; says what was found and what was expected."""


class GalleyUser(HttpUser):
    """What both kinds of users share."""

    abstract = True
    host = "http://127.0.0.1:8000"
    wait_time = constant(0)
    numbers: ClassVar[Iterator[int]] = itertools.count()

    def on_start(self) -> None:
        self.client.trust_env = False  # no proxy between the users and the server
        self.options = self.environment.parsed_options
        self.random = random.Random(f"{self.options.seed}/{type(self).__name__}/{next(self.numbers)}")

    def sentence(self) -> str:
        question = self.random.choice(QUESTIONS)
        return question.format(*self.random.sample(FOODS, 2), count=self.random.randint(2, 40))

    def post(self, path: str, name: str, document: dict[str, Any], **options: Any) -> ResponseContextManager:
        body = {"model": self.options.model, **document}
        return self.client.post(path, json=body, name=name, catch_response=True, **options)


class ChatUser(GalleyUser):
    """Three chats in four are streamed."""

    weight = 3
    numbers = itertools.count()

    @task
    def chat(self) -> None:
        if self.random.random() < 0.75:
            self.stream()
        else:
            self.whole()

    def stream(self) -> None:
        started = time.perf_counter()
        with self.post(CHAT, "chat, streamed", {**self.question(), "stream": True}, stream=True) as response:
            try:
                expect_ok(response)
                self.read_stream(response, started)
            except (Failure, requests.RequestException) as error:
                response.failure(error)
            finally:
                response.close()  # a stream that was left early must not go back to the pool
            # Locust's own time ends with the headers.
            response.request_meta["response_time"] = (time.perf_counter() - started) * 1000

    def whole(self) -> None:
        with self.post(CHAT, "chat", self.question()) as response:
            try:
                content = expect_ok(response).json()["choices"][0]["message"]["content"]
                if not content or not isinstance(content, str):
                    raise Failure(f"found content {content!r}, expected text")
            except (Failure, KeyError, IndexError, TypeError, ValueError) as error:
                response.failure(error)

    def question(self) -> dict[str, Any]:
        return {
            "messages": [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": self.sentence()},
            ],
            "max_tokens": self.options.max_tokens,
            "temperature": self.options.temperature,
        }

    def read_stream(self, response: ResponseContextManager, started: float) -> None:
        """Take a stream to its end, timing each token as it comes.

        Raises:
            Failure: it holds an error, or ends without a token or without [DONE].
        """
        last, done = None, False
        for data in server_sent_data(response):
            now = time.perf_counter()
            if data == b"[DONE]":
                done = True  # and on to the end of the body, so that the connection can be used again
            elif has_text(data):
                if last is None:
                    self.record("time to first token", now - started)
                else:
                    self.record("inter-token gap", now - last)
                last = now
        if not done:
            raise Failure("the stream ends without [DONE]")
        if last is None:
            raise Failure("the stream has no token")

    def record(self, name: str, seconds: float) -> None:
        self.environment.events.request.fire(
            request_type="SSE",
            name=name,
            response_time=seconds * 1000,
            response_length=0,
            exception=None,
            context=self.context(),
        )


class EmbeddingsUser(GalleyUser):
    """Half of the requests hold one text, half a batch."""

    weight = 1
    numbers = itertools.count()
    dimensions: ClassVar[int] = 0  # of the run's first answer, where none were asked for

    @task
    def embeddings(self) -> None:
        if self.random.random() < 0.5:
            self.embed("embeddings, one text", self.sentence(), 1)
        else:
            count = self.options.batch
            self.embed("embeddings, batch", [self.sentence() for _ in range(count)], count)

    def embed(self, name: str, texts: str | list[str], count: int) -> None:
        document: dict[str, Any] = {"input": texts}
        if self.options.dimensions:
            document["dimensions"] = self.options.dimensions
        with self.post(EMBEDDINGS, name, document) as response:
            try:
                self.check(expect_ok(response).json()["data"], count)
            except (Failure, KeyError, TypeError, ValueError) as error:
                response.failure(error)

    def check(self, data: list[dict[str, Any]], count: int) -> None:
        """Raises Failure unless there is one vector for each text, in order and all of one length."""
        if len(data) != count:
            raise Failure(f"found {len(data)} vectors, expected {count}")
        if [item["index"] for item in data] != list(range(count)):
            raise Failure("the vectors are not in the order of the texts")
        expected = self.options.dimensions or EmbeddingsUser.dimensions or len(data[0]["embedding"])
        EmbeddingsUser.dimensions = expected
        for item in data:
            if len(item["embedding"]) != expected:
                raise Failure(f"found {len(item['embedding'])} dimensions, expected {expected}")


def expect_ok(response: ResponseContextManager) -> ResponseContextManager:
    """Raises Failure with the server's own words unless the status is 200."""
    if response.status_code == 200:
        return response
    if response.status_code == 0:
        raise Failure(f"no answer: {response.error}")
    raise Failure(f"status {response.status_code}: {response.text[:200]}")


def server_sent_data(response: ResponseContextManager) -> Iterator[bytes]:
    """The data of each event of a stream, when it comes."""
    for line in response.iter_lines(chunk_size=None):
        if line.startswith(b"data:"):
            yield line.removeprefix(b"data:").strip()


def has_text(data: bytes) -> bool:
    """Whether a chunk of a chat carries a token; raises Failure if it carries an error."""
    try:
        chunk = json.loads(data)
        if "error" in chunk:
            raise Failure(f"error event: {chunk['error']['message']}")
        return any(choice["delta"].get("content") for choice in chunk["choices"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Failure(f"found an event that is no chunk of a chat: {data[:200]!r}") from error
