"""Sampling along drafts: token for token what vLLM's sampler gives without them, and the model's distribution."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler

from galley_plugins.speculation import verification
from galley_plugins.speculation.verification import (
    StepRows,
    chain_rows,
    contexts_of,
    walk,
)

VOCABULARY = 12


def verify(logits: torch.Tensor, *rest: Any) -> Any:
    return verification.verify(logits, logits.argmax(-1).int().numpy(), *rest)


def metadata(requests: int, temperature: float = 0.0, **fields: Any) -> SamplingMetadata:
    greedy = temperature == 0
    zeros, ones = torch.zeros(requests), torch.ones(requests)
    values: dict[str, Any] = {
        "temperature": None if greedy else torch.full((requests,), temperature),
        "all_greedy": greedy,
        "all_random": not greedy,
        "top_p": None,
        "top_k": None,
        "generators": {},
        "max_num_logprobs": None,
        "no_penalties": True,
        "prompt_token_ids": None,
        "frequency_penalties": zeros,
        "presence_penalties": zeros,
        "repetition_penalties": ones,
        "output_token_ids": [[] for _ in range(requests)],
        "allowed_token_ids_mask": None,
        "bad_words_token_ids": {},
        "logitsprocs": LogitsProcessors(),
    }
    return SamplingMetadata(**{**values, **fields})


class Model:
    """A target over 12 tokens: the distribution of the next one depends on the last two."""

    def __init__(self, seed: int = 0, sharpness: float = 1.5) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.logits = sharpness * torch.randn(VOCABULARY, VOCABULARY, VOCABULARY, generator=generator)

    def __call__(self, text: list[int]) -> torch.Tensor:
        return self.logits[text[-2], text[-1]]


def rows_of(drafts: list[tuple[list[int], list[int]]], lasts: list[int]) -> StepRows:
    """Rows of a step: for each request its draft's tokens and parents (by node), and its last token."""
    starts, tokens, parents = [0], [], []
    for (nodes, above), last in zip(drafts, lasts, strict=True):
        first = len(tokens)
        tokens += [last, *nodes]
        parents += [-1, *(first + 1 + parent for parent in above)]
        starts.append(len(tokens))
    return StepRows(np.array(starts, np.int32), np.array(tokens, np.int32), np.array(parents, np.int32))


def path_to(row: int, rows: StepRows) -> list[int]:
    tokens = []
    while row >= 0:
        tokens.append(int(rows.tokens[row]))
        row = int(rows.parents[row])
    return tokens[::-1]


def logits_at(model: Model, rows: StepRows, texts: list[list[int]]) -> torch.Tensor:
    """The model's logits after every row, given each request's text before its last token."""
    found = [
        model([*text, *path_to(row, rows)])
        for request, text in enumerate(texts)
        for row in range(rows.starts[request], rows.starts[request + 1])
    ]
    return torch.stack(found)


TREE = ([3, 5, 7, 4, 3], [-1, 0, 1, -1, 3])  # 3 -> 5 -> 7, and 4 -> 3


def test_rows_are_those_that_vllm_asks_logits_for() -> None:
    """vLLM's own example, in `GPUModelRunner._calc_spec_decode_metadata`."""
    counts = np.array([3, 0, 2, 0, 1], np.int32)
    ends = np.array([4, 104, 107, 207, 209], np.int32)
    inputs = 1000 + np.arange(300, dtype=np.int32)
    indices, starts, tokens, parents = chain_rows(inputs, counts, ends)
    assert indices.tolist() == [0, 1, 2, 3, 103, 104, 105, 106, 206, 207, 208]
    assert starts.tolist() == [0, 4, 5, 8, 9, 11]
    assert tokens.tolist() == [1000 + index for index in indices]
    assert parents.tolist() == [-1, 0, 1, 2, -1, -1, 5, 6, -1, -1, 9]
    assert {array.dtype for array in (indices, starts, tokens, parents)} == {np.dtype(np.int32)}


