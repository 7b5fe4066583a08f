"""Builds a runner class from vLLM's own and the mixins that the options ask for.

A plugin that needs a runner adds its pair of mixins here; their order is the order in which they see a call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from galley_plugins import vllm_compat

if TYPE_CHECKING:
    from galley_plugins.options import PluginOptions


def compose_runner(base: type[Any], options: PluginOptions, *, v2: bool) -> type[Any]:
    """Subclass `base`, a vLLM model runner V1 or V2, with every mixin that `options` switches on."""
    vllm_compat.check("runner-v2" if v2 else "runner-v1")
    mixins: list[type[Any]] = []
    if options.embed:
        if v2:
            from galley_plugins.runners.v2 import EmbeddingV2

            mixins.append(EmbeddingV2)
        else:
            from galley_plugins.runners.v1 import EmbeddingV1

            mixins.append(EmbeddingV1)
    if not mixins:
        return base
    return type(f"Galley{base.__name__}", (*mixins, base), {})
