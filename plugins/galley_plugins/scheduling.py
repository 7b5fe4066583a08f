"""The scheduler that vLLM would use, which also keeps mean-pooled prompts away from cached prefixes.

A prefix that is read from the cache has keys and values but no hidden states, and a mean needs every row.
Such prompts still fill the cache, so a chat after an embedding of the same prefix reads it.
"""

from __future__ import annotations

from typing import Any

from galley_plugins import vllm_compat
from galley_plugins.options import PluginOptions


class ComputeWholePrompt:
    """Mixed in before a vLLM scheduler."""

    def add_request(self, request: Any) -> None:
        if request.pooling_params is not None:
            request.skip_reading_prefix_cache = True
        super().add_request(request)  # type: ignore[misc]


def make_scheduler(vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
    """Target of `--scheduler-cls`: picks the synchronous or asynchronous base as vLLM itself does."""
    vllm_compat.check("scheduler")
    if vllm_config.scheduler_config.async_scheduling:
        from vllm.v1.core.sched.async_scheduler import AsyncScheduler as Base
    else:
        from vllm.v1.core.sched.scheduler import Scheduler as Base
    options = PluginOptions.from_vllm_config(vllm_config)
    mixins = (ComputeWholePrompt,) if options.embed and options.pooling == "mean" else ()
    scheduler_class = type("GalleyScheduler", (*mixins, Base), {})
    return scheduler_class(vllm_config, *args, **kwargs)
