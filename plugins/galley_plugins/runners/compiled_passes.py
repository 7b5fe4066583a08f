"""A second start with torch.compile on a CPU loads what the first one compiled.

On a CPU vLLM hands the whole pass to inductor, saves the result, and at the next start finishes loading it by
a method that only results of its own backend have: it warns, and compiles all of it again. Inductor's result
is a function that has nothing left to load.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def loading_compiled() -> Iterator[None]:
    """While it lasts, passes that inductor compiled for vLLM can be loaded."""
    load: Any = torch.compiler.load_compiled_function

    def complete(*args: Any, **kwargs: Any) -> Any:
        loaded = load(*args, **kwargs)
        compiled = loaded._artifacts.compiled_fn
        if not hasattr(compiled, "finalize_loading"):
            compiled.finalize_loading = _nothing_left
        return loaded

    torch.compiler.load_compiled_function = complete
    try:
        yield
    finally:
        torch.compiler.load_compiled_function = load


def _nothing_left(config: Any) -> None:
    """What vLLM calls with its configuration after it has loaded a pass."""
