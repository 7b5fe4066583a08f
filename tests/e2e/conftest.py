from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from loadtest.servers import FLOAT32, Server, galley_serve, plain_vllm
from tests.support.shallow_model import make_shallow_model

if TYPE_CHECKING:
    from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")


LARGE = {"max-num-seqs": 32, "max-num-batched-tokens": 2048, "kv-cache-memory-bytes": 1024**3}
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
    with plain_vllm({**FLOAT32, **LARGE}) as server:
        yield server


@pytest.fixture(scope="session")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Weights of a model that is several times as fast; see `tests.support.shallow_model`."""
    return str(make_shallow_model(tmp_path_factory.mktemp("shallow")))


@pytest.fixture(scope="session")
def plain_shallow(shallow: str) -> Iterator[Server]:
    """As `plain_engine`, with the shallow model."""
    with plain_vllm({**FLOAT32, **LARGE}, weights=shallow) as server:
        yield server


@pytest.fixture(scope="session")
def galley() -> Iterator[Server]:
    """What a user gets from `galley serve`: the gateway and the built-in model with its defaults."""
    with galley_serve() as server:
        yield server
