"""Two next-token distributions mixed in log space, row by row: log((1 - w) softmax(a) + w softmax(b))."""

from __future__ import annotations

import torch

from galley_kernels.choice import AUTO, choose

IMPLEMENTATIONS = ("reference", "torch", "triton")


def mix_log_probs(
    logits: torch.Tensor, other: torch.Tensor, weight: torch.Tensor, *, implementation: str = AUTO
) -> torch.Tensor:
    """float32 [rows, vocabulary]: log-probabilities of the mix.

    A weight of 0 gives the log-softmax of the first logits alone, of 1 that of the others. Minus infinity in
    both stays what it is.

    Args:
        logits, other: floating [rows, vocabulary].
        weight: floating [rows], of the other distribution, from 0 to 1.

    Raises:
        ValueError: shapes differ.
    """
    if logits.dim() != 2 or logits.shape != other.shape or weight.shape != logits.shape[:1]:
        raise ValueError(
            f"found logits {list(logits.shape)} and {list(other.shape)} and weights {list(weight.shape)}, "
            "expected [rows, vocabulary] twice and [rows]"
        )
    chosen = choose(implementation, IMPLEMENTATIONS, logits.device)
    if chosen == "triton":
        from galley_kernels.mixing import triton_mix

        return triton_mix.mix(logits, other, weight)
    return _mix(logits, other, weight, torch.float64 if chosen == "reference" else torch.float32).float()


def _mix(logits: torch.Tensor, other: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    share = weight.to(dtype).unsqueeze(1)
    first = torch.log_softmax(logits.to(dtype), -1) + torch.log1p(-share)
    return torch.logaddexp(first, torch.log_softmax(other.to(dtype), -1) + share.log())
