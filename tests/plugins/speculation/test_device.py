"""Drafting by tensor operations, against the compiled loops of `tables` and examples worked by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from galley_plugins.speculation import tables
from galley_plugins.speculation.device import (
    BINS,
    WINDOW,
    DeviceDrafter,
    DeviceTable,
    blend,
    context_keys,
    scope_hashes,
    top_predictions,
)
from galley_plugins.speculation.device_steps import Rows, Texts
from galley_plugins.speculation.options import MiB, SpeculationOptions
from galley_plugins.speculation.tables import WAYS, NgramTable, context_key

unhurried = settings(deadline=None, max_examples=60)
RATES = torch.tensor([0.5, 0.6, 0.7])
TINY = 4 * WAYS * tables.ENTRY_BYTES  # four sets, so that entries give way


def drafter(method: str, most: int = 4, requests: int = 4, **options: object) -> DeviceDrafter:
    values = {"method": method, "table_bytes": MiB, **options}
    return DeviceDrafter(SpeculationOptions.from_values(values), requests=requests, most=most, device="cpu")


def texts_of(*texts: list[int], new: int = 1, longest: int = 64, sampled: bool = False) -> Texts:
    """Requests in slots 0, 1, ..., whose last `new` tokens have just come."""
    tokens = torch.full((4, longest), 9999, dtype=torch.int32)  # what lies past a text is old
    for slot, text in enumerate(texts):
        tokens[slot, : len(text)] = torch.tensor(text)
    count = len(texts)
    return Texts(
        slots=torch.arange(count),
        tokens=tokens,
        lengths=torch.tensor([len(text) for text in texts]),
        new=torch.full((count,), new),
        sampled=torch.full((count,), sampled),
    )


def rows_of(
    *rows: tuple[list[int], list[int], list[float], int], slot: int = 0, sampled: bool = False
) -> Rows:
    """Rows of (context, best tokens, their probabilities, the token that followed or -1)."""
    count = len(rows)
    tokens = torch.full((count, 8), -1)
    probs = torch.zeros((count, 8))
    for index, (_, best, mass, _) in enumerate(rows):
        tokens[index, : len(best)] = torch.tensor(best)
        probs[index, : len(best)] = torch.tensor(mass)
    return Rows(
        slots=torch.full((count,), slot),
        contexts=torch.tensor([row[0] for row in rows]),
        tokens=tokens,
        probs=probs,
        following=torch.tensor([row[3] for row in rows]),
        sampled=torch.full((count,), sampled),
    )


def chain(drafted: tuple[torch.Tensor, torch.Tensor], request: int = 0) -> list[int]:
    """The tokens of a draft that some source spoke for."""
    tokens, chances = drafted
    return [int(token) for token, chance in zip(tokens[request], chances[request], strict=True) if chance > 0]


# -- keys -----------------------------------------------------------------------------------------------------


@unhurried
@given(
    scope=st.integers(0, 2**57),
    context=st.tuples(*[st.integers(-1, 2**31 - 1)] * 2, st.integers(0, 2**31 - 1)),
)
def test_keys_are_those_of_the_compiled_table(scope: int, context: tuple[int, int, int]) -> None:
    (keys,) = context_keys(scope_hashes(torch.tensor([scope])), torch.tensor([context])).tolist()
    assert keys == [context_key(order, scope, *context) for order in (1, 2, 3)]


def test_scopes_and_orders_have_keys_of_their_own() -> None:
    scopes = torch.arange(50).repeat_interleave(20)
    contexts = torch.arange(20).repeat(50)[:, None].expand(-1, 3)
    keys = context_keys(scope_hashes(scopes), contexts)
    assert len(set(keys.flatten().tolist())) == keys.numel()


# -- the table ------------------------------------------------------------------------------------------------


def predictions(rng: np.random.Generator, vocabulary: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """int32 [8] tokens, best first, the last ones perhaps missing; float32 [8] probabilities."""
    tokens = rng.permutation(vocabulary)[:8].astype(np.int32)
    tokens[rng.integers(4, 9) :] = -1
    probs = np.sort(rng.dirichlet(np.full(8, 0.4)))[::-1].astype(np.float32)
    return tokens, probs


@pytest.mark.parametrize("budget", [TINY, MiB], ids=["entries give way", "room for all"])
def test_a_stream_of_predictions_leaves_the_table_that_the_compiled_loops_leave(budget: int) -> None:
    rng = np.random.default_rng(7)
    compiled, device = NgramTable(budget), DeviceTable(budget, "cpu")
    scoped = scope_hashes(torch.zeros(1, dtype=torch.int64))
    for _ in range(400):
        context = rng.integers(0, 6, 3).astype(np.int32)
        tokens, probs = predictions(rng)
        for order in (1, 2, 3):
            key = context_keys(scoped, torch.from_numpy(context[None].astype(np.int64)))[:, order - 1]
            compiled.clock += 1
            arrays = compiled.arrays()
            entry = tables.claim(arrays, int(key), compiled.clock)
            tables.blend(arrays, entry, tokens, probs, float(RATES[order - 1]))
            device.learn(
                key,
                torch.tensor([True]),
                torch.from_numpy(tokens)[None].long(),
                torch.from_numpy(probs)[None],
                RATES[order - 1 : order],
            )
    ours, theirs = device.table.tensors(), compiled.tensors()
    for name in ("keys", "stamps", "tokens"):
        assert torch.equal(ours[name], theirs[name]), name
    torch.testing.assert_close(ours["weights"], theirs["weights"], rtol=1e-5, atol=1e-7)
    assert len(compiled) > (10 if budget == TINY else 100)


def test_a_batch_of_different_contexts_is_learned_as_rows_in_turn() -> None:
    rng = np.random.default_rng(3)
    subject = drafter("hybrid", table_bytes=8 * MiB)
    compiled = NgramTable(8 * MiB)
    assert subject.table is not None
    for step in range(20):
        contexts = (rng.permutation(3 * 16).reshape(16, 3) + 100 * (step % 5)).astype(np.int32)
        contexts[0, :2], contexts[1, 0] = -1, -1  # a text of one token, and of two
        tops = [predictions(rng) for _ in range(16)]
        tokens, probs = np.stack([top[0] for top in tops]), np.stack([top[1] for top in tops])
        compiled.clock += 1
        scopes = np.zeros(16, np.int64)
        rates = RATES.numpy()
        tables.learn_predictions(compiled.arrays(), scopes, contexts, tokens, probs, rates, compiled.clock)
        nobody = torch.full((16,), -1)
        subject.observe(
            Rows(
                slots=torch.zeros(16, dtype=torch.int64),
                contexts=torch.from_numpy(contexts).long(),
                tokens=torch.from_numpy(tokens).long(),
                probs=torch.from_numpy(probs),
                following=nobody,
                sampled=nobody > 0,
            )
        )
    ours, theirs = subject.table.table.tensors(), compiled.tensors()
    for name in ("keys", "stamps", "tokens"):
        assert torch.equal(ours[name], theirs[name]), name
    torch.testing.assert_close(ours["weights"], theirs["weights"], rtol=1e-5, atol=1e-7)


def test_what_was_learned_is_found_and_nothing_else() -> None:
    table = DeviceTable(MiB, "cpu")
    keys = torch.tensor([5 << 12, 6 << 12, 7 << 12])
    tokens = torch.arange(24).view(3, 8)
    probs = torch.rand(3, 8)
    table.learn(keys, torch.tensor([True, False, True]), tokens, probs, torch.full((3,), 0.5))
    found, weights, known = table.find(keys)
    assert known.tolist() == [True, False, True]
    assert torch.equal(found[[0, 2]], tokens[[0, 2]])
    assert torch.equal(weights[[0, 2]], probs[[0, 2]])
    assert len(table.table) == 2


def test_of_equal_contexts_in_a_batch_the_last_counts() -> None:
    table = DeviceTable(MiB, "cpu")
    tokens = torch.arange(32).view(4, 8)
    valid = torch.tensor([True, True, True, False])
    table.learn(torch.full((4,), 99), valid, tokens, torch.full((4, 8), 0.1), torch.full((4,), 0.5))
    found, _, known = table.find(torch.tensor([99]))
    assert known.all()
    assert torch.equal(found[0], tokens[2])


def test_blending_by_hand() -> None:
    have = torch.tensor([[3, 5, -1, -1, -1, -1, -1, -1]])
    weights = torch.tensor([[0.8, 0.2, 0, 0, 0, 0, 0, 0]])
    tokens = torch.tensor([[5, 7, -1, -1, -1, -1, -1, -1]])
    probs = torch.tensor([[0.6, 0.4, 0, 0, 0, 0, 0, 0]])
    have, weights = blend(have, weights, tokens, probs, torch.tensor([0.5]))
    assert have[0, :4].tolist() == [3, 5, 7, -1]
    torch.testing.assert_close(weights[0, :4], torch.tensor([0.4, 0.4, 0.2, 0.0]))
    full = torch.arange(8)[None]
    have, weights = blend(
        full, full / 10 + 0.1, torch.tensor([[90] + [-1] * 7]), torch.ones(1, 8), torch.tensor([0.1])
    )
    assert have[0].tolist() == [
        90,
        1,
        2,
        3,
        4,
        5,
        6,
        7,
    ]  # 0 was the weakest, 0.09 after fading; 90 brings 0.1
    have, _ = blend(
        full, full / 10 + 0.1, torch.tensor([[90] + [-1] * 7]), torch.ones(1, 8), torch.tensor([0.05])
    )
    assert have[0].tolist() == list(range(8))  # 0.05 is not enough against 0.095


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_top_predictions_are_those_of_the_softmax(dtype: torch.dtype) -> None:
    logits = (torch.randn(5, 1000, generator=torch.Generator().manual_seed(1)) * 4).to(dtype)
    tokens, probs = top_predictions(logits)
    expected = logits.float().softmax(-1).topk(8)
    torch.testing.assert_close(
        probs, expected.values, rtol=0.01 if dtype == torch.bfloat16 else 1e-5, atol=1e-6
    )
    torch.testing.assert_close(logits.gather(1, tokens), logits.gather(1, expected.indices))


# -- drafts ---------------------------------------------------------------------------------------------------


def test_recycling_follows_the_best_successors_of_the_newest_predictions() -> None:
    subject = drafter("recycling")
    subject.observe(
        rows_of(
            ([0, 0, 1], [2, 8], [0.7, 0.3], -1),
            ([0, 1, 2], [3, 9], [0.6, 0.4], -1),
            ([9, 9, 3], [1], [0.5], -1),
        )
    )
    assert chain(subject.propose(texts_of([50, 1]))) == [2, 3, 1, 2]
    subject.observe(rows_of(([5, 5, 2], [8, 3], [0.9, 0.1], -1)))  # the newer prediction replaces the older
    assert chain(subject.propose(texts_of([50, 1]))) == [2, 8]
    assert chain(subject.propose(texts_of([1, 50]))) == []


def test_trigrams_look_at_two_tokens() -> None:
    subject = drafter("trigram")
    subject.observe(rows_of(([0, 1, 2], [3], [0.9], -1), ([7, 4, 2], [5], [0.9], -1)))
    drafted = subject.propose(texts_of([1, 2], [4, 2], [6, 2]))
    assert [chain(drafted, request) for request in range(3)] == [[3], [5], []]


def test_prompt_lookup_copies_what_followed_the_longest_match_and_of_those_the_latest() -> None:
    subject = drafter("prompt-lookup")
    longest = [1, 2, 3, 40, 41, 42, 43, 2, 3, 50, 51, 52, 53, 1, 2, 3]
    latest = [2, 3, 40, 41, 42, 43, 2, 3, 50, 51, 52, 53, 2, 3]
    single = [3, 40, 41, 3]
    drafted = subject.propose(texts_of(longest, latest, single))
    assert [chain(drafted, request) for request in range(3)] == [[40, 41, 42, 43], [50, 51, 52, 53], []]


def test_a_text_that_repeats_itself_is_copied_past_its_end() -> None:
    subject = drafter("prompt-lookup", most=7)
    assert chain(subject.propose(texts_of([9, 1, 2, 3, 1, 2, 3]))) == [1, 2, 3, 1, 2, 3, 1]
    assert chain(subject.propose(texts_of([9, 4, 4, 4]))) == [4] * 7


@unhurried
@given(text=st.lists(st.integers(0, 3), min_size=1, max_size=40), longest=st.sampled_from([40, 64]))
def test_prompt_lookup_is_that_of_a_search_by_hand(text: list[int], longest: int) -> None:
    expected: list[int] = []
    for size in range(min(5, len(text) - 1), 1, -1):
        ends = [
            end for end in range(size - 1, len(text) - 1) if text[end - size + 1 : end + 1] == text[-size:]
        ]
        if ends:
            copied = list(text)
            for step in range(4):
                copied.append(copied[ends[-1] + 1 + step])
            expected = copied[len(text) :]
            break
    assert chain(drafter("prompt-lookup").propose(texts_of(text, longest=longest))) == expected


def test_prompt_lookup_looks_back_no_further_than_its_window() -> None:
    subject = drafter("prompt-lookup")
    rng = np.random.default_rng(1)
    text = [7, 8, 9, *rng.integers(100, 20000, WINDOW - 5).tolist(), 7, 8]
    assert chain(subject.propose(texts_of(text, longest=3 * WINDOW))) == [9, *text[3:6]]
    text = [7, 8, 9, *rng.integers(100, 20000, WINDOW).tolist(), 7, 8]
    assert chain(subject.propose(texts_of(text, longest=3 * WINDOW))) == []


def test_hybrid_takes_the_most_confident_source_at_every_position() -> None:
    subject = drafter("hybrid")
    text = [1, 2, 3, 4, 5, 6, 30, 31, 1, 2, 3, 4, 5, 6]  # six tokens match, and 30 31 followed
    sure, unsure = [0.999], [0.3]
    subject.observe(rows_of(([4, 5, 6], [77], unsure, -1), ([5, 6, 30], [88], sure, -1)))
    # The table's doubt about 6 loses to the match; its certainty about 30 wins, and the copy ends there.
    assert chain(subject.propose(texts_of(text))) == [30, 88]


def test_longer_contexts_are_believed_more() -> None:
    subject = drafter("hybrid")
    subject.observe(
        rows_of(([9, 9, 3], [50], [0.8], -1), ([9, 2, 3], [60], [0.8], -1), ([1, 2, 3], [70], [0.8], -1))
    )
    first = [chain(subject.propose(texts_of(text)))[0] for text in ([1, 2, 3], [5, 2, 3])]
    assert first == [70, 70]  # one and two tokens of context hold the newest prediction
    subject.observe(rows_of(([6, 2, 3], [80], [0.8], -1)))
    first = [chain(subject.propose(texts_of(text)))[0] for text in ([1, 2, 3], [5, 2, 3])]
    assert first == [70, 80]


def test_confidence_goes_after_what_was_accepted() -> None:
    subject = drafter("recycling", most=1)
    row = ([0, 0, 1], [2], [0.5])
    subject.observe(rows_of((*row, -1)))
    _, before = subject.propose(texts_of([1]))
    for _ in range(300):
        subject.observe(rows_of((*row, 2)))
    _, right = subject.propose(texts_of([1]))
    _, sampled = subject.propose(texts_of([1], sampled=True))
    for _ in range(300):
        subject.observe(rows_of((*row, 3)))
    _, wrong = subject.propose(texts_of([1]))
    assert right.item() > 0.95 > before.item() > 0.05
    assert wrong.item() < right.item() / 2
    assert sampled.item() == before.item()  # sampled requests are judged apart


def test_copies_are_judged_by_the_tokens_that_came() -> None:
    subject = drafter("prompt-lookup", most=2)
    text = [1, 2, 3, 4, 1, 2]
    first = subject.propose(texts_of(text))
    assert chain(first) == [3, 4]
    for _ in range(100):
        subject.propose(texts_of(text))
        subject.propose(texts_of([*text, 3, 99], new=2))  # the first token was right, the second was not
    after = subject.propose(texts_of(text))
    assert after[1][0, 0] > first[1][0, 0]
    assert after[1][0, 1] < first[1][0, 1]


def test_requests_learn_from_their_own_scope_only() -> None:
    subject = drafter("recycling")
    subject.begin([0, 1, 2], [4, 5, 4], [4, 4, 4])
    subject.observe(rows_of(([0, 0, 1], [2], [0.9], -1)))  # slot 0
    drafted = subject.propose(texts_of([1], [1], [1]))
    assert [chain(drafted, request) for request in range(3)] == [[2], [], [2]]


def test_nothing_is_confident_past_a_requests_limit() -> None:
    subject = drafter("prompt-lookup")
    subject.begin([0, 1, 2], [0, 0, 0], [0, 3, 4])
    _, chances = subject.propose(texts_of(*[[1, 2, 3, 1, 2]] * 3))
    assert (chances > 0).sum(1).tolist() == [0, 3, 4]


def test_fewer_steps_give_the_same_first_tokens() -> None:
    subject = drafter("prompt-lookup")
    texts = texts_of([1, 2, 3, 1, 2], new=0)
    tokens, chances = subject.propose(texts)
    fewer, less = subject.propose(texts, steps=2)
    assert torch.equal(fewer[:, :2], tokens[:, :2])
    assert torch.equal(less[:, :2], chances[:, :2])
    assert fewer.shape == tokens.shape
    assert not less[:, 2:].any()
    none, _ = subject.propose(texts, steps=0)
    assert none.shape == tokens.shape


def test_a_slots_next_request_is_not_judged_by_the_copies_of_the_last_one() -> None:
    subject = drafter("prompt-lookup")
    subject.propose(texts_of([1, 2, 3, 4, 1, 2]))
    before = subject._calibration.rates.clone()
    subject.begin([0], [0], [4])
    subject.propose(texts_of([7, 9], new=1))
    assert torch.equal(subject._calibration.rates[: 2 * BINS], before[: 2 * BINS])


@pytest.mark.parametrize("method", ["recycling", "trigram", "prompt-lookup", "hybrid"])
def test_no_operation_waits_for_a_value(method: str) -> None:
    """Tensors without data raise where a value or a shape that depends on one would be read back."""
    with FakeTensorMode():
        subject = drafter(method)
        subject.begin([0, 1], [0, 0], [4, 2])
        subject.observe(rows_of(([1, 2, 3], [4], [0.5], 4), ([2, 3, 4], [5], [0.5], -1)))
        tokens, chances = subject.propose(texts_of([1, 2, 3], [4, 5]))
    assert tokens.shape == chances.shape == (2, 4)


@pytest.mark.parametrize(
    ("option", "value"),
    [("method", "self"), ("tree", "on"), ("tables", "learned.bin"), ("corpus", "table.bin")],
)
def test_what_only_the_other_runner_has_is_refused_by_name(option: str, value: str) -> None:
    with pytest.raises(ValueError, match=rf"speculation\.{option}.*runner V2"):
        drafter(**{"method": "trigram", option: value})
