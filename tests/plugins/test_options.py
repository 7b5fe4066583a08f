from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from galley_plugins.embedding.options import EmbeddingOptions
from galley_plugins.memory.options import MemoryOptions
from galley_plugins.options import PluginOptions
from galley_plugins.quantization.serving_options import ServingOptions


def configured(additional: Any) -> SimpleNamespace:
    """What a process of the engine sees of the launcher's options."""
    return SimpleNamespace(additional_config=additional)


@pytest.mark.parametrize(
    "options",
    [
        PluginOptions(),
        PluginOptions(embedding=EmbeddingOptions()),
        PluginOptions(embedding=EmbeddingOptions(method="token-prepending", exit_layer=5), step_tokens=48),
        PluginOptions(memory=(MemoryOptions("/m", "wiki", 0.5), MemoryOptions("/n", "code"))),
        PluginOptions(quantization=ServingOptions(activations="float", output_bits=None)),
        PluginOptions(
            quantization=ServingOptions(
                load={"method": "finequant", "bits": 4, "group_sizes": [64, 32]},
                rules={"*.down_proj": {"bits": 8}, "*.layers.0.*": None},
            )
        ),
    ],
)
def test_options_survive_the_way_through_a_command_line(options: PluginOptions) -> None:
    carried = json.loads(json.dumps(options.to_additional_config()))
    assert PluginOptions.from_vllm_config(configured(carried)) == options


@pytest.mark.parametrize("additional", [{}, {"another_plugin": {"generate": True}}, None, "hashable"])
def test_without_options_of_galley_every_plugin_is_off(additional: Any) -> None:
    assert not PluginOptions.from_vllm_config(configured(additional)).pools


def test_an_option_of_another_version_is_named() -> None:
    later = configured({"galley": {"generate": True, "draft": 8, "banana": 1}})
    with pytest.raises(ValueError, match=r"additional_config\.galley: unknown option banana, draft"):
        PluginOptions.from_vllm_config(later)


def test_an_unknown_method_is_refused_with_what_was_found_and_expected() -> None:
    with pytest.raises(ValueError, match=r"embedding\.method: found 'max', expected one of mean, last"):
        PluginOptions.from_vllm_config(configured({"galley": {"embedding": {"method": "max"}}}))
