from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from galley_kernels.quantized import cpu_gemm
from tests.support.interpreter import interpreting

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture(scope="session")
def interpreted() -> Iterator[Callable[..., Any]]:
    yield from interpreting()


@pytest.fixture
def call(
    request: pytest.FixtureRequest, implementation: str, interpreted: Callable[..., Any]
) -> Callable[..., Any]:
    """Calls an operation by `implementation`; on a GPU where there is one and Triton is asked for."""
    if implementation == "cpu" and not cpu_gemm.available():
        pytest.skip("no C++ compiler")
    if implementation != "triton":
        return lambda function, *given, **named: function(*given, **named, implementation=implementation)
    return lambda function, *given, **named: interpreted(function, *given, **named, implementation="triton")
