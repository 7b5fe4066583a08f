"""The servers that embeddings are measured on: Galley's, vLLM's own pooling runner, and other programs."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from galley_plugins.models import resolve
from galley_plugins.worker.environment import worker_environment
from loadtest.embedding_peers import infinity_python
from loadtest.servers import FLOAT32, MODEL, NAME, end, free_port, galley_worker, plain_vllm, running

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from loadtest.embedding_loads import Request

os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Everything else, such as how many tokens a step has, is each server's own default.
SETTINGS: dict[str, Any] = {**FLOAT32, "kv-cache-memory-bytes": 1024**3}
POOLING = {"runner": "pooling", "convert": "embed", "pooler-config": {"seq_pooling_type": "MEAN"}}
# Vectors do not depend on the size of a step; larger ones get through data sets sooner.
QUALITY: dict[str, Any] = {
    **SETTINGS,
    "max-model-len": 4096,
    "max-num-batched-tokens": 512,
    "max-num-seqs": 64,
}
DOCUMENTS: dict[str, Any] = {**SETTINGS, "max-model-len": 8192, "kv-cache-memory-bytes": 3 * 1024**3}

OURS, DUAL, VLLM, IN_PROCESS, INFINITY = "galley", "galley-dual", "vllm", "sentence-transformers", "infinity"
PEERS = (VLLM, IN_PROCESS, INFINITY)
SLOWER = {"galley-echo": "echo", "galley-causal2vec": "causal2vec"}  # on the dual engine; over its mean
SERVERS = (OURS, DUAL, *PEERS, *SLOWER)

UNTRAINED = ("mean", "last", "prompt-eol", "token-prepending", "echo")
TRAINED = ("gem", "causal2vec", "nv-embed")
METHODS = (*UNTRAINED, *TRAINED)

IN_PROCESS_SECONDS = 3600.0


def options_of(method: str, adapters: Path | None) -> dict[str, Any] | None:
    """`embedding:` of a method; None for a trained one whose adapter is not there."""
    if method in UNTRAINED:
        return {"method": method}
    folder = adapters / method if adapters is not None else None
    return {"adapter": str(folder.absolute())} if folder is not None and folder.is_dir() else None


def embedding_worker(engine: dict[str, Any], options: dict[str, Any]) -> Any:
    """One worker for chats and embeddings."""
    return galley_worker(engine, "--embedding", json.dumps(options))


def serving(name: str, *, adapters: Path | None = None, infinity: Path | None = None) -> Any:
    """One of `SERVERS`, but `IN_PROCESS`, which serves nothing."""
    if name == OURS:
        return galley_worker(SETTINGS, "--tasks", "embed")
    if name == DUAL:
        return galley_worker(SETTINGS)
    if name == VLLM:
        return plain_vllm({**SETTINGS, **POOLING})
    if name == INFINITY:
        return _infinity(infinity_python(infinity))
    options = options_of(SLOWER[name], adapters)
    assert options is not None
    return embedding_worker(SETTINGS, options)


def _infinity(python: Path) -> Any:
    port = free_port()
    command = [str(python), "-m", "infinity_emb.cli", "v2", "--model-id", str(resolve(MODEL))]
    command += [
        "--served-model-name",
        NAME,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--url-prefix",
        "/v1",
    ]
    command += ["--engine", "torch", "--device", "cpu", "--dtype", "float32", "--no-bettertransformer"]
    command += ["--no-model-warmup"]  # every load warms with requests of its own
    environment = {**_environment(), "DO_NOT_TRACK": "1", "INFINITY_HOME": str(python.parents[1])}
    environment.pop("PYTHONPATH", None)  # another environment's packages
    return running(command, environment, port)


def in_process(probe: str, waves: Sequence[tuple[list[Request], list[Request]]]) -> dict[str, Any]:
    """What `embedding_in_process.py` says about waves of requests that warm and requests to measure.

    Raises:
        RuntimeError: it failed.
    """
    job = {
        "model": str(resolve(MODEL)),
        "probe": probe,
        "waves": [{"warm": warm, "requests": requests} for warm, requests in waves],
    }
    command = [sys.executable, str(Path(__file__).with_name("embedding_in_process.py"))]
    with _child(command, _environment()) as process:
        output, errors = process.communicate(json.dumps(job).encode(), timeout=IN_PROCESS_SECONDS)
    if process.returncode:
        raise RuntimeError(f"{IN_PROCESS} failed:\n{errors.decode(errors='replace')[-4000:]}")
    found: dict[str, Any] = json.loads(output)
    return found


@contextlib.contextmanager
def _child(command: list[str], environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=pipe, env=environment, start_new_session=True
    )
    try:
        yield process
    finally:
        end(process)


def _environment() -> dict[str, str]:
    """A worker's: peers get the same allocator and OpenMP runtime."""
    return {**worker_environment("cpu", os.environ), "HF_HUB_OFFLINE": "1"}