def test_the_walk_takes_the_branch_that_the_samples_name() -> None:
    rows = rows_of([TREE], [1])
    sampled = np.array([4, 0, 0, 0, 3, 9], np.int32)  # 4 after the last token, 3 after 4, then 9
    tokens, taken = walk(sampled, rows.starts, rows.tokens, rows.parents)
    assert tokens.tolist() == [[4, 3, 9]]
    assert taken.tolist() == [[0, 4, 5]]


def test_the_walk_ends_where_no_child_fits_and_pads() -> None:
    rows = rows_of([TREE, ([], []), ([2], [-1])], [1, 1, 1])
    sampled = np.array([3, 6, 0, 0, 0, 0, 8, 2, 11], np.int32)
    tokens, taken = walk(sampled, rows.starts, rows.tokens, rows.parents)
    assert tokens.tolist() == [[3, 6], [8, -1], [2, 11]]
    assert taken.tolist() == [[0, 1], [6, -1], [7, 8]]


def test_nodes_marked_as_unusable_are_never_accepted() -> None:
    rows = rows_of([([3], [-1])], [1])
    rows.parents[1] = -2
    tokens, _ = walk(np.array([3, 4], np.int32), rows.starts, rows.tokens, rows.parents)
    assert tokens.tolist() == [[3]]


@pytest.mark.parametrize("seed", range(5))
def test_greedy_outputs_are_the_model_s_own(seed: int) -> None:
    model = Model(seed)
    text = [0, 1]
    expected = list(text)
    for _ in range(6):
        expected.append(int(model(expected).argmax()))
    right = expected[2:5]
    wrong = (right[0] + 1) % VOCABULARY
    drafts = [([*right, wrong], [-1, 0, 1, -1]), ([wrong, right[0]], [-1, -1]), ([], [])]
    rows = rows_of(drafts, [1, 1, 1])
    verified, output = verify(logits_at(model, rows, [[0]] * 3), rows, metadata(3), Sampler())
    for request, gain in ((0, 4), (1, 2), (2, 1)):
        got = verified.tokens[request][verified.tokens[request] >= 0].tolist()
        assert got == expected[2 : 2 + gain]
    assert output.sampled_token_ids.dtype == torch.int32


@pytest.mark.parametrize("draft", [([], []), ([3, 5], [-1, 0]), TREE, ([0, 1, 2, 3, 4, 5, 6, 7], [-1] * 8)])
def test_sampled_outputs_follow_the_model_s_distribution(draft: tuple[list[int], list[int]]) -> None:
    """Two tokens of many sampled runs, through a draft and the steps after it, against the exact joint."""
    model, count = Model(3), 6000
    rows = rows_of([draft], [1])
    logits = logits_at(model, rows, [[0]])
    torch.manual_seed(5)
    seen = np.zeros((VOCABULARY, VOCABULARY))
    many = StepRows(
        starts=np.concatenate([[0], np.arange(1, count + 1) * len(rows.tokens)]).astype(np.int32),
        tokens=np.tile(rows.tokens, count),
        parents=np.concatenate([np.where(rows.parents < 0, -1, rows.parents + i * len(rows.tokens)) for i in range(count)]).astype(np.int32),
    )  # fmt: skip
    verified, _ = verify(logits.repeat(count, 1), many, metadata(count, 0.9), Sampler())
    second = Sampler()
    for tokens in verified.tokens:
        got = [int(token) for token in tokens if token >= 0][:2]
        if len(got) < 2:  # the next step draws it
            single = second(logits=model([1, got[0]])[None].clone(), sampling_metadata=metadata(1, 0.9))
            got.append(int(single.sampled_token_ids[0, 0]))
        seen[got[0], got[1]] += 1
    first = torch.softmax(model([0, 1]) / 0.9, -1)
    joint = torch.stack(
        [first[token] * torch.softmax(model([1, token]) / 0.9, -1) for token in range(VOCABULARY)]
    )
    expected = joint.double().numpy().ravel() * count
    likely = expected >= 5
    observed = np.append(seen.ravel()[likely], seen.ravel()[~likely].sum())
    wanted = np.append(expected[likely], expected[~likely].sum())
    assert stats.chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue > 1e-3


