"""Self-drafting on runner V1: the model drafts for itself with part of its sub-layers skipped (SWIFT).

A draft starts from the request's last token, whose key and value are not in the cache yet, and stores keys
and values from that position on, in the kept layers. All of these slots lie after what was verified: the step
that verifies the draft computes the last token and the draft again, in every layer, before it reads them, and
what it does not accept is behind the request's end as before. vLLM hashes a block for prefix caching once
verified tokens fill it, so no slot of a draft is in one. Where a draft is longer than the blocks that the
scheduler has allocated, it goes on in private blocks, which the scheduler does not know (see
`SpeculationV1`); where these are used up it ends.

A skip set is scored in one forward pass over tokens that stand in the cache already: they are stored in
private blocks instead, the first of which starts as a copy of the request's own, so that the cache stays as
it is.
"""

from __future__ import annotations

import contextlib
import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.config import CompilationMode
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata

from galley_plugins import vllm_compat
from galley_plugins.memory.mixed_model import plain
from galley_plugins.options import PluginOptions
from galley_plugins.runners.speculation_v1 import SpeculationV1
from galley_plugins.speculation.drafting import Draft
from galley_plugins.speculation.swift import Chains, SkipSearch, matchness, skipped_layers
from galley_plugins.speculation.warmup import warm_up

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from galley_plugins.speculation.drafting import Ask, Drafter, Opening, Seen, Timing
    from galley_plugins.speculation.options import SpeculationOptions

logger = logging.getLogger("vllm.galley.speculation")


