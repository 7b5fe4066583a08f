"""The adapter against a server over HTTP, and the package mteb's own evaluation where it is installed."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from galley_plugins.embedding.evaluation import run
from galley_plugins.embedding.evaluation.encoder import EndpointEncoder
from galley_plugins.embedding.evaluation.mteb_encoder import ServerEncoder

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

needs_mteb = pytest.mark.skipif(
    importlib.util.find_spec("mteb") is None,
    reason="mteb is not installed: pip install -c requirements.lock 'mteb>=2.26,<3'",
)
PAIRS = [
    ("A man is playing a guitar.", "Someone plays the guitar.", 4.6),
    ("Two dogs run on the beach.", "Two dogs are running by the sea.", 4.2),
    ("A woman is slicing an onion.", "A woman cuts a vegetable.", 3.6),
    ("The cat sleeps on the sofa.", "A cat lies on a chair.", 3.0),
    ("A boy is reading a book.", "A boy is writing a letter.", 1.8),
    ("A plane is taking off.", "A man is cooking rice.", 0.0),
]
TRAIN = [("Where is my card?", "card"), ("It has not come.", "card"), ("Is the rate fixed?", "rate")]
TEST = [("When does it arrive?", "card"), ("Which rate applies?", "rate"), ("A new card, please.", "card")]


def vector(text: str, input_type: str | None = None) -> NDArray[np.float32]:
    """[16] float32 that follows from a text and what it is said to be."""
    seed = hashlib.sha256(f"{input_type}|{text}".encode()).digest()
    return np.random.default_rng(list(seed)).normal(size=16).astype(np.float32)


class Handler(BaseHTTPRequestHandler):
    """`/v1/embeddings` with those vectors."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        rows = [vector(text, body.get("input_type")).tobytes() for text in body["input"]]
        data = [
            {"index": index, "embedding": base64.b64encode(row).decode()} for index, row in enumerate(rows)
        ]
        answer = json.dumps({"data": data}).encode()
        self.send_response(200 if body["model"] == "seeded" else 404)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def endpoint(url: str) -> Iterator[EndpointEncoder]:
    with EndpointEncoder(url, "seeded") as endpoint:
        yield endpoint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("sts", "retrieval", "cls"):
        (tmp_path / name).mkdir()
    rows = [f"{first},{second},{score}\n" for first, second, score in PAIRS]
    (tmp_path / "sts" / "stsb_en_test.csv").write_text("".join(rows))
    documents = [second for _, second, _ in PAIRS] + [""]
    (tmp_path / "retrieval" / "cran.all.1400.xml").write_text(
        "".join(f"<doc><docno>d{n}</docno><text>{text}</text></doc>\n" for n, text in enumerate(documents))
    )
    (tmp_path / "retrieval" / "cran.qry.xml").write_text(
        "".join(f"<top><num>{n}</num><title>{pair[0]}</title></top>" for n, pair in enumerate(PAIRS))
    )
    judged = [f"{n + 1} 0 d{n} 1\n" for n in range(4)] + ["1 0 d5 3\n", "2 0 d4 0\n", "3 0 d1 2\n"]
    (tmp_path / "retrieval" / "cranqrel.trec.txt").write_text("".join(judged))
    for name, texts in (("train", TRAIN), ("test", TEST)):
        lines = [f'"{text}",{label}\n' for text, label in texts]
        (tmp_path / "cls" / f"{name}.csv").write_text("text,category\n" + "".join(lines))
    return tmp_path


@pytest.mark.parametrize("prompt_type", ["query", "document", None])
def test_batches_go_to_the_server_with_their_input_type(
    endpoint: EndpointEncoder, prompt_type: str | None
) -> None:
    texts = [f"{number} " * (7 - number % 5) for number in range(70)]
    batches = [{"text": texts[start : start + 16]} for start in range(0, 70, 16)]
    told: list[Any] = []

    def begin(task: str, count: int) -> Any:
        told.append((task, count))
        return told.append

    found = ServerEncoder(endpoint, "seeded", begin=begin).encode(
        iter(batches), task_metadata=SimpleNamespace(name="T"), prompt_type=prompt_type, batch_size=3
    )
    assert found.dtype == np.float32
    assert (found == [vector(text, prompt_type) for text in texts]).all()
    assert told[0] == ("T", 70)
    assert sum(told[1:]) == 70


