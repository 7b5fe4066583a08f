"""Draft-verify speculation on runner V2 (CUDA's default).

V2 drafts and verifies on the device: its speculator is asked once a step for as many tokens for each request,
and its own rejection sampler keeps what the model would have said. Here that speculator is `TableSpeculator`;
the mixin puts it in the place of vLLM's n-gram one, shows it the logits, and keeps requests to their limits.

A request with a smaller limit is drafted for like any other, so that the batch keeps the shape that CUDA
graphs were captured with; drafts past its limit are taken back before they are verified. Where vLLM schedules
step by step and no such graph is lost (on a CPU), what is unlikely to be accepted is not scheduled at all.
With `enable_adaptive_verification` vLLM chooses by itself, from the same probabilities.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
from typing import TYPE_CHECKING, Any

import torch
from vllm.v1.outputs import DraftTokenIds
from vllm.v1.worker.gpu.spec_decode.speculator import BaseSpeculator

from galley_plugins import vllm_compat
from galley_plugins.options import PluginOptions
from galley_plugins.speculation.device import (
    drafter_on,
    top_predictions,
)
from galley_plugins.speculation.device_stats import DeviceStats
from galley_plugins.speculation.device_steps import Asked, Rows, Texts
from galley_plugins.speculation.drafting import TOP
from galley_plugins.speculation.requests import drafting_limit, scope_of
from galley_plugins.speculation.stats import SpeculationStats

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from galley_plugins.speculation.options import SpeculationOptions

logger = logging.getLogger("vllm.galley.speculation")

MOST_ROWS = 256  # rows of a step that are learned from; bounds what their probabilities take
LEAST = 0.1  # tokens that are accepted more rarely are not scheduled where that is free


class SpeculationV2:
    """Mixed in before a V2 `GPUModelRunner`, and before mixins that drop rows (embedding), to see which."""

    def __init__(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        vllm_compat.check("speculation-v2")
        options = PluginOptions.from_vllm_config(vllm_config).speculation
        assert options is not None
        if vllm_config.speculative_config is None or not vllm_config.speculative_config.use_ngram():
            raise ValueError("speculation on vLLM's runner V2 needs vLLM's method ngram_gpu or ngram")
        self._speculation = options
        self._opened = 0
        with _own_speculator(options):
            super().__init__(vllm_config, *args, **kwargs)  # type: ignore[call-arg]

    def load_model(self: Any, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)  # type: ignore[misc]
        if self.speculator is not None:  # only the last pipeline rank has one
            self.model.compute_logits = self.speculator.shown(self.model.compute_logits)

    def add_requests(self: Any, scheduler_output: Any) -> None:
        # Read first: the embedding mixin turns a pooling request into one of a single token.
        opened = [self._opening(request) for request in scheduler_output.scheduled_new_reqs]
        super().add_requests(scheduler_output)  # type: ignore[misc]
        if opened and self.speculator is not None:
            names, scopes, limits = zip(*opened, strict=True)
            slots = [self.req_states.req_id_to_index[name] for name in names]
            self.speculator.begin(slots, scopes, limits)

    def _opening(self: Any, request: Any) -> tuple[str, int, int]:
        """Id, scope and limit of a new request."""
        self._opened += 1
        if request.pooling_params is not None:
            return request.req_id, 0, 0
        extra = request.sampling_params.extra_args
        try:
            limit = drafting_limit(extra, self.num_speculative_steps)
        except ValueError as error:
            logger.warning("request %s: %s", request.req_id, error)
            limit = self.num_speculative_steps
        return request.req_id, scope_of(extra, self._opened, self._speculation.scope), limit

    def sample(
        self: Any, hidden_states: torch.Tensor, input_batch: Any, grammar_output: Any
    ) -> tuple[Any, torch.Tensor, torch.Tensor]:
        with self.speculator.verification(input_batch):
            verified: tuple[Any, torch.Tensor, torch.Tensor] = super().sample(  # type: ignore[misc]
                hidden_states, input_batch, grammar_output
            )
        return verified

    def take_draft_token_ids(self: Any) -> DraftTokenIds | None:
        drafts: DraftTokenIds | None = super().take_draft_token_ids()  # type: ignore[misc]
        if drafts is None or self.scheduler_config.async_scheduling:
            return drafts
        if self.compilation_config.cudagraph_mode.has_full_cudagraphs():
            return drafts  # captured for drafts of one length
        counts = self.speculator.promising.tolist()
        cut = [ids[:count] for ids, count in zip(drafts.draft_token_ids, counts, strict=True)]
        return DraftTokenIds(drafts.req_ids, cut)


class TableSpeculator(BaseSpeculator):  # type: ignore[misc, unused-ignore]
    """Drafts for V2 from the tables of `speculation.device`.

    Attributes:
        promising: int64 [requests of the last step], how many tokens of each draft are worth a row.
        draft_token_confidence_probs: float32 [max requests, drafts], what vLLM's adaptive verification reads.
    """

    supports_mm_inputs = False
    draft_logits = None  # a draft token is certain; the rejection sampler needs no distribution

    def __init__(
        self, vllm_config: Any, device: torch.device, req_states: Any, options: SpeculationOptions
    ) -> None:
        config = vllm_config.speculative_config
        most = config.num_speculative_tokens
        self._states = req_states
        self._drafter = drafter_on(device, options, requests=req_states.max_num_reqs, most=most)
        stats = SpeculationStats.from_environment(vllm_config.parallel_config.rank)
        self._stats = DeviceStats(stats, device)
        self._warmed = False
        self._limited: set[int] = set()  # slots whose limit is below `most`
        self._most = most
        self._showing = False
        self._tops: tuple[torch.Tensor, torch.Tensor] | None = None
        self._drafts = torch.zeros((req_states.max_num_reqs, most), dtype=torch.int64, device=device)
        self.enable_adaptive_verification: bool = config.enable_adaptive_verification
        self.draft_token_confidence_probs = torch.zeros((req_states.max_num_reqs, most), device=device)
        self._chances = self.draft_token_confidence_probs[:0]

    @property
    def promising(self) -> torch.Tensor:
        return (self._chances.cumprod(1) >= LEAST).sum(1)

    def init_cudagraph_manager(self, cudagraph_mode: Any) -> None:
        del cudagraph_mode

    def capture(self) -> None:
        return None

    def begin(self, slots: list[int], scopes: tuple[int, ...], limits: tuple[int, ...]) -> None:
        """Requests enter."""
        self._drafter.begin(slots, scopes, limits)
        for slot, limit in zip(slots, limits, strict=True):
            (self._limited.add if limit < self._most else self._limited.discard)(slot)

    def shown(self, compute_logits: Callable[..., torch.Tensor | None]) -> Callable[..., torch.Tensor | None]:
        """The same function, whose results are read during `verification`, before grammars change them."""

        def compute(*args: Any, **kwargs: Any) -> torch.Tensor | None:
            logits = compute_logits(*args, **kwargs)
            if self._showing and logits is not None:
                self._tops = top_predictions(logits[:MOST_ROWS])
            return logits

        return compute

    @contextlib.contextmanager
    def verification(self, batch: Any) -> Iterator[None]:
        """Around the sampling of a step: take drafts past their limit back, and look at the logits."""
        self._tops = None
        self._showing = True
        rows, ids = batch.logits_indices, batch.input_ids
        limited = batch.num_draft_tokens > 0 and not self._limited.isdisjoint(batch.idx_mapping_np.tolist())
        if limited:
            drafted = ids[rows]
            # -1 is never accepted. It must not stay: a later step may read padding at this place.
            ids[rows] = torch.where(self._past_limit(batch), -1, drafted)
        try:
            yield
        finally:
            self._showing = False
            if limited:
                ids[rows] = drafted

    def _past_limit(self, batch: Any) -> torch.Tensor:
        """Which rows [logits] come from drafts that their request did not ask for."""
        return batch.expanded_local_pos > self._drafter.limits[batch.expanded_idx_mapping]

    def propose(
        self,
        input_batch: Any,
        attn_metadata: Any,
        slot_mappings: Any,
        last_hidden_states: torch.Tensor,
        aux_hidden_states: list[torch.Tensor] | None,
        num_sampled: torch.Tensor,
        num_rejected: torch.Tensor,
        last_sampled: torch.Tensor,
        next_prefill_tokens: torch.Tensor,
        temperature: torch.Tensor,
        seeds: torch.Tensor,
        dp_sync_state: Any = None,
        dummy_run: bool = False,
        skip_attn_for_dummy_run: bool = False,
        mm_inputs: Any = None,
        is_profile: bool = False,
        num_speculative_tokens: int | None = None,
    ) -> torch.Tensor:
        """Learn from the step, whose tokens the runner has added to the texts, and draft for the next one.

        Args:
            num_sampled: int32 [requests]; 0 for prompt chunks and dropped rows.
            temperature: float32 [max requests], by slot.
            num_speculative_tokens: how many tokens the next step verifies.

        Returns:
            int64 [requests, drafts].
        """
        count = input_batch.num_reqs
        if dummy_run:
            self._warm(input_batch, temperature)
            return self._drafts[:count]
        self._stats.drafting()
        slots = input_batch.idx_mapping
        texts = Texts(
            slots=slots,
            tokens=self._states.all_token_ids.gpu,
            lengths=self._states.total_len.gpu[slots].long(),
            new=num_sampled.long(),
            sampled=temperature[slots] > 0,
        )
        nodes = torch.minimum(input_batch.cu_num_logits.long().diff() - 1, self._drafter.limits[slots])
        self._stats.verified(nodes, texts.new - 1, texts.new > 0)
        if self._tops is not None:
            self._drafter.observe(self._rows(input_batch, texts, *self._tops))
            self._tops = None
        tokens, chances = self._drafter.propose(texts, num_speculative_tokens)
        self._drafts[:count] = tokens
        self.draft_token_confidence_probs[:count] = chances
        self._chances = chances
        self._stats.drafted()
        return self._drafts[:count]

    def _warm(self, batch: Any, temperature: torch.Tensor) -> None:
        """Let kernels be compiled before the first request: a step that brings no token teaches nothing."""
        capturing = self._drafts.is_cuda and torch.cuda.is_current_stream_capturing()
        if self._warmed or capturing:
            return
        self._warmed = True
        slots = batch.idx_mapping
        none = torch.zeros_like(slots, dtype=torch.int64)
        texts = Texts(slots, self._states.all_token_ids.gpu, none + 1, none, temperature[slots] > 0)
        self._stats.verified(none, none, none > 0)
        count = min(len(batch.logits_indices), MOST_ROWS)
        tokens = none.new_full((count, TOP), -1)
        self._drafter.observe(self._rows(batch, texts, tokens, torch.zeros_like(tokens, dtype=torch.float32)))
        self._drafter.propose(texts)

    def _rows(self, batch: Any, texts: Texts, tokens: torch.Tensor, probs: torch.Tensor) -> Rows:
        asked = Asked(
            places=batch.logits_indices,
            slots=batch.expanded_idx_mapping,
            local=batch.expanded_local_pos,
            bounds=batch.cu_num_logits,
            tokens=batch.input_ids,
            positions=batch.positions,
            prompts=self._states.prefill_len.gpu,
        )
        return self._drafter.rows(asked, texts, tokens, probs)


@contextlib.contextmanager
def _own_speculator(options: SpeculationOptions) -> Iterator[None]:
    """The runner makes its speculator in its constructor, by a name in its module; put ours there."""
    module: Any = importlib.import_module("vllm.v1.worker.gpu.model_runner")
    original = module.init_speculator

    def make(vllm_config: Any, device: torch.device, req_states: Any) -> TableSpeculator:
        return TableSpeculator(vllm_config, device, req_states, options)

    module.init_speculator = make
    try:
        yield
    finally:
        module.init_speculator = original
