from __future__ import annotations

import numpy as np
import pytest

from galley_plugins.speculation.drafting import Ask, Draft, Opening, Seen, Timing, depth_first
from galley_plugins.speculation.hybrid import PROBE, PROBED_REQUESTS, Hybrid
from galley_plugins.speculation.options import MiB, SpeculationOptions

VOCABULARY = 1000


def drafter(**options: object) -> Hybrid:
    return Hybrid(SpeculationOptions(table_bytes=MiB, **options), VOCABULARY)  # type: ignore[arg-type]


def show(drafter: Hybrid, request: int, text: list[int], token: int, others: tuple[int, ...] = ()) -> None:
    """One step without a draft: the model says `token` after `text`, then `others`."""
    tops = [token, *others, *range(900, 900 + 7 - len(others))]
    probs = [0.7, *([0.2 / max(len(others), 1)] * len(others)), *([0.001] * (7 - len(others)))]
    context = ([-1, -1, -1, *text])[-3:]
    drafter.observe(
        Seen(
            requests=np.array([request], np.int32),
            contexts=np.array([context], np.int32),
            top_tokens=np.array([tops], np.int32),
            top_probs=np.array([probs], np.float32),
            accepted=np.array([token], np.int32),
        )
    )
    drafter.extend(request, np.array([token], np.int32))


def cheap(drafter: Hybrid) -> None:
    for tokens in range(1, 34):
        drafter.timed(Timing(tokens, 1, 0.04))


def dear(drafter: Hybrid) -> None:
    for _ in range(200):
        for tokens in (1, 2, 3, 4, 6, 8, 12, 16):
            drafter.timed(Timing(tokens, 1, 0.04 * tokens))


def write(drafter: Hybrid, request: int, prompt: list[int], output: list[int], scope: int = 0) -> None:
    drafter.begin(request, Opening(np.array(prompt, np.int32), scope=scope))
    text = list(prompt)
    for token in output:
        show(drafter, request, text, token)
        text.append(token)


def propose(drafter: Hybrid, request: int, limit: int = 8, *, tree: bool = True) -> Draft:
    (draft,) = drafter.propose([Ask(request, limit, tree)])
    return draft


SENTENCE = [11, 12, 13, 14, 15, 16, 17, 18, 19, 20]


def test_what_the_model_wrote_before_is_drafted_for_another_request() -> None:
    hybrid = drafter()
    cheap(hybrid)
    for request in range(4):
        write(hybrid, request, [1, 2, 100 + request], SENTENCE)
    hybrid.begin(9, Opening(np.array([1, 2, 11, 12], np.int32)))
    draft = propose(hybrid, 9, tree=False)
    assert draft.tokens[:5].tolist() == SENTENCE[2:7]
    assert draft.is_chain


def test_the_request_s_own_text_is_drafted() -> None:
    hybrid = drafter()
    cheap(hybrid)
    hybrid.begin(0, Opening(np.array([*SENTENCE, 500, 501, *SENTENCE[:3]], np.int32)))
    assert propose(hybrid, 0, tree=False).tokens[:3].tolist() == SENTENCE[3:6]


def test_alternatives_become_branches() -> None:
    hybrid = drafter()
    cheap(hybrid)
    text = [7, 8]
    hybrid.begin(0, Opening(np.array(text, np.int32)))
    for token in np.random.default_rng(4).choice([30, 40], 40).tolist():  # the model is in two minds
        hybrid.begin(1, Opening(np.array(text, np.int32)))
        show(hybrid, 1, text, token, (30 if token == 40 else 40,))
        hybrid.end(1)
    draft = propose(hybrid, 0)
    children = draft.tokens[draft.parents == -1].tolist()
    assert set(children[:2]) == {30, 40}


def test_drafts_come_depth_first_and_are_trees() -> None:
    hybrid = drafter()
    cheap(hybrid)
    generator = np.random.default_rng(3)
    for request in range(20):
        text = generator.integers(0, 12, 60).tolist()
        write(hybrid, request, text[:5], text[5:])
    draft = propose(hybrid, 19, 16)
    assert len(draft.tokens) > 2
    assert (draft.parents < np.arange(len(draft.parents))).all()
    order, _ = depth_first(draft.parents)
    assert order.tolist() == list(range(len(order)))
    pairs = list(zip(draft.parents.tolist(), draft.tokens.tolist(), strict=True))
    assert len(set(pairs)) == len(pairs)  # no node has the same child twice


def test_nothing_is_drafted_where_it_does_not_pay() -> None:
    hybrid = drafter()
    write(hybrid, 0, [1, 2, 3], SENTENCE)
    write(hybrid, 1, [1, 2, 4], SENTENCE[:2])
    dear(hybrid)
    drafts = hybrid.propose([Ask(0, 8, True), Ask(1, 8, True)])
    assert [len(draft.tokens) for draft in drafts] == [0, 0]


def test_limits_are_kept() -> None:
    hybrid = drafter()
    cheap(hybrid)
    for request in range(3):
        write(hybrid, request, [1, 2, 3], SENTENCE * 2)
    for limit in (0, 1, 3):
        assert len(propose(hybrid, 2, limit).tokens) <= limit


