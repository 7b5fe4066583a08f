from __future__ import annotations

from galley_plugins.speculation.rest import AWAKE, LEAST_REQUESTS, LONGEST, SHORTEST, Rest


def pause_after(rest: Rest, requests: int = 8, lost: float = 0.01) -> int:
    """Steps of the pause that follows as many steps without a gain as it takes."""
    for _ in range(AWAKE):
        assert not rest.pausing(requests)
        rest.looked(requests, -lost)
    length = 0
    while rest.pausing(requests):
        length += 1
    return length


def test_pauses_grow_while_nothing_is_worth_drafting_and_have_a_bound() -> None:
    rest = Rest()
    lengths = [pause_after(rest) for _ in range(6)]
    assert lengths[:3] == [SHORTEST, 2 * SHORTEST, 4 * SHORTEST]
    assert lengths[-1] == LONGEST


def test_a_pause_is_as_long_as_makes_little_of_what_looking_took() -> None:
    # Eight steps that lost 6 % each are 0.48 of a step; of 1.5 % of a step for each step, that is 32 of them.
    assert pause_after(Rest(), lost=0.06) == 32
    assert pause_after(Rest(), lost=0.5) == LONGEST


def test_a_draft_that_brings_more_than_looking_took_puts_the_next_pause_off_and_makes_it_short() -> None:
    rest = Rest()
    pause_after(rest)
    pause_after(rest)
    for _ in range(AWAKE - 1):
        rest.looked(8, -0.05)
    rest.looked(8, 0.05 * AWAKE)
    assert not rest.pausing(8)
    assert pause_after(rest) == SHORTEST


def test_drafts_that_bring_less_than_looking_took_do_not() -> None:
    rest = Rest()
    for _ in range(AWAKE - 1):
        rest.looked(8, -0.05)
    rest.looked(8, 0.05)
    assert rest.pausing(8)


def test_steps_of_few_requests_are_not_judged_with_those_of_many() -> None:
    rest = Rest()
    for _ in range(AWAKE - 1):
        rest.looked(8, -0.05)
    rest.looked(1, -0.05)
    assert pause_after(rest) == SHORTEST


def test_a_batch_that_shrinks_ends_a_pause() -> None:
    rest = Rest()
    for _ in range(AWAKE):
        rest.looked(8, 0.0)
    assert rest.pausing(8)
    assert rest.pausing(7)
    assert not rest.pausing(6)
    assert not rest.pausing(8)


def test_few_requests_are_never_left_alone() -> None:
    assert pause_after(Rest(), requests=LEAST_REQUESTS - 1) == 0
