"""The scheduler that vLLM would use, which also minds what embedding requests need.

- A pool over every row keeps away from cached prefixes: these have keys and values but no hidden states. Such
  prompts still fill the cache, so a chat after an embedding of the same prefix reads it, unless the method
  computes other keys and values than a chat would.
- A method may need all of a prompt in one step: it waits for a step that has room, however many tokens a step
  has for others.
- Steps are short for the sake of chats, which wait for the end of each; while none runs, they may be longer.
- Chats come first: they pass waiting embeddings, and of a step with chats, embeddings get the share that
  chats hardly feel (`StepShare`). A chat's long prompt leaves them that share, so that neither stops the
  other. With priorities (`--scheduling-policy priority`), these say who passes whom.
- Where drafts are verified, vLLM pads a prompt with one token left to a draft's length. An embedding's row is
  its prompt's last, so its padding is taken off again.

Beside that it takes drafts out of the step that they came with (`speculation.handover`).
"""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, Any

from galley_plugins import vllm_compat
from galley_plugins.embedding.methods import make_method
from galley_plugins.options import PluginOptions
from galley_plugins.speculation.handover import DraftTakingScheduler, hands_over, stop_asking
from galley_plugins.step_share import StepShare

if TYPE_CHECKING:
    from galley_plugins.embedding.methods.method import Method


