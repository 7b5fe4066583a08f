from __future__ import annotations

import itertools
import random

import pytest
import torch

from galley_plugins.quantization.budget import Way, hull, plan_for, spread, ways
from galley_plugins.quantization.options import QuantizationOptions
from galley_plugins.quantization.plan import Plan
from galley_plugins.quantization.quantizer import quantize
from galley_plugins.quantization.sensitivity import Sensitivity

SOME = QuantizationOptions("rtn", group_size=32)


def way(bits: float, error: float) -> Way:
    return Way(bits, error, SOME)


def test_ways_above_the_hull_are_left_out() -> None:
    found = [way(4, 10), way(5, 9), way(6, 2), way(7, 5), way(8, 1), way(6, 3)]
    assert hull(found) == [way(4, 10), way(6, 2), way(8, 1)]


def test_bits_go_where_they_take_away_most() -> None:
    choices = {"a": [way(4, 10), way(6, 2), way(8, 1)], "b": [way(4, 4), way(6, 1), way(8, 0)]}
    assert {name: each.bits for name, each in spread(choices, 10).items()} == {"a": 6, "b": 4}
    assert {name: each.bits for name, each in spread(choices, 12).items()} == {"a": 6, "b": 6}
    assert {name: each.bits for name, each in spread(choices, 99).items()} == {"a": 8, "b": 8}
    with pytest.raises(ValueError, match="found a budget of 7 bits, expected at least 8"):
        spread(choices, 7)


def test_a_spread_is_no_further_from_the_best_than_one_step() -> None:
    """By enumeration; the best of whole steps may leave one out for two others."""
    rng = random.Random(3)
    for _ in range(20):
        choices = {
            name: [way(bits, rng.random() * 8 / bits) for bits in (2, 3, 5, 8)] for name in ("a", "b", "c")
        }
        step = max(
            one.error - other.error
            for each in choices.values()
            for one, other in itertools.pairwise(hull(each))
        )
        last = float("inf")
        for budget in (6, 9, 14, 24):
            found = spread(choices, budget).values()
            error = sum(each.error for each in found)
            assert sum(each.bits for each in found) <= budget
            best = min(
                sum(each.error for each in some)
                for some in itertools.product(*choices.values())
                if sum(each.bits for each in some) <= budget
            )
            assert best <= error + 1e-9 <= best + step + 2e-9
            assert error <= last
            last = error
        assert error == pytest.approx(best)  # where all is affordable


@pytest.mark.parametrize("inputs", [576, 1536, 100])
def test_a_large_budget_gives_every_input_dimension_8_bits(inputs: int) -> None:
    weights = torch.randn(16, inputs, generator=torch.Generator().manual_seed(2))
    plan = plan_for([["a.weight"]], lambda _: weights, Plan(SOME), 8.5)
    chosen = plan.options_of("a")
    assert chosen is not None
    assert chosen.bits == 8


def test_errors_fall_with_bits_and_outliers() -> None:
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(32, 128, generator=generator)
    weights[::7, ::31] *= 9
    candidates = [
        QuantizationOptions("rtn", group_size=128),
        QuantizationOptions("easyquant", group_size=128),
        QuantizationOptions("rtn", bits=8, group_size=128),
        QuantizationOptions("rtn", group_size=48),  # divides nothing here
    ]
    plain, apart, eight = ways([weights], candidates)
    assert plain.bits == weights.numel() * (4 + 16 / 128)
    assert eight.bits == weights.numel() * (8 + 16 / 128)
    assert eight.error < apart.error < plain.error
    with pytest.raises(
        ValueError, match=r"found an input dimension of 128, expected a multiple of one of \[48\]"
    ):
        ways([weights], candidates[3:])


def test_a_plan_keeps_to_its_bits() -> None:
    generator = torch.Generator().manual_seed(2)
    tensors = {f"{name}.weight": torch.randn(16, 128, generator=generator) for name in "abc"}
    tensors["b.weight"][0, 0] = 50.0
    candidates = [
        QuantizationOptions("rtn", group_size=128),
        QuantizationOptions("rtn", group_size=32),
        QuantizationOptions("rtn", bits=8, group_size=128),
    ]
    groups = [["a.weight", "b.weight"], ["c.weight"]]
    plan = plan_for(groups, tensors.__getitem__, Plan(SOME), 5.8, candidates=candidates)
    # 8 bits for the two that are fused would be 6.9 for each weight, for the third it is 5.7.
    assert [plan.options_of(name) for name in "abc"] == [candidates[1], candidates[1], candidates[2]]
    with pytest.raises(ValueError, match=r"target bits: found 4.0, expected at least 4.12"):
        plan_for(groups, tensors.__getitem__, Plan(SOME), 4.0, candidates=candidates)


def test_where_costs_are_known_bits_go_to_what_costs_most() -> None:
    generator = torch.Generator().manual_seed(2)
    tensors = {f"{name}.weight": torch.randn(16, 128, generator=generator) for name in "ab"}
    candidates = [
        QuantizationOptions("rtn", group_size=128),
        QuantizationOptions("rtn", bits=8, group_size=128),
    ]
    for loud in "ab":
        known = {
            name: Sensitivity(torch.ones(128), torch.full((16,), 9.0 if name == loud else 1.0))
            for name in "ab"
        }
        groups = [["a.weight"], ["b.weight"]]
        plan = plan_for(
            groups, tensors.__getitem__, Plan(SOME), 6.2, candidates=candidates, sensitivities=known
        )
        bits = {name: options.bits for name in "ab" if (options := plan.options_of(name)) is not None}
        assert bits == {name: 8 if name == loud else 4 for name in "ab"}
        weights = tensors["a.weight"]
        four, _ = ways([weights], candidates, [known["a"]])
        off = (quantize(weights, candidates[0]).dequantize() - weights).square().sum()
        assert four.error == pytest.approx(float(off * known["a"].outputs[0]) / 2, rel=1e-5)
