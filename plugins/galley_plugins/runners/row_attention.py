"""Requests of a batch that attend without a causal mask, beside others that have one.

vLLM's attention backends take one flag for each request (`CommonAttentionMetadata.causal`); its runners set
it for all. The builders of attention metadata are asked in their place.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from galley_plugins import vllm_compat

if TYPE_CHECKING:
    from collections.abc import Sequence


class RowAttention:
    """Which requests of the next step are bidirectional."""

    def __init__(self) -> None:
        vllm_compat.check("bidirectional")
        self.causal: torch.Tensor | None = None  # int32 [requests]; None: all of them

    def begin(self, bidirectional: Sequence[int], requests: int, device: Any) -> None:
        """
        Args:
            bidirectional: rows of the batch.
            requests: how many rows it has.
        """
        self.causal = None
        if bidirectional:
            causal = torch.ones(requests, dtype=torch.int32)
            causal[list(bidirectional)] = 0
            self.causal = causal.to(device)

    def attach(self, attention_groups: Sequence[Sequence[Any]]) -> None:
        """Stand before every builder of a runner's groups of attention layers."""
        for builder in {
            id(builder): builder
            for groups in attention_groups
            for group in groups
            for builder in group.metadata_builders
        }.values():
            self._wrap(builder)

    def _wrap(self, builder: Any) -> None:
        vllm_own = builder.build

        def build(common_prefix_len: int, common_attn_metadata: Any, *args: Any, **kwargs: Any) -> Any:
            causal = self.causal
            if causal is not None and common_attn_metadata.causal is True:
                padding = common_attn_metadata.num_reqs - len(causal)
                common_attn_metadata = replace(
                    common_attn_metadata, causal=torch.nn.functional.pad(causal, (0, padding), value=1)
                )
            return vllm_own(common_prefix_len, common_attn_metadata, *args, **kwargs)

        builder.build = build
