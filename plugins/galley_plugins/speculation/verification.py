"""Which drafted tokens stand, on runner V1: the model's own samples are walked through the draft.

At every node vLLM's sampler draws the next token from the model's distribution there, as it would without
speculation; where a child of the node carries that token, the walk goes on from the child. Every token is
thus an exact sample of the model given the tokens before it. For drafts that come without a distribution of
their own this is what recursive rejection sampling amounts to (a drafted token is accepted with the
probability that the model gives it), and it needs no random number more than plain decoding: a seeded
request draws the same ones in the same order, with or without drafts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numba import njit
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.logits_processor.builtin import (
    LogitBiasLogitsProcessor,
    MinPLogitsProcessor,
    MinTokensLogitsProcessor,
)

from galley_plugins.speculation.drafting import CONTEXT

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from vllm.v1.sample.metadata import SamplingMetadata
    from vllm.v1.sample.sampler import Sampler


@dataclass(slots=True)
class StepRows:
    """The rows of a step's logits: every request's last token, then its draft's nodes, depth first.

    Attributes:
        starts: int32 [requests + 1], first row of each request.
        tokens: int32 [rows], the token that entered the model in each row.
        parents: int32 [rows], row of each node's parent; -1 for a request's first row, -2 for a node that
            must not be accepted.
    """

    starts: NDArray[np.int32]
    tokens: NDArray[np.int32]
    parents: NDArray[np.int32]

    @property
    def requests(self) -> int:
        return len(self.starts) - 1


@dataclass(slots=True)
class Verified:
    """Outcome of a step.

    Attributes:
        tokens: int32 [requests, longest], the tokens that each request gained, -1 after them.
        rows: int32 [requests, longest], the row that each was drawn from, -1 after them.
    """

    tokens: NDArray[np.int32]
    rows: NDArray[np.int32]


@njit(cache=True)
def chain_rows(
    inputs: NDArray[np.int32], counts: NDArray[np.int32], ends: NDArray[np.int32]
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
    """The rows of a step's logits where every draft is a chain.

    Args:
        inputs: int32 [>= tokens of the step], the tokens that enter the model.
        counts: int32 [requests], drafted tokens of each request, its last in this step.
        ends: int32 [requests], where each request's tokens of this step end.

    Returns:
        int32 [rows], the input that each row belongs to; and the starts, tokens and parents of `StepRows`.
    """
    starts = np.zeros(len(counts) + 1, np.int32)
    for request in range(len(counts)):
        starts[request + 1] = starts[request] + counts[request] + 1
    indices = np.empty(starts[-1], np.int32)
    tokens = np.empty(starts[-1], np.int32)
    parents = np.empty(starts[-1], np.int32)
    for request in range(len(counts)):
        for row in range(starts[request], starts[request + 1]):
            indices[row] = ends[request] - starts[request + 1] + row
            tokens[row] = inputs[indices[row]]
            parents[row] = row - 1 if row > starts[request] else -1
    return indices, starts, tokens, parents


@njit(cache=True)
def walk(
    sampled: NDArray[np.int32],
    starts: NDArray[np.int32],
    tokens: NDArray[np.int32],
    parents: NDArray[np.int32],
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Follow each request's samples through its draft.

    Args:
        sampled: int32 [rows], the token drawn at each row.
        starts, tokens, parents: see `StepRows`.

    Returns:
        tokens and rows of `Verified`.
    """
    requests = len(starts) - 1
    longest = 1
    for request in range(requests):
        longest = max(longest, starts[request + 1] - starts[request])
    gained = np.full((requests, longest), -1, np.int32)
    rows = np.full((requests, longest), -1, np.int32)
    most = 1
    for request in range(requests):
        row = starts[request]
        count = 0
        while True:
            gained[request, count] = sampled[row]
            rows[request, count] = row
            count += 1
            child = -1
            for other in range(row + 1, starts[request + 1]):
                if parents[other] == row and tokens[other] == sampled[row]:
                    child = other
                    break
            if child < 0:
                break
            row = child
        most = max(most, count)
    return gained[:, :most].copy(), rows[:, :most].copy()


