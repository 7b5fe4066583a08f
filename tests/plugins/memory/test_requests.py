from __future__ import annotations

from typing import Any

import pytest

from galley_plugins.memory.requests import check_shares, memory_weights

ONE = {"memory": 0.25}
TWO = {"wiki": 0.3, "code": 0.1}


@pytest.mark.parametrize(
    ("configured", "extra", "expected"),
    [
        (ONE, None, (0.25,)),
        (ONE, {}, (0.25,)),
        (ONE, {"speculation": False}, (0.25,)),
        (ONE, {"memory_weight": 0}, (0.0,)),
        (ONE, {"memory_weight": 1}, (1.0,)),
        (ONE, {"memory_weight": 0.7}, (0.7,)),
        (ONE, {"memory_weight.memory": 0.7}, (0.7,)),
        (TWO, {}, (0.3, 0.1)),
        (TWO, {"memory_weight": 0.8}, (0.6, 0.2)),
        (TWO, {"memory_weight.code": 0.5}, (0.3, 0.5)),
        (TWO, {"memory_weight": 0, "memory_weight.code": 0.5}, (0.0, 0.5)),
        (TWO, {"memory_weight.code": 0.9, "memory_weight.wiki": 0.1}, (0.1, 0.9)),
        ({"wiki": 0.0, "code": 0.0}, {"memory_weight": 0.5}, (0.25, 0.25)),
        ({}, {"speculation": False}, ()),
        ({}, None, ()),
    ],
)
def test_a_request_may_say_how_much_of_each_memory_it_wants(
    configured: dict[str, float], extra: dict[str, Any] | None, expected: tuple[float, ...]
) -> None:
    assert memory_weights(extra, configured) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("configured", "extra", "message"),
    [
        (
            ONE,
            {"memory_weight": 1.1},
            r"vllm_xargs\.memory_weight: found 1\.1, expected a number from 0 to 1",
        ),
        (ONE, {"memory_weight": -0.1}, r"found -0\.1, expected a number from 0 to 1"),
        (ONE, {"memory_weight": float("nan")}, "found nan, expected a number from 0 to 1"),
        (ONE, {"memory_weight": "0.5"}, "found '0.5', expected a number from 0 to 1"),
        (ONE, {"memory_weight": True}, "found True, expected a number from 0 to 1"),
        (ONE, {"memory_weight": [0.5]}, r"found \[0\.5\], expected a number from 0 to 1"),
        (ONE, {"memory_weight.memory": 2}, r"memory_weight\.memory: found 2, expected"),
        (
            TWO,
            {"memory_weight.wikipedia": 0.1},
            r"found memory_weight\.wikipedia, expected memory_weight, memory_weight\.wiki, memory_weight\.code",
        ),
        (TWO, {"memory_weight.": 0.1}, r"found memory_weight\., expected"),
        (
            TWO,
            {"memory_weight.wiki": 0.95},
            r"found weights of memories that add up to 1\.05 \(wiki 0\.95, code 0\.1\), expected 1 at most",
        ),
        ({}, {"memory_weight": 0.1}, r"memory_weight: found one, expected none for a model without a memory"),
        ({}, {"memory_weight.wiki": 0.1}, r"memory_weight\.wiki: found one, expected none"),
    ],
)
def test_wrong_weights_are_named(configured: dict[str, float], extra: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        memory_weights(extra, configured)


def test_decimal_fractions_of_one_are_not_more_than_one() -> None:
    shares = {str(index): 0.1 for index in range(10)}
    check_shares(shares, "memory")
    assert sum(memory_weights({"memory_weight": 1}, shares)) == pytest.approx(1)
