"""Real Locust runs of a few seconds against the mock engine behind the gateway, and against a server that lies."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.mock_stack import MODEL, MockStack, mock_stack

if TYPE_CHECKING:
    from collections.abc import Iterator

LOCUSTFILE = Path(__file__).parents[2] / "loadtest" / "locustfile.py"
LIMIT_SECONDS = 60
TTFT, GAP = ("SSE", "time to first token"), ("SSE", "inter-token gap")
STREAMED, CHAT = ("POST", "chat, streamed"), ("POST", "chat")
ONE_TEXT, BATCH = ("POST", "embeddings, one text"), ("POST", "embeddings, batch")


@dataclass
class Run:
    """A Locust run that ended.

    Attributes:
        status: of the process; 1 if a request failed.
        requests: how many by type and name.
        failures: error texts by name of the request.
        milliseconds: the mean by type and name.
    """

    status: int
    requests: dict[tuple[str, str], int]
    failures: dict[str, set[str]]
    milliseconds: dict[tuple[str, str], float]


def run_locust(folder: Path, host: str, *options: str, seconds: int = 5) -> Run:
    command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--headless", "--host", host]
    command += ["--users", "4", "--spawn-rate", "4", "--run-time", f"{seconds}s"]
    # The numbers are final; the error texts are written each second, so the last ones may be missing.
    command += ["--json-file", str(folder / "run"), "--csv", str(folder / "run")]
    ended = subprocess.run(
        [*command, "--model", MODEL, *options],
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT_SECONDS,
        cwd=folder,
    )
    final = folder / "run.json"
    assert final.exists(), ended.stderr
    entries = {(entry["method"], entry["name"]): entry for entry in json.loads(final.read_text())}
    failures: dict[str, set[str]] = {}
    with (folder / "run_failures.csv").open() as file:
        for row in csv.DictReader(file):
            failures.setdefault(row["Name"], set()).add(row["Error"])
    return Run(
        ended.returncode,
        {key: entry["num_requests"] for key, entry in entries.items()},
        failures,
        {key: entry["total_response_time"] / max(entry["num_requests"], 1) for key, entry in entries.items()},
    )


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MockStack]:
    with mock_stack(tmp_path_factory.mktemp("stack")) as stack:
        yield stack


def test_a_run_without_faults_has_every_entry_and_no_failure(stack: MockStack, tmp_path: Path) -> None:
    stack.script(delay=0.02, token_delay=0.01)
    run = run_locust(tmp_path, stack.gateway.url, "--max-tokens", "5", "--batch", "3", seconds=6)
    assert run.failures == {}
    assert run.status == 0
    assert set(run.requests) == {TTFT, GAP, STREAMED, CHAT, ONE_TEXT, BATCH}
    # Five tokens are one first token and four gaps; streams that the end of the run cuts off have fewer.
    assert 4 * run.requests[STREAMED] <= run.requests[GAP] <= 4 * run.requests[TTFT]
    assert run.requests[TTFT] >= run.requests[STREAMED]
    # 20 ms to the headers and 10 ms to each token, as the mock engine was told.
    assert run.milliseconds[TTFT] >= 30
    assert run.milliseconds[GAP] >= 9
    assert run.milliseconds[STREAMED] >= 70


def test_a_seed_decides_what_each_user_sends(stack: MockStack, tmp_path: Path) -> None:
    stack.script(delay=0.01)  # so that the mock engine remembers them all
    sent = []
    for seed in ("1", "1", "2"):
        stack.engine.client.delete("/mock/requests")
        run_locust(tmp_path, stack.gateway.url, "EmbeddingsUser", "--seed", seed, "--users", "1", seconds=5)
        seen = stack.engine.client.get("/mock/requests").json()["requests"]
        sent.append([each["body_base64"] for each in seen if each["path"] == "/v1/embeddings"][:10])
    assert len(sent[0]) == 10
    assert sent[0] == sent[1] != sent[2]


def test_dimensions_are_asked_for_and_checked(stack: MockStack, tmp_path: Path) -> None:
    stack.script()
    run = run_locust(tmp_path, stack.gateway.url, "EmbeddingsUser", "--dimensions", "5", seconds=5)
    assert run.failures == {}
    assert run.requests[ONE_TEXT] > 0


@pytest.mark.parametrize(
    ("fault", "request_name", "words"),
    [
        ("half-event", "chat, streamed", "in the middle of its answer"),
        ("reset-mid-body", "chat", "status 502"),
        ("error", "embeddings, batch", "status 500"),
    ],
)
def test_faults_of_a_worker_are_failures(
    stack: MockStack, tmp_path: Path, fault: str, request_name: str, words: str
) -> None:
    stack.script(fault=fault, fault_after=2)
    run = run_locust(tmp_path, stack.gateway.url)
    assert run.status == 1
    assert all(words in error for error in run.failures[request_name])


class _Liar(BaseHTTPRequestHandler):
    """Answers with status 200 and what no client should take for an answer."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        document = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path == "/v1/embeddings":
            vectors = [[0.0] * (4 + index) for index in range(len(document["input"]))]
            body = {"data": [{"index": index, "embedding": each} for index, each in enumerate(vectors)]}
            self._answer(json.dumps(body).encode(), "application/json")
        elif document.get("stream"):
            chunk = {"choices": [{"index": 0, "delta": {"content": "Bread"}}]}
            self._answer(b"data: " + json.dumps(chunk).encode() + b"\n\n", "text/event-stream")
        else:
            self._answer(b'{"choices": [{"message": {"content": null}}]}', "application/json")

    def _answer(self, body: bytes, content_type: str) -> None:
        self.send_response(200)
        self.send_header("content-type", content_type)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def liar() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Liar) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join(10)


def test_wrong_answers_with_status_200_are_failures(liar: str, tmp_path: Path) -> None:
    run = run_locust(tmp_path, liar, "--batch", "2", seconds=5)
    assert run.status == 1
    assert run.failures["chat, streamed"] == {"Failure('the stream ends without [DONE]')"}
    assert run.failures["chat"] == {"Failure('found content None, expected text')"}
    assert "Failure('found 5 dimensions, expected 4')" in run.failures["embeddings, batch"]
    # A single text is a string, of which this server makes one vector for each character.
    assert all("vectors, expected 1" in error for error in run.failures["embeddings, one text"])
