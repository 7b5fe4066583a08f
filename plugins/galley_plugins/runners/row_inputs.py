"""Rows of a step whose embedding is not that of a token: special and contextual tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class RowInputs:
    """Writes over embeddings of single rows.

    Args:
        embed_tokens: the model's embedding layer.
    """

    def __init__(self, embed_tokens: Any) -> None:
        self._rows: torch.Tensor | None = None
        self._values: torch.Tensor | None = None
        embed_tokens.register_forward_hook(self._after)

    def begin(self, rows: torch.Tensor | None, values: torch.Tensor | None) -> None:
        """What the next forward pass is to embed where.

        Args:
            rows: int64 [rows], or None for nothing.
            values: [rows, hidden]
        """
        self._rows, self._values = rows, values

    def _after(self, module: Any, args: tuple[Any, ...], output: torch.Tensor) -> None:
        if self._rows is not None and self._values is not None:
            output[self._rows] = self._values.to(output.dtype)
