"""What the API server must know of memories: which requests it takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams

from galley_plugins import vllm_compat
from galley_plugins.memory.requests import memory_weights

if TYPE_CHECKING:
    from collections.abc import Mapping


def validate_requests(configured: Mapping[str, float]) -> None:
    """Answer 400 to requests whose `vllm_xargs` about memories are wrong, or are for none.

    Args:
        configured: the memories' shares by name, as the workers report them.
    """
    vllm_compat.check("memory-frontend")
    vllm_own = SamplingParams.verify

    def verify(self: SamplingParams, *args: Any, **kwargs: Any) -> None:
        try:
            memory_weights(self.extra_args, configured)
        except ValueError as error:
            raise VLLMValidationError(str(error), parameter="vllm_xargs") from None
        vllm_own(self, *args, **kwargs)

    SamplingParams.verify = verify
