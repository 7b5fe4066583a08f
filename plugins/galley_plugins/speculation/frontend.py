"""What the API server must know of speculation: which requests it takes."""

from __future__ import annotations

from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams

from galley_plugins import vllm_compat
from galley_plugins.speculation.requests import drafting_limit


def validate_requests(*, runs_alone: bool) -> None:
    """Answer 400 to requests whose `vllm_xargs` about speculation are wrong.

    vLLM itself refuses `min_p` and `logit_bias` beside speculation.

    Args:
        runs_alone: the runner serves such requests without drafts, so that they need not be refused.
    """
    vllm_compat.check("speculation-frontend")
    vllm_own = SamplingParams._validate_spec_decode

    def validate(self: SamplingParams, speculative_config: Any) -> None:
        try:
            drafting_limit(self.extra_args, 1)
        except ValueError as error:
            raise VLLMValidationError(str(error), parameter="vllm_xargs") from None
        if not runs_alone:
            vllm_own(self, speculative_config)

    SamplingParams._validate_spec_decode = validate