def test_a_seeded_request_draws_the_same_tokens_with_any_draft() -> None:
    model = Model(7)
    text = [0, 1]

    def generate(drafts: list[tuple[list[int], list[int]]], length: int = 12) -> list[int]:
        generator = torch.Generator().manual_seed(11)
        tokens = list(text)
        step = 0
        while len(tokens) < length:
            draft = drafts[step % len(drafts)]
            rows = rows_of([draft], [tokens[-1]])
            verified, _ = verify(
                logits_at(model, rows, [tokens[:-1]]),
                rows,
                metadata(1, 1.0, generators={0: generator}),
                Sampler(),
            )
            tokens += [int(token) for token in verified.tokens[0] if token >= 0]
            step += 1
        return tokens[:length]

    plain = generate([([], [])])
    guesses = [(list(range(VOCABULARY)), [-1] * VOCABULARY), TREE, ([], []), ([plain[2]], [-1])]
    assert generate(guesses) == plain


def test_penalties_see_the_tokens_of_the_path() -> None:
    """With a presence penalty no token comes twice, whether its first time was in this step or before."""
    logits = torch.zeros(3, VOCABULARY)
    logits[:, 4] = 2.0  # 4 is always best, then 6
    logits[:, 6] = 1.0
    rows = rows_of([([4, 6], [-1, 0])], [1])
    penalised = metadata(
        1, no_penalties=False, presence_penalties=torch.tensor([5.0]), output_token_ids=[[1]],
        prompt_token_ids=torch.full((1, 1), VOCABULARY),
    )  # fmt: skip
    verified, _ = verify(logits, rows, penalised, Sampler())
    assert verified.tokens[0].tolist()[:2] == [4, 6]
    assert verified.tokens[0, 2] not in (1, 4, 6)


def test_log_probabilities_belong_to_their_tokens() -> None:
    model = Model(2)
    first = int(model([0, 1]).argmax())
    second = int(model([1, first]).argmax())
    rows = rows_of([([first, second], [-1, 0]), ([], [])], [1, 1])
    logits = logits_at(model, rows, [[0], [5]])
    verified, output = verify(logits, rows, metadata(2, max_num_logprobs=2), Sampler())
    longest = verified.tokens.shape[1]
    found = output.logprobs_tensors
    assert found is not None
    for request in range(2):
        for place, (token, row) in enumerate(
            zip(verified.tokens[request], verified.rows[request], strict=True)
        ):
            if token < 0:
                continue
            at = request * longest + place
            assert found.logprob_token_ids[at, 0] == token
            expected = torch.log_softmax(logits[row], -1)[token]
            assert found.logprobs[at, 0] == pytest.approx(float(expected), abs=1e-5)


def test_logits_are_left_as_they_are() -> None:
    model = Model(1)
    rows = rows_of([TREE], [1])
    logits = logits_at(model, rows, [[0]])
    before = logits.clone()
    verify(logits, rows, metadata(1, 0.5, top_k=torch.tensor([3])), Sampler())
    assert torch.equal(logits, before)


def test_contexts_follow_the_path() -> None:
    texts = np.array([[10, 11, 12, 0, 0], [20, 0, 0, 0, 0]], np.int32)
    rows = rows_of([TREE, ([8], [-1])], [12, 20])
    found = contexts_of(texts, np.array([3, 1], np.int32), rows.starts, rows.tokens, rows.parents)
    assert found.tolist() == [
        [10, 11, 12], [11, 12, 3], [12, 3, 5], [3, 5, 7], [11, 12, 4], [12, 4, 3],
        [-1, -1, 20], [-1, 20, 8],
    ]  # fmt: skip