class EmbeddingScheduler:
    """Mixed in before a vLLM scheduler."""

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)  # type: ignore[call-arg]
        options = PluginOptions.from_vllm_config(vllm_config)
        assert options.embedding is not None
        self._method: Method = make_method(options.embedding, vllm_config.model_config.hf_text_config)
        most = vllm_config.scheduler_config.max_num_batched_tokens
        self._step_tokens = min(options.step_tokens or most, most)
        self._embed_step_tokens = min(options.embed_step_tokens or self._step_tokens, most)
        self._most_step_tokens = most
        self._chats: set[str] = set()  # ids of requests that generate; some may have ended
        self._whole_waiting: dict[str, int] = {}  # request id -> tokens of its prompt
        config = vllm_config.scheduler_config
        self._step_share = StepShare(self._step_tokens // 2, lag=int(bool(config.async_scheduling)))
        self._passing = config.policy == "fcfs"
        self._decode_tokens = 1 + vllm_config.num_speculative_tokens  # no more than these are never split
        self._embed_left: int | None = None  # tokens of this step; None is any number
        self._chat_left: int | None = None
        if self._method.own_cache or self._method.uncached_tail:
            _leave_out_of_cache(self, None if self._method.own_cache else self._method.uncached_tail)

    def add_request(self, request: Any) -> None:
        if request.pooling_params is None:
            self._chats.add(request.request_id)
        else:
            if self._method.every_row or self._method.own_cache:
                request.skip_reading_prefix_cache = True
            if self._method.whole_prompt:
                self._whole_waiting[request.request_id] = request.num_tokens
        super().add_request(request)  # type: ignore[misc]

    def schedule(self: Any, *args: Any, **kwargs: Any) -> Any:
        self._chats &= self.requests.keys()
        step_tokens = self._step_tokens if self._chats else self._embed_step_tokens
        reading = self._share_out()
        self.max_num_scheduled_tokens = step_tokens
        if self._whole_waiting:
            running = sum(
                request.num_tokens_with_spec - request.num_computed_tokens for request in self.running
            )
            needed = min(running, step_tokens) + max(self._whole_waiting.values())
            self.max_num_scheduled_tokens = min(max(step_tokens, needed), self._most_step_tokens)
        output = super().schedule(*args, **kwargs)  # type: ignore[misc]
        for request_id in output.num_scheduled_tokens:
            self._whole_waiting.pop(request_id, None)
        if self._chats:
            embedded = sum(
                tokens
                for request_id, tokens in output.num_scheduled_tokens.items()
                if request_id not in self._chats
            )
            self._step_share.end(None if reading else embedded)
        return output

    def _share_out(self: Any) -> bool:
        """Part the step between chats and embeddings; whether a chat's prompt is yet to be read."""
        self._embed_left = self._chat_left = None
        if not self._chats:
            self._step_share.pause()
            return False
        self._step_share.begin(time.perf_counter())
        if len(self._chats) < len(self.requests):
            if not self._method.whole_prompt:
                self._embed_left = self._step_share.tokens()
                self._chat_left = self._step_tokens - self._wanted(self._embed_left)
            if self._passing:
                self.running.sort(key=_embeds)
                _chats_first(self.waiting)
        chats = (self.requests[request_id] for request_id in self._chats)
        return any(request.num_computed_tokens < request.num_prompt_tokens for request in chats)

    def _wanted(self: Any, most: int) -> int:
        """Tokens that embeddings have left to compute, or `most`."""
        wanted = 0
        for request in self.requests.values():
            if request.pooling_params is not None:
                wanted += request.num_tokens - request.num_computed_tokens
                if wanted >= most:
                    return most
        return wanted

    def _preempt_request(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        if request.pooling_params is not None and self._method.whole_prompt:
            self._whole_waiting[request.request_id] = request.num_tokens
        return super()._preempt_request(request, *args, **kwargs)  # type: ignore[misc]

    def finish_requests(self: Any, request_ids: Any, *args: Any, **kwargs: Any) -> Any:
        finished: list[Any] = super().finish_requests(request_ids, *args, **kwargs)  # type: ignore[misc]
        for request in finished:
            self._whole_waiting.pop(request.request_id, None)
        return finished

    def _reserve_prefill_lookahead(
        self: Any, request: Any, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        """vLLM's own last word on how many tokens of a request a step has, and where a prefill is split."""
        count: int = super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)  # type: ignore[misc]
        if request.pooling_params is None:
            if self._chat_left is not None:
                if count > self._decode_tokens:
                    count = min(count, max(self._chat_left, 1))
                self._chat_left -= count
        elif self._method.whole_prompt:  # nowhere, and in whatever step has room
            return 0 if num_computed_tokens + count < request.num_tokens else count
        elif self._embed_left is not None:
            if self._embed_left < 1:
                return 0
            if (
                num_computed_tokens + count > request.num_tokens
            ):  # padded: one token, to be neither cut nor counted
                self._embed_left -= 1
            else:
                count = min(count, self._embed_left)
                self._embed_left -= count
        return count

    def _update_after_schedule(self: Any, scheduler_output: Any) -> None:
        drafts = scheduler_output.scheduled_spec_decode_tokens
        for request_id in [name for name in drafts if self.requests[name].pooling_params is not None]:
            padding = len(drafts.pop(request_id))
            scheduler_output.num_scheduled_tokens[request_id] -= padding
            scheduler_output.total_num_scheduled_tokens -= padding
        super()._update_after_schedule(scheduler_output)  # type: ignore[misc]


def _embeds(request: Any) -> bool:
    return request.pooling_params is not None


def _chats_first(queue: Any) -> None:
    """Move waiting chats before embeddings, each kind in its order; vLLM's queue is a deque."""
    assert isinstance(queue, deque)
    first = sorted(queue, key=_embeds)
    if any(one is not other for one, other in zip(first, queue, strict=True)):
        queue.clear()
        queue.extend(first)


def _leave_out_of_cache(scheduler: Any, tail: int | None) -> None:
    """Keep blocks of embedding requests from being found by the hashes of their tokens.

    Args:
        tail: blocks that hold any of so many last tokens; None for all blocks.
    """
    coordinator = scheduler.kv_cache_manager.coordinator
    vllm_own = coordinator.cache_blocks

    def cache_blocks(request: Any, tokens: int, *args: Any, **kwargs: Any) -> Any:
        if request.pooling_params is not None:
            if tail is None:
                return None
            tokens = min(tokens, request.num_prompt_tokens - tail)
        return vllm_own(request, tokens, *args, **kwargs)

    coordinator.cache_blocks = cache_blocks


def make_scheduler(vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
    """Target of `--scheduler-cls`: picks the synchronous or asynchronous base as vLLM itself does."""
    vllm_compat.check("scheduler")
    if vllm_config.scheduler_config.async_scheduling:
        from vllm.v1.core.sched.async_scheduler import AsyncScheduler as Base
    else:
        from vllm.v1.core.sched.scheduler import Scheduler as Base
    mixins: list[type[Any]] = []
    if PluginOptions.from_vllm_config(vllm_config).pools:
        mixins.append(EmbeddingScheduler)
    if hands_over(vllm_config):
        stop_asking(vllm_config)
        mixins.append(DraftTakingScheduler)
    scheduler_class = type("GalleyScheduler", (*mixins, Base), {})
    return scheduler_class(vllm_config, *args, **kwargs)
