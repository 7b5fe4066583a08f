"""Drafts come with the step that they were made in, where vLLM asks for them in a message of its own.

vLLM's engine core asks the workers for drafts after each step, one more exchange between two processes: on a
CPU more than a millisecond, whether or not anything was drafted. Here the worker puts them into the step's
output, the scheduler takes them out, and the engine core need not ask. For vLLM's runner V1, whose steps are
scheduled one after the other.
"""

from __future__ import annotations

from typing import Any

from galley_plugins import vllm_compat
from galley_plugins.options import PluginOptions

FIELD = "galley_drafts"  # of a step's output: vLLM's DraftTokenIds, or None


def hands_over(vllm_config: Any) -> bool:
    """Whether this engine's drafts come with its steps."""
    return (
        PluginOptions.from_vllm_config(vllm_config).speculation is not None
        and not vllm_config.use_v2_model_runner
        and not vllm_config.scheduler_config.async_scheduling
        and vllm_config.parallel_config.pipeline_parallel_size == 1
    )


def with_drafts(output: Any, runner: Any) -> Any:
    """A step's output, in the worker, with what the runner drafted after it."""
    if output.req_ids:  # without any it may be vLLM's own empty output, which all steps share
        setattr(output, FIELD, runner.take_draft_token_ids())
    return output


class DraftTakingScheduler:
    """Mixed in before a vLLM scheduler."""

    def update_from_output(self: Any, scheduler_output: Any, model_runner_output: Any) -> Any:
        updated = super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]
        drafts = getattr(model_runner_output, FIELD, None)
        if drafts is not None:
            self.update_draft_token_ids(drafts)
        return updated


def stop_asking(vllm_config: Any) -> None:
    """Have executors of this kind say that there are no drafts to fetch, where drafts come with steps.

    Raises:
        IncompatibleVllmError: this vLLM takes drafts otherwise.
    """
    vllm_compat.check("speculation-handover")
    from vllm.v1.executor.abstract import Executor

    kind: Any = Executor.get_class(vllm_config)
    ask = kind.take_draft_token_ids
    if getattr(ask, "asks_seldom", False):
        return

    def take_draft_token_ids(self: Any) -> Any:
        if not hasattr(self, "_galley_hands_over"):  # asked once: a step would feel it
            self._galley_hands_over = hands_over(self.vllm_config)
        return None if self._galley_hands_over else ask(self)

    take_draft_token_ids.asks_seldom = True  # type: ignore[attr-defined]
    kind.take_draft_token_ids = take_draft_token_ids
