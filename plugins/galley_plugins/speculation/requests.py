"""What a request may say about speculation, and what it must not be speculated with.

A request carries `vllm_xargs: {"speculation": false}` to switch it off, `{"max_draft_tokens": n}` to draft
less, and `{"speculation_scope": "..."}` to name its key where `scope: key` is configured.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from galley_plugins.speculation.options import Scope

SWITCH, LIMIT, KEY = "speculation", "max_draft_tokens", "speculation_scope"
_FALSE = (False, 0, "false", "False", "off", "0", "no")
_TRUE = (True, 1, "true", "True", "on", "1", "yes")


def drafting_limit(extra: Mapping[str, Any] | None, most: int) -> int:
    """The most tokens that may be drafted for a request.

    Raises:
        ValueError: a value is none of those above; the message names what was found and what was expected.
    """
    if not extra:
        return most
    switch = extra.get(SWITCH, True)
    if switch in _FALSE:
        most = 0
    elif switch not in _TRUE:
        raise ValueError(f"vllm_xargs.{SWITCH}: found {switch!r}, expected true or false")
    wanted = extra.get(LIMIT)
    if wanted is None:
        return most
    if isinstance(wanted, bool) or not isinstance(wanted, int | float) or wanted != int(wanted) or wanted < 0:
        raise ValueError(f"vllm_xargs.{LIMIT}: found {wanted!r}, expected a number of tokens, 0 or more")
    return min(most, int(wanted))


def scope_of(extra: Mapping[str, Any] | None, request: int, scope: Scope) -> int:
    """The number of the scope that a request learns in: 0 is the worker's.

    With `scope: key`, a request without a key is alone.
    """
    if scope == "worker":
        return 0
    key = (extra or {}).get(KEY)
    if scope == "key" and key is not None:
        digest = hashlib.blake2b(str(key).encode(), digest_size=7).digest()
        return int.from_bytes(digest, "big") | 1 << 56
    return request + 1


def standing_alone(params: Any, *, generated: int, custom_processors: bool) -> bool:
    """Whether a request must run without drafts now: vLLM applies some settings by their batch row.

    Args:
        params: vLLM's `SamplingParams`.
        generated: tokens that it has generated.
        custom_processors: the engine loads logits processors of the user's.
    """
    return bool(
        custom_processors
        or params.min_p > 0
        or params.logit_bias
        or params.min_tokens > generated
        or params.logprobs == -1
        or getattr(params, "logprob_token_ids", None)
        or getattr(params, "thinking_token_budget", None) is not None
    )