def test_similarities_are_cosines() -> None:
    encoder = ServerEncoder(SimpleNamespace(), "seeded")  # no text is embedded
    first, second = np.array([[3.0, 4.0], [0.0, 2.0]]), np.array([[5.0, 0.0], [0.0, 1.0]])
    assert encoder.similarity(first, second) == pytest.approx(np.array([[0.6, 0.8], [0.0, 1.0]]))
    assert encoder.similarity_pairwise(first, second) == pytest.approx([0.6, 1.0])


def test_a_missing_mteb_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from galley_plugins.embedding.__main__ import mteb_command

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"found no package mteb, .*pip install -c requirements\.lock"):
        mteb_command(model="seeded")


SCRIPT = """
import json, sys
from pathlib import Path
from galley_plugins.embedding.evaluation.encoder import EndpointEncoder
from galley_plugins.embedding.evaluation.mteb_encoder import ServerEncoder
from galley_plugins.embedding.evaluation.mteb_tasks import evaluate

url, folder = sys.argv[1:]
results = evaluate(Path(folder), ServerEncoder(EndpointEncoder(url, "seeded"), "seeded"))
print(json.dumps({result.task_name: result.scores["test"][0] for result in results}))
"""


class Silent:
    def begin(self, task: str, texts: int) -> Any:
        return lambda count: None


def ours(folder: Path, endpoint: EndpointEncoder, *tasks: str) -> list[float]:
    """The figures of `galley embed eval`, as fractions."""
    return [result.value / 100 for result in run.evaluate(folder, endpoint, Silent(), tasks=tasks)]


@needs_mteb
@pytest.mark.timeout(600)
def test_mtebs_figures_equal_ours(url: str, endpoint: EndpointEncoder, folder: Path) -> None:
    """Cranfield's only if queries and documents were embedded as such, since this server tells them apart."""
    command = [sys.executable, "-c", SCRIPT, url, str(folder)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr
    scores = json.loads(ran.stdout.splitlines()[-1])
    sts, cranfield = ours(folder, endpoint, "sts", "cranfield")
    assert -1 < sts < 1
    assert 0 < cranfield < 1
    assert scores["STSB"]["main_score"] == pytest.approx(sts, abs=1e-5)
    assert scores["Cranfield"]["main_score"] == pytest.approx(cranfield, abs=1e-5)
    # Each class has fewer than eight texts, so that all ten probes see all of them.
    probe = LogisticRegression(max_iter=100).fit(
        [vector(text) for text, _ in TRAIN], [label for _, label in TRAIN]
    )
    accuracy = probe.score([vector(text) for text, _ in TEST], [label for _, label in TEST])
    assert scores["Banking77"]["main_score"] == pytest.approx(accuracy, abs=1e-5)


@needs_mteb
@pytest.mark.timeout(600)
def test_the_command_prints_and_writes_mtebs_results(
    url: str, endpoint: EndpointEncoder, folder: Path
) -> None:
    out = folder / "results.json"
    command = [sys.executable, "-m", "galley", "embed", "mteb", "--model", "seeded", "--url", url]
    command += ["--data", str(folder), "--tasks", "sts", "--out", str(out)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr
    (sts,) = ours(folder, endpoint, "sts")
    (result,) = json.loads(out.read_text())["results"]
    assert result["scores"]["test"][0]["cosine_spearman"] == pytest.approx(sts, abs=1e-5)
    assert f"{100 * sts:.2f}" in ran.stdout
    (folder / "sts" / "stsb_en_test.csv").unlink()
    missing = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert missing.returncode == 2
    assert "stsb_en_test.csv: cannot be read" in missing.stderr
