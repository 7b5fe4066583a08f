"""Draft-verify speculation on runner V1.

vLLM schedules a draft as it would any other; a tree passes for a chain of as many tokens, since the scheduler
only counts. The runner alone knows the shape: it gives the nodes their positions, the attention its rows
(`speculation.branches`), samples along the tree (`speculation.verification`), and shows the drafter what the
model said.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import itertools
import logging
import time
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.v1.outputs import SamplerOutput
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from galley_plugins import vllm_compat
from galley_plugins.options import PluginOptions
from galley_plugins.speculation import verification
from galley_plugins.speculation.branches import (
    BranchPlan,
    add_request,
    copies_back,
    first_run,
    private_blocks,
)
from galley_plugins.speculation.drafting import Ask, Draft, Opening, Seen, Timing
from galley_plugins.speculation.lifecycle import DrafterFiles
from galley_plugins.speculation.requests import Terms, scope_of
from galley_plugins.speculation.rest import Rest
from galley_plugins.speculation.stats import SpeculationStats
from galley_plugins.speculation.top_candidates import best_tokens, top_candidates
from galley_plugins.speculation.verification import StepRows, Verified
from galley_plugins.speculation.warmup import warm_up

if TYPE_CHECKING:
    from collections.abc import Iterator

    from galley_plugins.speculation.drafting import Drafter
    from galley_plugins.speculation.options import SpeculationOptions

logger = logging.getLogger("vllm.galley.speculation")

SCRATCH_BLOCKS = 32  # private blocks for branches, beyond those that the scheduler knows of
TREE_REQUESTS = 4  # in larger batches a branch never pays
_IDLE_SECONDS = 0.02  # a longer pause between two steps is not the steps' own


class PassiveProposer:
    """What vLLM's `custom_class` makes, which must have `propose`; the runner drafts itself in its place."""

    def __init__(self, vllm_config: Any) -> None:
        pass

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        pass

    def propose(self, *args: Any, **kwargs: Any) -> list[list[int]]:
        raise NotImplementedError("SpeculationV1 drafts in its place")


