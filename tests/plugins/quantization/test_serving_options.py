from __future__ import annotations

from typing import Any

import pytest

from galley_plugins.quantization.options import QuantizationOptions
from galley_plugins.quantization.serving_options import ServingOptions


def test_without_a_method_nothing_is_quantized_while_loading() -> None:
    assert ServingOptions.from_values({}).plan() is None
    assert ServingOptions.from_values({"activations": "float"}) == ServingOptions(activations="float")


def test_a_method_and_rules_are_a_plan() -> None:
    options = ServingOptions.from_values(
        {"method": "easyquant", "sigma": 2.5, "rules": {"*.o_proj": {"bits": 8}, "*.layers.0.*": None}}
    )
    plan = options.plan()
    assert plan is not None
    assert plan.options_of("model.layers.1.mlp.up_proj") == QuantizationOptions("easyquant", sigma=2.5)
    assert plan.options_of("model.layers.1.self_attn.o_proj") == QuantizationOptions(
        "easyquant", bits=8, sigma=2.5
    )
    assert plan.options_of("model.layers.0.self_attn.o_proj") is None


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"banana": 1}, "unknown option banana"),
        ({"activations": "int4"}, "activations: found 'int4', expected integer, float"),
        ({"output_bits": 4}, "output_bits: found 4, expected 8 or null"),
        ({"bits": 8}, "bits: found without a method"),
        ({"rules": {"*": None}}, "rules: found some without a method"),
        ({"method": "gptq"}, "method: found 'gptq', expected rtn, finequant"),
        ({"method": "rtn", "rules": {"*.o_proj": {"bit": 8}}}, r"\*\.o_proj: unknown option bit"),
    ],
)
def test_what_is_wrong_is_named(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ServingOptions.from_values(values)
