"""NV-Embed's latent-attention pooling (arXiv 2405.17428, section 3.1).

Each token's hidden state looks into a trained dictionary of latents by cross-attention and passes through an
MLP; the mean over the text's tokens is the vector. Names and shapes are the public checkpoint's.

The queries see the same keys and values for every text, so `fold` multiplies both projections into them once:
a head's scores are norm(x) Wq^T (norm_c(L) Wk^T)^T = norm(x) M with M [d, latents], and its output is
softmax(scores) norm_c(L) Wv^T Wo^T = softmax(scores) N with N [latents, d]. With d = 4096 and 512 latents,
that is an eighth of the multiplications and a tenth of the memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Mapping

PREFIX = "latent_attention_model."
EPSILON = 1e-5


class _Normed(nn.Module):
    """A block with a layer norm before it, and one for what it attends to."""

    def __init__(self, size: int, fn: nn.Module, context: int | None = None) -> None:
        super().__init__()
        self.fn = fn
        self.norm = nn.LayerNorm(size, eps=EPSILON)
        if context is not None:
            self.norm_context = nn.LayerNorm(context, eps=EPSILON)


class _CrossAttention(nn.Module):
    def __init__(self, size: int, heads: int, head_size: int) -> None:
        super().__init__()
        self.heads, self.head_size = heads, head_size
        self.to_q = nn.Linear(size, heads * head_size, bias=False)
        self.to_kv = nn.Linear(size, 2 * heads * head_size, bias=False)
        self.to_out = nn.Linear(heads * head_size, size, bias=False)

    def forward(self, rows: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        keys, values = self.to_kv(context).chunk(2, dim=-1)
        heads = [self._split(part) for part in (self.to_q(rows), keys, values)]
        found = functional.scaled_dot_product_attention(*heads)  # [heads, tokens, head_size]
        return self.to_out(found.transpose(0, 1).flatten(1))

    def _split(self, rows: torch.Tensor) -> torch.Tensor:
        """[rows, heads * head_size] as [heads, rows, head_size]."""
        return rows.unflatten(-1, (self.heads, self.head_size)).transpose(0, 1)


class _FeedForward(nn.Module):
    """An MLP with GEGLU; its layers are numbers 0 and 2 of the checkpoint."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(size, 8 * size), _Geglu(), nn.Linear(4 * size, size))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.net(rows)


class _Geglu(nn.Module):
    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        values, gates = rows.chunk(2, dim=-1)
        return values * functional.gelu(gates)


class LatentAttention(nn.Module):
    """The head as it is trained and stored.

    Args:
        size: d, the model's hidden size.
        latents: rows of the dictionary.
        heads: of the cross-attention.
        head_size: of each; the public checkpoint's is d.
    """

    def __init__(self, size: int, latents: int = 512, heads: int = 8, head_size: int | None = None) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(latents, size))
        attention = _CrossAttention(size, heads, head_size or size)
        self.cross_attend_blocks = nn.ModuleList(
            [_Normed(size, attention, context=size), _Normed(size, _FeedForward(size))]
        )

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor], heads: int) -> LatentAttention:
        """Build from tensors by the checkpoint's names, with or without its prefix.

        Raises:
            ValueError: a tensor is missing, too many, or of another shape.
        """
        own = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
        try:
            latents, size = own["latents"].shape
            inner = own["cross_attend_blocks.0.fn.to_q.weight"].shape[0]
        except KeyError as error:
            raise ValueError(f"latent attention: found no tensor {PREFIX}{error.args[0]}") from None
        with torch.device("meta"):
            module = cls(size, latents, heads, inner // heads)
        try:
            module.load_state_dict(own, assign=True)
        except RuntimeError as error:
            raise ValueError(f"latent attention: {' '.join(str(error).split())}") from None
        return module.requires_grad_(False)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """[tokens, d] to [tokens, d], each token by itself."""
        attend, feed = self.cross_attend_blocks
        rows = rows + attend.fn(attend.norm(rows), attend.norm_context(self.latents))
        return rows + feed.fn(feed.norm(rows))

    @torch.no_grad()
    def fold(self) -> FoldedLatentAttention:
        attend = self.cross_attend_blocks[0]
        fn = attend.fn
        context = attend.norm_context(self.latents.float())
        keys, values = fn.to_kv.weight.float().chunk(2)  # [heads * head_size, d]
        shape = (fn.heads, fn.head_size, -1)
        queries = fn.to_q.weight.float().reshape(shape)  # [heads, head_size, d]
        outputs = fn.to_out.weight.float().T.reshape(shape)
        scale = fn.head_size**-0.5
        into = torch.stack([
            scale * (query.T @ (key @ context.T))
            for query, key in zip(queries, keys.reshape(shape), strict=True)
        ])  # [heads, d, latents]  # fmt: skip
        out = torch.stack([
            (context @ value.T) @ output
            for value, output in zip(values.reshape(shape), outputs, strict=True)
        ])  # [heads, latents, d]  # fmt: skip
        return FoldedLatentAttention(self, into, out)


class FoldedLatentAttention(nn.Module):
    """The same function with the dictionary multiplied into the projections, to serve with.

    Args:
        into: [heads, d, latents]
        out: [heads, latents, d]
    """

    def __init__(self, head: LatentAttention, into: torch.Tensor, out: torch.Tensor) -> None:
        super().__init__()
        attend, feed = head.cross_attend_blocks
        self.norm, self.feed_norm, self.feed = attend.norm, feed.norm, feed.fn
        heads, size, latents = into.shape
        self._heads = heads
        self.into = nn.Parameter(into.transpose(0, 1).reshape(size, heads * latents).contiguous(), False)
        self.out = nn.Parameter(out.reshape(heads * latents, size).contiguous(), False)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """[tokens, d] to [tokens, d]."""
        scores = (self.norm(rows) @ self.into).unflatten(-1, (self._heads, -1))
        rows = rows + scores.softmax(-1, torch.float32).to(rows.dtype).flatten(1) @ self.out
        return rows + self.feed(self.feed_norm(rows))
