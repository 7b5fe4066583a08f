"""Leaves out a model's output layer in steps that only embed: what they would sample is dropped."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class OutputLayer:
    """In place of the model's `compute_logits`, which it takes over.

    Args:
        vocab_size: columns of the logits.

    Attributes:
        needed: whether somebody will look at the logits of this step; else they are zeros.
    """

    def __init__(self, model: Any, vocab_size: int) -> None:
        self.needed = True
        self._compute = model.compute_logits
        self._vocab_size = vocab_size
        self._zeros: torch.Tensor | None = None
        model.compute_logits = self

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.needed:
            return self._compute(hidden_states, *args, **kwargs)
        rows = len(hidden_states)
        if self._zeros is None or len(self._zeros) < rows:
            self._zeros = hidden_states.new_zeros(rows, self._vocab_size)
        return self._zeros[:rows]
