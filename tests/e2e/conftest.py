from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from loadtest.servers import Server, galley_serve

if TYPE_CHECKING:
    from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def galley() -> Iterator[Server]:
    """What a user gets from `galley serve`: the gateway and the built-in model with its defaults."""
    with galley_serve() as server:
        yield server
