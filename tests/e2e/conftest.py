from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from loadtest.servers import FLOAT32, Server, galley_serve, plain_vllm

if TYPE_CHECKING:
    from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")


ENGINE_SECONDS = 1800  # only so that nothing hangs: a slow machine needs several times a fast one's


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("engine"):
            item.add_marker(pytest.mark.timeout(ENGINE_SECONDS))


@pytest.fixture(scope="session")
def plain_engine() -> Iterator[Server]:
    """vLLM itself, without plugins, for the answers that others are compared with; it idles while they run.

    Its steps take whole prompts: of a seeded one in several chunks it dies on a CPU.
    """
    large = {"max-num-seqs": 32, "max-num-batched-tokens": 2048, "kv-cache-memory-bytes": 1024**3}
    with plain_vllm({**FLOAT32, **large}) as server:
        yield server


@pytest.fixture(scope="session")
def galley() -> Iterator[Server]:
    """What a user gets from `galley serve`: the gateway and the built-in model with its defaults."""
    with galley_serve() as server:
        yield server