class SpeculationV1:
    """Mixed in before a V1 `GPUModelRunner`, after mixins that drop rows (embedding)."""

    def __init__(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        vllm_compat.check("speculation-v1")
        options = PluginOptions.from_vllm_config(vllm_config).speculation
        assert options is not None
        if vllm_config.speculative_config.method != "custom_class" or not _on_cpu():
            raise ValueError("speculation on vLLM's runner V1 works on a CPU; on CUDA it needs runner V2")
        self.speculation = options
        self._trees = _trees_possible(vllm_config, options.tree)
        if self._trees:
            _register_tree_attention()
        with _every_logits_processor():
            super().__init__(vllm_config, *args, **kwargs)  # type: ignore[call-arg]
        self._custom_processors = bool(vllm_config.model_config.logits_processors)
        vocab_size = vllm_config.model_config.get_vocab_size()
        self._files = DrafterFiles(options, vocab_size, vllm_config.model_config.tokenizer)
        self.galley_drafter: Drafter = self._make_drafter(options, vocab_size)
        self.speculation_stats = SpeculationStats.from_environment(vllm_config.parallel_config.rank)
        self._numbers: dict[str, int] = {}  # request id -> the drafter's number
        self._next_number = 0
        self._text_lengths: dict[str, int] = {}  # tokens that the drafter has seen
        self._terms: dict[str, Terms] = {}
        self._drafted_trees: dict[str, Draft] = {}  # by request id, as scheduled next; chains are not in it
        self._plan: BranchPlan | None = None
        self._rows: StepRows | None = None
        self._verified: Verified | None = None
        self._tops: tuple[np.ndarray, np.ndarray] | None = None
        self._arena: torch.Tensor | None = None
        self._scratch: list[int] = []
        self._step_started = self._step_ended = 0.0
        self._tops_seconds = self._verify_seconds = self._propose_seconds = 0.0
        self._decode_only = self._timed = False
        self._rest = Rest() if options.method == "hybrid" else None  # others do not know what pays
        self._pausing = False

    def _make_drafter(self: Any, options: SpeculationOptions, vocab_size: int) -> Drafter:
        warm_up(options, vocab_size)
        drafter: Drafter = self._files.open()
        return drafter

    def save_speculation(self: Any) -> None:
        """Keep what was learned; the worker calls it when it ends."""
        self._files.save(self.galley_drafter)

    # -- private blocks -----------------------------------------------------------------------------------

    def initialize_kv_cache_tensors(self: Any, kv_cache_config: Any, *args: Any, **kwargs: Any) -> Any:
        if not self._trees:
            return super().initialize_kv_cache_tensors(kv_cache_config, *args, **kwargs)  # type: ignore[misc]
        reason = _unsuited(kv_cache_config)
        if reason:
            logger.warning("speculation verifies chains only: %s", reason)
            self._trees = False
            return super().initialize_kv_cache_tensors(kv_cache_config, *args, **kwargs)  # type: ignore[misc]
        larger = _with_more_blocks(kv_cache_config, SCRATCH_BLOCKS)
        caches = super().initialize_kv_cache_tensors(larger, *args, **kwargs)  # type: ignore[misc]
        self._arena = _as_arena(list(caches.values()))
        per_block = self._arena.shape[1] // larger.num_blocks  # kernel blocks in a block of the scheduler
        first = kv_cache_config.num_blocks * per_block
        self._scratch = list(range(first, first + SCRATCH_BLOCKS * per_block))
        return caches

    # -- before the forward pass --------------------------------------------------------------------------

    def execute_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        self._step_started = time.perf_counter()
        return super().execute_model(*args, **kwargs)  # type: ignore[misc]

    def _update_states(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        for request_id in scheduler_output.finished_req_ids:
            self._drafted_trees.pop(request_id, None)
            self._text_lengths.pop(request_id, None)
            self._terms.pop(request_id, None)
            number = self._numbers.pop(request_id, None)
            if number is not None:
                self.galley_drafter.end(number)
        return super()._update_states(scheduler_output, *args, **kwargs)  # type: ignore[misc]

    def _prepare_inputs(self: Any, scheduler_output: Any, num_scheduled_tokens: np.ndarray) -> Any:
        prepared = super()._prepare_inputs(scheduler_output, num_scheduled_tokens)  # type: ignore[misc]
        self._decode_only = scheduler_output.total_num_scheduled_tokens == len(self._rows.tokens)
        trees = self._trees_of_step() if self._drafted_trees else None
        self._plan = self._plan_branches(trees, num_scheduled_tokens) if trees else None
        return prepared

    def _calc_spec_decode_metadata(self: Any, counts: np.ndarray, ends: np.ndarray) -> SpecDecodeMetadata:
        """The step's rows; of vLLM's own metadata what is read where `_sample` verifies, and no more."""
        indices, *rows = verification.chain_rows(self.input_ids.cpu.numpy(), counts, ends)
        self._rows = StepRows(*rows)
        unread = torch.empty(0, dtype=torch.int32)
        return SpecDecodeMetadata(
            draft_token_ids=unread,
            num_draft_tokens=counts.tolist(),
            cu_num_draft_tokens=unread,
            cu_num_sampled_tokens=unread,
            target_logits_indices=unread,
            bonus_logits_indices=unread,
            logits_indices=torch.from_numpy(indices),
        )

    def _trees_of_step(self: Any) -> dict[int, np.ndarray]:
        """The parents of every draft that is a tree, by batch row; also among the step's rows from now on."""
        trees: dict[int, np.ndarray] = {}
        starts, tokens, parents = self._rows.starts, self._rows.tokens, self._rows.parents
        for request_id, draft in self._drafted_trees.items():
            request = self.input_batch.req_id_to_index.get(request_id)
            if request is None:
                continue
            first, last = starts[request] + 1, starts[request + 1]
            shape = draft.parents[: last - first]
            if not np.array_equal(draft.tokens[: last - first], tokens[first:last]):
                continue
            if (shape == np.arange(-1, last - first - 1)).all():
                continue  # what the scheduler left of the tree is a chain
            trees[request] = shape
            parents[first:last] = first + shape
        return trees

    def _plan_branches(self: Any, trees: dict[int, np.ndarray], scheduled: np.ndarray) -> BranchPlan:
        """Positions, slots and attention rows of a step with trees; copies what branches start from."""
        table = self.input_batch.block_table[0]
        blocks = table.block_table.np
        computed = self.input_batch.num_computed_tokens_cpu
        plan = BranchPlan()
        free = self._scratch.copy()
        stop = 0
        for request, count in enumerate(scheduled):
            start, stop = stop, stop + int(count)
            tree = trees.get(request)
            add_request(
                plan, request, start, stop, None if tree is None else tree.tolist(), int(computed[request]),
                blocks[request], free, table.block_size,
            )  # fmt: skip
        positions, slots = self.positions.numpy(), table.slot_mapping.gpu.numpy()
        for index, position in plan.positions:
            positions[index] = position
        for index, slot in plan.slots:
            slots[index] = slot
        ends = np.cumsum(scheduled)
        for index in plan.orphans:
            request = int(np.searchsorted(ends, index, side="right"))
            self._rows.parents[self._rows.starts[request + 1] - (int(ends[request]) - index)] = -2
        self._copy_blocks(plan.copies)
        return plan

    def _copy_blocks(self: Any, pairs: list[tuple[int, int]]) -> None:
        """Of all layers, one after the other: (from, to). Targets are none of the sources."""
        for source, target in pairs:  # few: gathering and scattering all at once takes three times as long
            self._arena[:, target].copy_(self._arena[:, source])

    def _build_attention_metadata(self: Any, *args: Any, **kwargs: Any) -> Any:
        metadata, common = super()._build_attention_metadata(*args, **kwargs)  # type: ignore[misc]
        plan = self._plan
        if plan is None:
            return metadata, common
        from galley_plugins.speculation.tree_attention import TreeAttentionMetadata

        requests = torch.tensor([request for request, _, _ in plan.rows])
        bounds = torch.tensor([0, *(stop for _, _, stop in plan.rows)], dtype=common.query_start_loc.dtype)
        lengths = torch.tensor(plan.lengths, dtype=common.seq_lens.dtype)
        tables = common.block_table_tensor[requests]
        for row, index, block in plan.tables:
            tables[row, index] = block
        attention = self.embedding.attention if hasattr(self, "embedding") else None
        causal = None if attention is None else attention.causal
        widened = replace(
            common,
            causal=True if causal is None else causal[requests],
            query_start_loc=bounds,
            query_start_loc_cpu=bounds,
            seq_lens=lengths,
            seq_lens_cpu_upper_bound=lengths,
            num_reqs=len(plan.rows),
            max_query_len=int((bounds[1:] - bounds[:-1]).max()),
            max_seq_len=int(lengths.max()),
            block_table_tensor=tables,
        )
        builder = self.attn_groups[0][0].get_metadata_builder(0)
        built = builder.build(0, widened)
        values = {entry.name: getattr(built, entry.name) for entry in fields(built)}
        tree = TreeAttentionMetadata(
            **values,
            extra_tokens=torch.tensor(plan.extra_tokens, dtype=torch.int64) if plan.extra_tokens else None,
            extra_slots=torch.tensor(plan.extra_slots, dtype=torch.int64) if plan.extra_slots else None,
        )
        return dict.fromkeys(metadata, tree), common

    # -- after it -----------------------------------------------------------------------------------------

    def _sample(self: Any, logits: Any, spec_decode_metadata: Any) -> Any:
        requests = self._rows.requests
        undrafted = len(self._rows.tokens) == requests
        self._pausing = self._rest is not None and undrafted and self._rest.pausing(requests)
        sampling = self.input_batch.sampling_metadata
        if self._pausing and verification.plain_greedy(sampling):
            best = torch.from_numpy(best_tokens(logits))
            return SamplerOutput(sampled_token_ids=best[:, None], logprobs_tensors=None)
        if spec_decode_metadata is None or self._pausing:
            return super()._sample(logits, None)  # type: ignore[misc]
        started = time.perf_counter()
        self.input_batch.update_async_output_token_ids()
        self._tops = top_candidates(logits)
        self._tops_seconds = time.perf_counter() - started
        best = np.ascontiguousarray(self._tops[0][:, 0])
        self._verified, output = verification.verify(logits, best, self._rows, sampling, self.sampler)
        if self._plan is not None:
            self._settle_branches()
        self._verify_seconds = time.perf_counter() - started
        return output

    def _settle_branches(self: Any) -> None:
        """Where a branch won, its blocks become the request's own."""
        table = self.input_batch.block_table[0]
        pairs: list[tuple[int, int]] = []
        wins = 0
        for request in {run.request for run in self._plan.runs}:
            accepted = int((self._verified.rows[request] >= 0).sum()) - 1
            if not accepted:
                continue
            node = int(self._verified.rows[request, accepted] - self._rows.starts[request]) - 1
            back = copies_back(
                self._plan, request, node, accepted, int(self.input_batch.num_computed_tokens_cpu[request]),
                table.block_table.np[request], table.block_size,
            )  # fmt: skip
            wins += bool(back)
            pairs += back
        self.speculation_stats.add("branch_wins", wins)
        self._copy_blocks(pairs)

    def _input_fits_in_drafter(self, common_attn_metadata: Any) -> bool:
        return True  # each request's draft is cut to its own room

    def propose_draft_token_ids(
        self: Any, scheduler_output: Any, sampled_token_ids: list[list[int]], *args: Any, **kwargs: Any
    ) -> list[list[int]]:
        """Show the step to the drafter and ask it for the next drafts."""
        started = time.perf_counter()
        batch = self.input_batch
        request_ids = batch.req_ids
        if self._pausing:  # texts that go on unseen are taken up again by `_open`
            self._step_ended = started
            return [[] for _ in request_ids]
        texts = batch.token_ids_cpu
        lengths = batch.num_tokens_no_spec[: len(request_ids)].tolist()  # the new tokens included
        gained = [len(tokens) for tokens in sampled_token_ids]
        speaking = [row for row, count in enumerate(gained) if count]
        for row in speaking:
            before = lengths[row] - gained[row]
            if self._text_lengths.get(request_ids[row]) != before:
                self._open(request_ids[row], texts[row, :before])
        drafter = self.galley_drafter
        if speaking:
            drafter.observe(self._seen(speaking, gained, lengths))
        asks: list[Ask] = []
        trees = self._trees and len(speaking) <= TREE_REQUESTS
        for row in speaking:
            request_id, length = request_ids[row], lengths[row]
            number, terms = self._numbers[request_id], self._terms[request_id]
            drafter.extend(number, texts[row, length - gained[row] : length])
            self._text_lengths[request_id] = length
            limit = terms.limit(len(self.requests[request_id].output_token_ids))
            limit = min(limit, max(self.max_model_len - length - 1, 0))
            asks.append(Ask(number, limit, trees and terms.tree))
        self._time_step(len(speaking), started)
        drafts: list[list[int]] = [[] for _ in request_ids]
        room = len(self._scratch)
        proposing = time.perf_counter()
        proposed = drafter.propose(asks) if asks else []
        self._propose_seconds = time.perf_counter() - proposing
        if self._rest is not None and asks:
            self._rest.looked(len(asks), drafter.worth)
        for row, draft in zip(speaking, proposed, strict=True):
            self._drafted_trees.pop(request_ids[row], None)
            if not draft.is_chain:
                draft = draft.depth_first()
                computed = lengths[row] - 1
                needed = private_blocks(draft.parents.tolist(), computed, batch.block_table[0].block_size)
                if needed > room:
                    length = first_run(draft.parents.tolist())
                    draft = Draft(draft.tokens[:length], draft.parents[:length])
                else:
                    room -= needed
                    self._drafted_trees[request_ids[row]] = draft
            drafts[row] = draft.tokens.tolist()
        self._count(speaking, gained, started)
        return drafts

    def _open(self: Any, request_id: str, text: np.ndarray) -> None:
        """Make the request known to the drafter, or known again with this text."""
        number = self._numbers.get(request_id)
        if number is not None:
            self.galley_drafter.end(number)
        else:
            number = self._numbers[request_id] = self._next_number
            self._next_number += 1
        params = self.requests[request_id].sampling_params
        opening = Opening(
            tokens=np.array(text, np.int32),
            scope=scope_of(params.extra_args, number, self.speculation.scope),
            greedy=params.temperature < 1e-5,
        )
        self.galley_drafter.begin(number, opening)
        self._text_lengths[request_id] = len(text)
        self._terms[request_id] = Terms.of(
            params, self.speculation.max_draft_tokens, custom_processors=self._custom_processors
        )

    def _seen(self: Any, speaking: list[int], gained: list[int], lengths: list[int]) -> Seen:
        rows, verified = self._rows, self._verified
        numbers = np.full(rows.requests, -1, np.int32)
        numbers[speaking] = [self._numbers[self.input_batch.req_ids[row]] for row in speaking]
        before = np.array(lengths, np.int32) - np.array(gained, np.int32)
        requests, contexts, accepted = verification.shown(
            self.input_batch.token_ids_cpu, before, numbers, rows.starts, rows.tokens, rows.parents,
            verified.tokens, verified.rows,
        )  # fmt: skip
        tokens, probabilities = self._tops
        if len(speaking) == rows.requests:
            return Seen(requests, contexts, tokens, probabilities, accepted)
        kept = requests >= 0
        return Seen(requests[kept], contexts[kept], tokens[kept], probabilities[kept], accepted[kept])

    def _time_step(self: Any, requests: int, started: float) -> None:
        """Tell the drafter what the step cost, the scheduler's part since the last one included."""
        pause = self._step_started - self._step_ended
        self._timed = self._decode_only and requests > 0 and 0 <= pause < _IDLE_SECONDS
        if self._timed:
            now = time.perf_counter()
            seconds = now - self._step_ended
            own = self._tops_seconds + self._propose_seconds + now - started
            self.galley_drafter.timed(Timing(len(self._rows.tokens), requests, seconds, own))

    def _count(self: Any, speaking: list[int], gained: list[int], started: float) -> None:
        now = time.perf_counter()
        stats: SpeculationStats = self.speculation_stats
        if speaking:
            stats.add("steps")
            if self._plan is not None:
                stats.add("tree_steps")
            starts = self._rows.starts.tolist()
            nodes = [starts[row + 1] - starts[row] - 1 for row in speaking]
            stats.verified(nodes, [gained[row] - 1 for row in speaking])
            if self._timed:
                stats.add("step_seconds", now - self._step_ended)
                stats.add("draft_seconds", now - started)
                stats.add("verify_seconds", self._verify_seconds)
        self._step_ended = now


def _trees_possible(vllm_config: Any, wanted: str) -> bool:
    # Each rank of a tensor-parallel group would grow trees of its own.
    return wanted != "off" and vllm_config.parallel_config.world_size == 1


def _on_cpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def _register_tree_attention() -> None:
    vllm_compat.check("speculation-tree")
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(
        AttentionBackendEnum.CPU_ATTN, "galley_plugins.speculation.tree_attention.TreeAttentionBackend"
    )


@contextlib.contextmanager
def _every_logits_processor() -> Iterator[None]:
    """Build vLLM's logits processors as without speculation: requests that use them run without drafts."""
    module: Any = importlib.import_module("vllm.v1.worker.gpu_model_runner")
    original = module.build_logitsprocs

    def build(vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        plain = copy.copy(vllm_config)
        plain.speculative_config = None
        return original(plain, *args, **kwargs)

    module.build_logitsprocs = build
    try:
        yield
    finally:
        module.build_logitsprocs = original


def _unsuited(kv_cache_config: Any) -> str | None:
    """Why this model's cache cannot hold branches, if so."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        return f"the model has {len(groups)} groups of attention layers, branches need one"
    spec = groups[0].kv_cache_spec
    if type(spec) is not FullAttentionSpec or spec.sliding_window is not None:
        return f"its attention is {type(spec).__name__}, branches need full attention"
    for tensor in kv_cache_config.kv_cache_tensors:
        if tensor.host_resident or tensor.block_stride >= tensor.layer_stride > 0:
            return "its cache is laid out block by block"
    return None


def _with_more_blocks(kv_cache_config: Any, extra: int) -> Any:
    """The same cache with `extra` more blocks at the end of every layer."""
    before, after = kv_cache_config.num_blocks, kv_cache_config.num_blocks + extra
    tensors = [
        replace(
            tensor,
            size=tensor.size // before * after,
            layer_stride=tensor.layer_stride // before * after,
            offset=tensor.offset // before * after,
        )
        for tensor in kv_cache_config.kv_cache_tensors
    ]
    return replace(kv_cache_config, num_blocks=after, kv_cache_tensors=tensors)


def _as_arena(caches: list[torch.Tensor]) -> torch.Tensor:
    """All layers' caches as one [layers, blocks, values of a block] view of their common storage."""
    first = caches[0]
    size = first[0].numel()
    width = first.element_size()
    strides = {
        (after.data_ptr() - before.data_ptr()) // width for before, after in itertools.pairwise(caches)
    }
    if len(strides) > 1 or not first.is_contiguous():
        raise RuntimeError("the layers' caches do not lie evenly in one allocation")
    stride = strides.pop() if strides else first.numel()
    return torch.as_strided(first, (len(caches), first.shape[0], size), (stride, size, 1))