@njit(cache=True)
def contexts_of(
    texts: NDArray[np.int32],
    lengths: NDArray[np.int32],
    starts: NDArray[np.int32],
    tokens: NDArray[np.int32],
    parents: NDArray[np.int32],
) -> NDArray[np.int32]:
    """The three tokens before each row's prediction, oldest first; -1 before the text. int32 [rows, 3]

    Args:
        texts: int32 [requests, width], each request's tokens.
        lengths: int32 [requests], how many of them stand.
    """
    contexts = np.full((len(tokens), CONTEXT), -1, np.int32)
    for request in range(len(starts) - 1):
        first = starts[request]
        for back in range(CONTEXT):
            index = lengths[request] - 1 - back
            if index >= 0:
                contexts[first, CONTEXT - 1 - back] = texts[request, index]
        for row in range(first + 1, starts[request + 1]):
            parent = parents[row] if parents[row] >= 0 else first
            for place in range(CONTEXT - 1):
                contexts[row, place] = contexts[parent, place + 1]
            contexts[row, CONTEXT - 1] = tokens[row]
    return contexts


@njit(cache=True)
def shown(
    texts: NDArray[np.int32],
    lengths: NDArray[np.int32],
    numbers: NDArray[np.int32],
    starts: NDArray[np.int32],
    tokens: NDArray[np.int32],
    parents: NDArray[np.int32],
    gained: NDArray[np.int32],
    gained_rows: NDArray[np.int32],
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
    """`requests`, `contexts` and `accepted` of `Seen`, for all rows of a step.

    Args:
        texts, lengths: see `contexts_of`; without the tokens of this step.
        numbers: int32 [requests], what each row of a request bears.
        starts, tokens, parents: see `StepRows`.
        gained, gained_rows: see `Verified`.
    """
    requests = np.empty(len(tokens), np.int32)
    for request in range(len(starts) - 1):
        requests[starts[request] : starts[request + 1]] = numbers[request]
    accepted = np.full(len(tokens), -1, np.int32)
    for request in range(gained.shape[0]):
        for place in range(gained.shape[1]):
            if gained_rows[request, place] >= 0:
                accepted[gained_rows[request, place]] = gained[request, place]
    return requests, contexts_of(texts, lengths, starts, tokens, parents), accepted


def verify(
    logits: torch.Tensor,
    best: NDArray[np.int32],
    rows: StepRows,
    metadata: SamplingMetadata,
    sampler: Sampler,
) -> tuple[Verified, SamplerOutput]:
    """Sample every request's next tokens.

    Args:
        logits: [rows, vocabulary]; left as they are.
        best: int32 [rows], the token of each row's largest logit.
        metadata: of the batch, one entry a request.

    Returns:
        the outcome, and the same as vLLM takes it: `sampled_token_ids` int32 [requests, longest], padded
        with -1, and log-probabilities [requests * longest, ...] where a request asked for them.
    """
    if plain_greedy(metadata):
        tokens, from_rows = walk(best, rows.starts, rows.tokens, rows.parents)
        output = SamplerOutput(sampled_token_ids=torch.from_numpy(tokens), logprobs_tensors=None)
        return Verified(tokens, from_rows), output
    return _step_by_step(logits, rows, metadata, sampler)


def plain_greedy(metadata: SamplingMetadata) -> bool:
    """Nothing but the largest logit decides, for all requests."""
    return (
        metadata.all_greedy
        and metadata.max_num_logprobs is None
        and not metadata.logprob_token_ids
        and metadata.no_penalties
        and not metadata.bad_words_token_ids
        and metadata.allowed_token_ids_mask is None
        and not _thinking(metadata)
        and all(map(_idle, metadata.logitsprocs.non_argmax_invariant))
    )


def _thinking(metadata: SamplingMetadata) -> bool:
    holder = metadata.thinking_budget_state_holder
    return holder is not None and bool(holder.has_tracked_requests())


def _idle(processor: Any) -> bool:
    if isinstance(processor, MinTokensLogitsProcessor):
        return not processor.min_toks
    if isinstance(processor, LogitBiasLogitsProcessor):
        return not processor.biases
    return isinstance(processor, MinPLogitsProcessor)


def _step_by_step(
    logits: torch.Tensor, rows: StepRows, metadata: SamplingMetadata, sampler: Sampler
) -> tuple[Verified, SamplerOutput]:
    """One call of vLLM's sampler for each depth, for the requests that are still on their draft's path."""
    requests = rows.requests
    longest = int(np.diff(rows.starts).max())
    tokens = np.full((requests, longest), -1, np.int32)
    from_rows = np.full((requests, longest), -1, np.int32)
    at = rows.starts[:-1].astype(np.int64)
    active = np.arange(requests)
    parts: list[tuple[NDArray[np.int64], LogprobsTensors]] = []
    depth = 0
    while len(active):
        chosen = metadata if depth == 0 else _narrow(metadata, active, tokens[:, :depth])
        output = sampler(logits=logits[torch.from_numpy(at)].clone(), sampling_metadata=chosen)
        drawn = output.sampled_token_ids[:, 0].numpy()
        tokens[active, depth] = drawn
        from_rows[active, depth] = at
        if output.logprobs_tensors is not None:
            parts.append((active, output.logprobs_tensors))
        onward, rows_onward = [], []
        for index, request in enumerate(active):
            for row in range(at[index] + 1, rows.starts[request + 1]):
                if rows.parents[row] == at[index] and rows.tokens[row] == drawn[index]:
                    onward.append(request)
                    rows_onward.append(row)
                    break
        active, at = np.array(onward, np.int64), np.array(rows_onward, np.int64)
        depth += 1
    tokens, from_rows = tokens[:, :depth].copy(), from_rows[:, :depth].copy()
    logprobs = _assemble(parts, requests, depth) if parts else None
    result = SamplerOutput(sampled_token_ids=torch.from_numpy(tokens), logprobs_tensors=logprobs)
    return Verified(tokens, from_rows), result


def _narrow(
    metadata: SamplingMetadata, active: NDArray[np.int64], gained: NDArray[np.int32]
) -> SamplingMetadata:
    """The metadata of some of the batch's requests, which have gained tokens in this step already.

    Requests with state outside these tensors (`min_p`, logit bias, minimum lengths, thinking budgets, custom
    processors) are not drafted for, so the batch's processors have nothing to do here.
    """
    index = torch.from_numpy(active)

    def rows_of(values: torch.Tensor | None) -> torch.Tensor | None:
        return None if values is None else values[index]

    temperature = rows_of(metadata.temperature)
    greedy = metadata.all_greedy or (temperature is not None and bool(torch.all(temperature < 1e-5)))
    outputs = metadata.output_token_ids
    return replace(
        metadata,
        temperature=temperature,
        all_greedy=greedy,
        all_random=not greedy and metadata.all_random,
        top_p=rows_of(metadata.top_p),
        top_k=rows_of(metadata.top_k),
        generators={
            place: metadata.generators[int(request)]
            for place, request in enumerate(active)
            if int(request) in metadata.generators
        },
        prompt_token_ids=rows_of(metadata.prompt_token_ids),
        frequency_penalties=_some(metadata.frequency_penalties, index),
        presence_penalties=_some(metadata.presence_penalties, index),
        repetition_penalties=_some(metadata.repetition_penalties, index),
        output_token_ids=[[*outputs[request], *gained[request].tolist()] for request in active]
        if outputs
        else outputs,
        allowed_token_ids_mask=rows_of(metadata.allowed_token_ids_mask),
        bad_words_token_ids={
            place: metadata.bad_words_token_ids[int(request)]
            for place, request in enumerate(active)
            if int(request) in metadata.bad_words_token_ids
        },
        logitsprocs=LogitsProcessors(),
        logprob_token_ids=None,
        spec_token_ids=None,
        thinking_budget_state_holder=None,
    )


def _some(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return values[index] if values.numel() else values


def _assemble(
    parts: list[tuple[NDArray[np.int64], LogprobsTensors]], requests: int, longest: int
) -> LogprobsTensors:
    """Log-probabilities by request and place, from those of each depth."""
    columns: list[torch.Tensor] = []
    for name in ("logprob_token_ids", "logprobs", "selected_token_ranks"):
        first = getattr(parts[0][1], name)
        if first.numel() == 0:
            columns.append(first)
            continue
        whole = first.new_zeros((requests, longest, *first.shape[1:]))
        for depth, (active, tensors) in enumerate(parts):
            whole[torch.from_numpy(active), depth] = getattr(tensors, name)
        columns.append(whole.flatten(0, 1))
    return LogprobsTensors(*columns)
