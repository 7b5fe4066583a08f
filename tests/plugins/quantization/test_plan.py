from __future__ import annotations

import pytest

from galley_plugins.quantization.options import QuantizationOptions
from galley_plugins.quantization.plan import Plan, fused_name

EIGHT = QuantizationOptions("rtn", bits=8)


def test_linear_maps_are_quantized_and_embeddings_and_the_output_layer_are_not() -> None:
    default = QuantizationOptions()
    plan = Plan(default)
    assert plan.options_of("model.layers.3.mlp.down_proj") == default
    assert plan.options_of("lm_head") is None
    assert plan.options_of("model.embed_tokens") is None
    assert Plan(default, output_layer=True).options_of("lm_head") == default


def test_the_last_rule_that_matches_counts() -> None:
    plan = Plan(
        QuantizationOptions(), (("*.down_proj", EIGHT), ("model.layers.0.*", None), ("lm_head", EIGHT))
    )
    assert plan.options_of("model.layers.1.mlp.down_proj") == EIGHT
    assert plan.options_of("model.layers.0.mlp.down_proj") is None
    assert plan.options_of("lm_head") == EIGHT
    assert plan.unused(["model.layers.0.mlp.down_proj"]) == ["lm_head"]


def test_rules_change_the_default_they_stand_on() -> None:
    plan = Plan.from_values({"method": "finequant", "shrink": 0.9}, [("*.o_proj", {"bits": 8}), ("x", None)])
    assert plan.rules == (("*.o_proj", QuantizationOptions("finequant", bits=8, shrink=0.9)), ("x", None))


@pytest.mark.parametrize(
    ("values", "rules", "message"),
    [
        ({"bits": 5}, [], "bits: found 5"),
        ({}, [("*.up_proj", {"bitz": 4})], r"\*.up_proj: unknown option bitz"),
        ({}, [("*.up_proj", {"sigma": -1})], r"\*.up_proj: sigma: found -1"),
    ],
)
def test_wrong_options_are_named(values: dict[str, object], rules: list[object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Plan.from_values(values, rules)  # type: ignore[arg-type]


def test_maps_that_vllm_fuses_have_one_name() -> None:
    names = [f"model.layers.0.self_attn.{part}_proj" for part in "qkvo"]
    assert [fused_name(name) for name in names] == [
        *["model.layers.0.self_attn.qkv_proj"] * 3,
        "model.layers.0.self_attn.o_proj",
    ]
    assert fused_name("a.up_proj") == fused_name("a.gate_proj") != fused_name("b.up_proj")
    assert fused_name("lm_head") == "lm_head"
