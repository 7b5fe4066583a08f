"""What a request may say about speculation, and what it must not be speculated with.

A request carries `vllm_xargs: {"speculation": false}` to switch it off, `{"max_draft_tokens": n}` to draft
less, and `{"speculation_scope": "..."}` to name its key where `scope: key` is configured.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, NamedTuple

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


class Terms(NamedTuple):
    """What a request's parameters say about its drafts.

    Attributes:
        most: tokens of a draft at the most, >= 0.
        least_generated: tokens that it must have generated before it has a draft.
        most_generated: tokens that it may generate; None for any number.
        tree: whether drafts may branch. A grammar's masks are laid out for a chain.
    """

    most: int
    least_generated: int
    most_generated: int | None
    tree: bool

    @classmethod
    def of(cls, params: Any, most: int, *, custom_processors: bool) -> Terms:
        """The terms of vLLM's `SamplingParams`, of which some need a step without drafts.

        Args:
            most: tokens of any request's draft at the most.
            custom_processors: the engine loads logits processors of the user's.

        Raises:
            ValueError: as `drafting_limit`.
        """
        alone = (  # vLLM applies these by their row of the batch
            custom_processors
            or params.min_p > 0
            or params.logit_bias
            or params.logprobs == -1
            or getattr(params, "logprob_token_ids", None)
            or getattr(params, "thinking_token_budget", None) is not None
        )
        limit = 0 if alone else drafting_limit(params.extra_args, most)
        return cls(limit, params.min_tokens, params.max_tokens, params.structured_outputs is None)

    def limit(self, generated: int) -> int:
        """The most tokens of a draft after so many generated ones; the last token needs none."""
        if generated < self.least_generated:
            return 0
        if self.most_generated is None:
            return self.most
        return max(0, min(self.most, self.most_generated - generated - 1))
