"""How much of each memory a request wants in its distribution.

A request carries `vllm_xargs: {"memory_weight": 0.3}` for all memories together, which share it as their
configured weights do, and `{"memory_weight.NAME": 0.1}` for one of them.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

TOTAL = "memory_weight"
_SLACK = 1e-6  # decimal fractions that add up to 1 on paper


def memory_weights(extra: Mapping[str, Any] | None, configured: Mapping[str, float]) -> tuple[float, ...]:
    """Each memory's share of a request's distribution, in the order of `configured`.

    Args:
        extra: the request's `vllm_xargs`.
        configured: shares of requests that do not say, by the memories' names.

    Raises:
        ValueError: a value is no number from 0 to 1, a name is unknown, or all shares together exceed 1; the
            message names what was found and what was expected.
    """
    asked = {key: value for key, value in (extra or {}).items() if key.split(".", 1)[0] == TOTAL}
    if not asked:
        return tuple(configured.values())
    if not configured:
        raise ValueError(f"vllm_xargs.{min(asked)}: found one, expected none for a model without a memory")
    shares = dict(configured)
    if TOTAL in asked:
        total = _number(TOTAL, asked.pop(TOTAL))
        whole = math.fsum(configured.values())
        for name, share in configured.items():
            shares[name] = total * (share / whole if whole else 1 / len(configured))
    for key, value in asked.items():
        name = key.removeprefix(f"{TOTAL}.")
        if name not in shares:
            known = ", ".join(f"{TOTAL}.{each}" for each in configured)
            raise ValueError(f"vllm_xargs: found {key}, expected {TOTAL}, {known}")
        shares[name] = _number(key, value)
    check_shares(shares, "vllm_xargs")
    return tuple(shares.values())


def check_shares(shares: Mapping[str, float], where: str) -> None:
    """
    Raises:
        ValueError: they leave less than nothing to the model.
    """
    whole = math.fsum(shares.values())
    if whole > 1 + _SLACK:
        parts = ", ".join(f"{name} {share:g}" for name, share in shares.items())
        raise ValueError(
            f"{where}: found weights of memories that add up to {whole:g} ({parts}), expected 1 at most"
        )


def _number(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"vllm_xargs.{key}: found {value!r}, expected a number from 0 to 1")
    return float(value)
