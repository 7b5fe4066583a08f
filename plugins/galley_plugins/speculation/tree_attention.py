"""vLLM's CPU attention, storing some keys and values a second time for branches (see `branches`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
)

if TYPE_CHECKING:
    import torch


@dataclass
class TreeAttentionMetadata(CPUAttentionMetadata):
    """Metadata of a step with trees.

    Attributes:
        extra_tokens: int64 [extra], tokens whose keys and values are stored again.
        extra_slots: int64 [extra], where.
    """

    extra_tokens: torch.Tensor | None = None
    extra_slots: torch.Tensor | None = None


class TreeAttentionImpl(CPUAttentionBackendImpl):
    """The same kernels; a step without trees takes vLLM's own way."""

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: CPUAttentionMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if isinstance(attn_metadata, TreeAttentionMetadata) and attn_metadata.extra_slots is not None:
            rows = attn_metadata.extra_tokens
            self.do_kv_cache_update(layer, key[rows], value[rows], kv_cache, attn_metadata.extra_slots)
        return super().forward(
            layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
        )


class TreeAttentionBackend(CPUAttentionBackend):
    """Registered in place of vLLM's CPU backend while trees are on."""

    @staticmethod
    def get_impl_cls() -> type[TreeAttentionImpl]:
        return TreeAttentionImpl
