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
    self_drafting = options.speculation is not None and options.speculation.method == "self"
    if self_drafting and v2:
        raise ValueError("speculation.method: self-drafting needs vLLM's runner V1, this engine runs V2")
    if options.speculation is not None and v2:
        from galley_plugins.runners.speculation_v2 import SpeculationV2

        mixins.append(SpeculationV2)  # before embedding, to see which rows it drops
    if options.pools:
        if v2:
            from galley_plugins.runners.v2 import EmbeddingV2

            mixins.append(EmbeddingV2)
        else:
            from galley_plugins.runners.v1 import EmbeddingV1

            mixins.append(EmbeddingV1)
    if self_drafting:
        from galley_plugins.runners.self_speculation_v1 import SelfSpeculationV1

        mixins.append(SelfSpeculationV1)
    elif options.speculation is not None and not v2:
        from galley_plugins.runners.speculation_v1 import SpeculationV1

        mixins.append(SpeculationV1)  # after embedding, whose rows are dropped before anything is drafted
    if options.memory:
        if v2:
            from galley_plugins.runners.memory_v2 import MemoryV2

            mixins.append(MemoryV2)
        else:
            from galley_plugins.runners.memory_v1 import MemoryV1

            mixins.append(MemoryV1)  # last, so that the others reach into the model that mixes
    if not mixins:
        return base
    return type(f"Galley{base.__name__}", (*mixins, base), {})