def test_scopes_learn_nothing_from_each_other() -> None:
    hybrid = drafter()
    cheap(hybrid)
    for request in range(4):
        write(hybrid, request, [1, 2, 3], SENTENCE, scope=5)
    hybrid.begin(8, Opening(np.array([1, 2, 11], np.int32), scope=6))
    hybrid.begin(9, Opening(np.array([1, 2, 11], np.int32), scope=5))
    assert len(propose(hybrid, 8).tokens) == 0
    assert propose(hybrid, 9).tokens[0] == 12


def test_chances_become_what_was_accepted() -> None:
    """A source that is right half of the time is believed half of the time."""
    hybrid = drafter()
    cheap(hybrid)
    generator = np.random.default_rng(0)
    text = [5, 6, 7]
    for request in range(300):
        hybrid.begin(request, Opening(np.array(text, np.int32)))
        token = 50 if generator.random() < 0.5 else int(generator.integers(100, 900))
        show(hybrid, request, text, 50 if token == 50 else token, (50,) if token != 50 else ())
        hybrid.end(request)
    hybrid.begin(1000, Opening(np.array(text, np.int32)))
    draft = propose(hybrid, 1000)
    opened = hybrid._requests[1000]
    place = draft.tokens.tolist().index(50)
    assert opened.odds[1, place] == pytest.approx(0.5, abs=0.15)


def test_what_the_model_weighed_before_tells_equal_candidates_apart() -> None:
    """After the same text 50 or 60 follows, always the one that was second a token before."""
    hybrid = drafter()
    cheap(hybrid)
    generator = np.random.default_rng(0)
    text = [5, 6, 7]
    right = 0
    for request in range(200):
        second = 50 if generator.random() < 0.5 else 60
        hybrid.begin(request, Opening(np.array(text, np.int32)))
        show(hybrid, request, text, 8, (second,))
        if request >= 150:
            right += propose(hybrid, request, tree=False).tokens[0] == second
        show(hybrid, request, [*text, 8], second, (110 - second,))
        hybrid.end(request)
    assert right > 45


def test_a_step_with_a_tree_teaches_all_its_rows() -> None:
    hybrid = drafter()
    cheap(hybrid)
    hybrid.begin(0, Opening(np.array([1, 2], np.int32)))
    rows = [[-1, 1, 2], [1, 2, 10], [1, 2, 20]]  # last token, and two drafted children of it
    tops = np.array(
        [
            [20] + [900 + i for i in range(7)],
            [60] + [900 + i for i in range(7)],
            [70] + [900 + i for i in range(7)],
        ]
    )
    probs = np.tile(np.array([0.9, *[0.01] * 7], np.float32), (3, 1))
    hybrid.observe(
        Seen(
            np.zeros(3, np.int32), np.array(rows, np.int32), tops.astype(np.int32), probs,
            np.array([20, -1, 70], np.int32),
        )
    )  # fmt: skip
    hybrid.extend(0, np.array([20, 70], np.int32))
    assert len(hybrid._requests[0].text) == 4
    hybrid.begin(1, Opening(np.array([1, 2, 10], np.int32)))  # the rejected row's context
    assert propose(hybrid, 1, tree=False).tokens[0] == 60


def test_tokens_that_no_row_showed_still_join_the_text() -> None:
    hybrid = drafter()
    hybrid.begin(0, Opening(np.array([1, 2, 3], np.int32)))
    hybrid.extend(0, np.array([4, 5], np.int32))
    assert len(hybrid._requests[0].text) == 5
    assert hybrid._requests[0].context.tolist() == [3, 4, 5]


def test_the_table_stays_within_its_bytes() -> None:
    hybrid = drafter()
    size = sum(tensor.numel() * tensor.element_size() for tensor in hybrid.table.tensors().values())
    assert size <= MiB
    generator = np.random.default_rng(1)
    for request in range(30):
        hybrid.begin(request, Opening(generator.integers(0, VOCABULARY, 900).astype(np.int32)))
    assert len(hybrid.table) <= MiB // 76


def test_depth_first_puts_first_children_next_to_their_parents() -> None:
    r"""
    root - 0 - 2 - 4
         \   \ 3
           1 - 5
    """
    order, parents = depth_first(np.array([-1, -1, 0, 0, 2, 1], np.int32))
    assert order.tolist() == [0, 2, 4, 3, 1, 5]
    assert parents.tolist() == [-1, 0, 1, 0, -1, 4]


@pytest.mark.parametrize(("requests", "probes"), [(PROBED_REQUESTS, 2), (PROBED_REQUESTS - 1, 0)])
def test_a_batch_goes_without_drafts_now_and_then(requests: int, probes: int) -> None:
    subject = drafter()
    cheap(subject)
    for request in range(requests):
        subject.begin(request, Opening(np.array(SENTENCE * 3, np.int32)))
    asks = [Ask(request, 4, False) for request in range(requests)]
    steps = [sum(len(draft.tokens) for draft in subject.propose(asks)) for _ in range(2 * PROBE)]
    assert steps.count(0) == probes
    assert all(steps[index] == 0 for index in range(PROBE - 1, probes * PROBE, PROBE))


def test_looking_is_worth_what_drafts_bring_less_what_it_takes() -> None:
    """Free tokens of a text that repeats itself bring half as many again, and more; no room brings nothing."""
    subject = drafter()
    cheap(subject)
    subject.cost.overhead = 0.1
    subject.begin(0, Opening(np.array(SENTENCE * 3, np.int32)))
    subject.propose([Ask(0, 16, False)])
    assert subject.worth > 0.5
    subject.propose([Ask(0, 0, False)])
    assert subject.worth == pytest.approx(-0.1)