class SelfSpeculationV1(SpeculationV1):
    """Mixed in where `SpeculationV1` would be; drafts are chains."""

    def __init__(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        vllm_compat.check("speculation-self")
        reason = _unsuited_engine(vllm_config)
        if reason:
            raise ValueError(f"speculation.method: self-drafting needs {reason}")
        options = PluginOptions.from_vllm_config(vllm_config).speculation
        assert options is not None
        self.swift = options.swift
        super().__init__(vllm_config, *args, **kwargs)

    def _make_drafter(self: Any, options: SpeculationOptions, vocab_size: int) -> Drafter:
        warm_up(replace(options, method="prompt-lookup"), vocab_size)  # for what verifies
        return SelfDrafter(self)

    def load_model(self: Any, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)  # type: ignore[misc]
        self._layers = _layers_of(self.get_model())
        self.skip_search = SkipSearch(len(self._layers), self.swift)

    def initialize_kv_cache_tensors(self: Any, kv_cache_config: Any, *args: Any, **kwargs: Any) -> Any:
        self._trees = True  # for the private blocks
        caches = super().initialize_kv_cache_tensors(kv_cache_config, *args, **kwargs)
        self._trees = False
        if self.shared_kv_cache_layers or not self._scratch:
            raise ValueError(
                "speculation.method: self-drafting needs a cache of its own for every layer, all alike"
            )
        return caches

    def self_draft(self: Any, names: Sequence[str], limits: Sequence[int]) -> list[list[int]]:
        """A chain for each request (its id), of as many tokens as its limit at the most."""
        rows = np.array([self.input_batch.req_id_to_index[name] for name in names], np.int64)
        if not self.skip_search.done:
            self._try_skip_set(rows[np.array(limits) > 0])
        lengths = self.input_batch.num_tokens_no_spec[rows].astype(np.int64)
        tables = self.input_batch.block_table[0].block_table.np[rows].copy()
        wanted = np.minimum(limits, self.swift.draft_tokens).astype(np.int64)
        chains = Chains(self._reach(rows, lengths, wanted, tables), self.swift.confidence)
        tokens = self.input_batch.token_ids_cpu[rows, lengths - 1]
        positions = lengths - 1
        with skipping(self._layers, self.skip_search.skip_set):
            while len(active := chains.active):
                logits = self._forward(
                    tokens[active], positions[active], tables[active], np.ones(len(active), np.int32)
                )
                best, drafted = logits.float().max(dim=-1)
                sure = (best - logits.float().logsumexp(dim=-1)).exp()
                tokens[active] = drafted.numpy()
                positions[active] += 1
                chains.extend(drafted.numpy(), sure.numpy())
        return chains.tokens

    def _reach(
        self: Any, rows: np.ndarray, lengths: np.ndarray, wanted: np.ndarray, tables: np.ndarray
    ) -> np.ndarray:
        """How many tokens each request may draft of those it wants, int64 [requests].

        Private blocks are entered into `tables` (int32 [requests, blocks]) after a request's own.
        """
        table = self.input_batch.block_table[0]
        free = self._scratch.copy()
        limits = wanted.copy()
        for index, row in enumerate(rows):
            if not wanted[index]:
                continue
            own = int(table.num_blocks_per_row[row])
            last = int(lengths[index] + wanted[index] - 2)  # position of the last stored token
            more = min(max(last // table.block_size + 1 - own, 0), len(free))
            tables[index, own : own + more] = [free.pop() for _ in range(more)]
            room = (own + more) * table.block_size - int(lengths[index]) + 1
            limits[index] = min(int(wanted[index]), max(room, 0))
        return limits

    def _try_skip_set(self: Any, rows: np.ndarray) -> None:
        """Score the next skip set on the end of one request's text, if one has generated enough."""
        batch, search = self.input_batch, self.skip_search
        window = self.swift.context_window
        ready = rows[batch.num_tokens_no_spec[rows] - batch.num_prompt_tokens[rows] >= window]
        if not len(ready):
            return
        row = int(ready[search.iterations % len(ready)])
        stop = int(batch.num_tokens_no_spec[row]) - 1  # the last token is only predicted
        start = stop - window
        table = batch.block_table[0]
        blocks = table.block_table.np[row : row + 1].copy()
        first, last = start // table.block_size, (stop - 1) // table.block_size
        private = self._scratch[: last - first + 1]
        self._arena[:, private[0]] = self._arena[:, int(blocks[0, first])]
        blocks[0, first : last + 1] = private
        skip_set = search.propose()
        with skipping(self._layers, skip_set):
            logits = self._forward(
                batch.token_ids_cpu[row, start:stop],
                np.arange(start, stop),
                blocks,
                np.array([window], np.int32),
            )
        predicted = logits.argmax(dim=-1).to(torch.int32).numpy()
        kept = search.judge(skip_set, matchness(predicted, batch.token_ids_cpu[row, start + 1 : stop + 1]))
        self.speculation_stats.add("skip_sets_tried")
        if kept:
            self.speculation_stats.add("skip_sets_kept")
            attention, mlp = skipped_layers(skip_set)
            logger.info("skipping attention of %s and MLP of %s: %.2f agree", attention, mlp, search.score)
        if search.done:
            logger.info("the skip set stays after %d tries: %.2f agree", search.iterations, search.score)

    def _forward(
        self: Any, tokens: np.ndarray, positions: np.ndarray, tables: np.ndarray, counts: np.ndarray
    ) -> torch.Tensor:
        """Run the model as it is now; its logits, [tokens, vocabulary].

        Args:
            tokens, positions: of consecutive tokens of each request, request after request.
            tables: int32 [requests, blocks], where they are stored and what they attend to.
            counts: int32 [requests], tokens of each.
        """
        size = self.input_batch.block_table[0].block_size
        owners = np.repeat(np.arange(len(counts)), counts)
        ends = np.cumsum(counts)
        bounds = torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32))
        lengths = torch.from_numpy((positions[ends - 1] + 1).astype(np.int32))
        slots = torch.from_numpy(tables[owners, positions // size].astype(np.int64) * size + positions % size)
        at = torch.from_numpy(positions.astype(np.int64))
        common = CommonAttentionMetadata(
            query_start_loc=bounds,
            query_start_loc_cpu=bounds,
            seq_lens=lengths,
            num_reqs=len(counts),
            num_actual_tokens=len(tokens),
            max_query_len=int(counts.max()),
            max_seq_len=int(lengths.max()),
            block_table_tensor=torch.from_numpy(tables),
            slot_mapping=slots,
            causal=True,
            seq_lens_cpu_upper_bound=lengths,
            positions=at,
        )
        metadata: dict[str, Any] = {}
        for group in self.attn_groups[0]:
            metadata |= dict.fromkeys(group.layer_names, group.build_metadata(common, 0))
        slot_mapping = dict.fromkeys(metadata, slots)
        context = set_forward_context(
            metadata, self.vllm_config, num_tokens=len(tokens), slot_mapping=slot_mapping
        )
        with context, plain(self.model):
            hidden = self._model_forward(
                input_ids=torch.from_numpy(tokens.astype(np.int32)),
                positions=at,
                intermediate_tensors=None,
                inputs_embeds=None,
            )
            logits: torch.Tensor = self.model.compute_logits(hidden)
        return logits


class SelfDrafter:
    """`Drafter` over a runner that drafts itself; it learns nothing from what it is shown."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner

    def begin(self, request: int, opening: Opening) -> None:
        pass

    def observe(self, seen: Seen) -> None:
        pass

    def extend(self, request: int, tokens: np.ndarray) -> None:
        pass

    def timed(self, timing: Timing) -> None:
        pass

    def propose(self, asks: Sequence[Ask]) -> list[Draft]:
        names = {number: name for name, number in self._runner._numbers.items()}
        chains = self._runner.self_draft([names[ask.request] for ask in asks], [ask.limit for ask in asks])
        return [Draft.chain(chain) for chain in chains]

    def end(self, request: int) -> None:
        pass


@contextlib.contextmanager
def skipping(layers: Sequence[Any], skip_set: np.ndarray) -> Iterator[None]:
    """Inside, the sub-layers of `skip_set` (see `swift`) add nothing to the residual stream."""
    attention, mlp = skipped_layers(skip_set)
    skipped = [layers[index].self_attn for index in attention] + [layers[index].mlp for index in mlp]
    for module in skipped:
        module.forward = _nothing  # shadows the class's own
    try:
        yield
    finally:
        for module in skipped:
            del module.forward


def _nothing(*args: Any, **kwargs: Any) -> torch.Tensor:
    """Zeros like a sub-layer's hidden states, its only floating-point input."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return torch.zeros_like(value)
    raise TypeError("a skipped sub-layer was called without hidden states")


def _unsuited_engine(vllm_config: Any) -> str | None:
    """What self-drafting needs that this engine has not, if anything."""
    from vllm.platforms import current_platform

    model = vllm_config.model_config
    needs = (
        (current_platform.is_cpu(), "vLLM's runner V1 on a CPU"),
        (
            vllm_config.compilation_config.mode == CompilationMode.NONE,
            "a model without torch.compile, whose graph would keep every layer (compile: off)",
        ),
        (vllm_config.parallel_config.world_size == 1, "all of the model in one process"),
        (vllm_config.lora_config is None, "an engine without LoRA"),
        (vllm_config.kv_transfer_config is None, "an engine that keeps its cache to itself"),
        (
            not (model.supports_multimodal_inputs or model.uses_mrope or model.enable_prompt_embeds),
            "a model of text alone",
        ),
    )
    return next((need for met, need in needs if not met), None)


def _layers_of(model: Any) -> Sequence[Any]:
    """The decoder layers of a model whose sub-layers can be skipped.

    Raises:
        ValueError: the model is built otherwise, naming its class.
    """
    layers: Sequence[Any] = getattr(getattr(model, "model", None), "layers", ())
    alike = all(hasattr(layer, "self_attn") and hasattr(layer, "mlp") for layer in layers)
    if len(layers) < 4 or not alike:
        raise ValueError(
            "speculation.method: self-drafting needs a model of 4 or more layers, model.layers, each with "
            f"self_attn and mlp; {type(model).__name__} is built otherwise"
        )
    return layers
