"""Which implementation of an operation runs."""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection

    import torch

AUTO = "auto"


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on a CPU; Triton reads this when it is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def choose(asked: str, have: Collection[str], device: torch.device) -> str:
    """`asked`, or for `auto` Triton on a GPU and torch elsewhere.

    Raises:
        ValueError: there is no such implementation, or not for this device.
    """
    if asked == AUTO:
        return "triton" if device.type == "cuda" and has_triton() else "torch"
    if asked not in have:
        raise ValueError(f"implementation: found {asked!r}, expected auto, {', '.join(have)}")
    if asked == "cpu" and device.type != "cpu":
        raise ValueError(f"implementation: found 'cpu' for tensors on {device}, expected a CPU")
    if asked == "triton" and device.type == "cpu" and not interpreted():
        raise ValueError("implementation: found 'triton' for tensors on a CPU, expected a GPU")
    return asked
