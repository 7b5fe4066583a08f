"""Two next-token distributions mixed in log space, row by row: log((1 - w) softmax(a) + w softmax(b))."""

from __future__ import annotations

import torch

from galley_kernels.choice import AUTO, choose
from galley_kernels.mixing import cpu_mix

IMPLEMENTATIONS = ("reference", "torch", "cpu", "triton")


def mix_log_probs(
    logits: torch.Tensor,
    other: torch.Tensor,
    weight: torch.Tensor,
    columns: torch.Tensor | None = None,
    *,
    implementation: str = AUTO,
) -> torch.Tensor:
    """float32 [rows, vocabulary]: log-probabilities of the mix.

    A weight of 0 gives the log-softmax of the first logits alone, of 1 that of the others. Minus infinity in
    both stays what it is.

    Args:
        logits: floating [rows, vocabulary].
        other: floating [rows, vocabulary], or [rows, columns] where these are given.
        weight: floating [rows], of the other distribution, from 0 to 1.
        columns: int64 [columns], each once: the tokens that the other distribution is over.

    Raises:
        ValueError: shapes differ, or columns are no int64.
    """
    expected = logits.shape if columns is None else torch.Size([len(logits), columns.numel()])
    if logits.dim() != 2 or other.shape != expected or weight.shape != logits.shape[:1]:
        raise ValueError(
            f"found logits {list(logits.shape)} and {list(other.shape)} and weights {list(weight.shape)}, "
            f"expected [rows, vocabulary], {list(expected)} and [rows]"
        )
    if columns is not None and (columns.dtype != torch.int64 or columns.dim() != 1):
        raise ValueError(f"found columns {columns.dtype} {list(columns.shape)}, expected int64 [columns]")
    chosen = choose(implementation, IMPLEMENTATIONS, logits.device)
    if implementation == AUTO and logits.device.type == "cpu" and cpu_mix.available():
        chosen = "cpu"
    if chosen == "cpu":
        return cpu_mix.mix(logits, other, weight, columns)
    if chosen == "triton":
        from galley_kernels.mixing import triton_mix

        return triton_mix.mix(logits, _spread(other, columns, logits), weight)
    return _mix(logits, other, weight, columns, torch.float64 if chosen == "reference" else torch.float32)


def _spread(other: torch.Tensor, columns: torch.Tensor | None, logits: torch.Tensor) -> torch.Tensor:
    """[rows, vocabulary]: minus infinity but for the columns."""
    if columns is None:
        return other
    return other.new_full(logits.shape, float("-inf")).index_copy_(1, columns, other)


def _mix(
    logits: torch.Tensor,
    other: torch.Tensor,
    weight: torch.Tensor,
    columns: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    share = weight.to(dtype).unsqueeze(1)
    first = torch.log_softmax(logits.to(dtype), -1) + torch.log1p(-share)
    second = torch.log_softmax(other.to(dtype), -1) + share.log()
    if columns is None:
        return torch.logaddexp(first, second).float()
    return first.index_copy_(1, columns, torch.logaddexp(first[:, columns], second)).float()
