from __future__ import annotations

from typing import Any

import pytest

from galley_plugins.quantization.options import QuantizationOptions


def test_options_survive_plain_values() -> None:
    options = QuantizationOptions(method="finequant", bits=8, group_sizes=(64, 32), shrink=0.9)
    assert QuantizationOptions.from_values(options.to_values()) == options


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "gptq"}, "method: found 'gptq', expected rtn, finequant, easyquant"),
        ({"bits": 3}, "bits: found 3, expected 4 or 8"),
        ({"group_size": 20}, "group size: found 20, expected a multiple of 8"),
        ({"group_sizes": [32, 64]}, r"group_sizes: found \[32, 64\], expected smaller and smaller ones"),
        ({"shrink": 1.5}, "shrink: found 1.5, expected more than 0, at most 1"),
        ({"sigma": 0}, "sigma: found 0, expected more than 0"),
        ({"steps": 0}, "steps: found 0, expected at least 1"),
        ({"sigmas": 3}, "unknown option sigmas"),
    ],
)
def test_wrong_options_are_refused_by_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantizationOptions.from_values(values)
