"""A model whose next-token distribution has memories mixed in (MLP Memory, arXiv 2508.01832).

p = (1 - sum w_i) p_model + sum w_i p_i, in log space. The authors' code reads hidden states by a hook and
mixes outside of the model; here the loaded model itself becomes a subclass of its own class, so that names
of parameters, LoRA, tensor parallelism and quantization stay as they are.

What a row's logits need travels in its hidden state: `forward` adds the inputs of the tapped MLPs and the
row's weights as further columns, so that whatever the runner selects (rows to sample from, drafts, rows of a
prompt) brings its own along. This is the one place that widens a model's output; whoever wants the model's
own hidden states asks `own_states`.
"""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING, Any

import torch

from galley_kernels import mix_log_probs
from galley_plugins.runners.layer_taps import MlpTap

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from galley_plugins.memory.served import NamedMemory

ATTRIBUTE = "galley_mix"  # of a model with memories
_LAYERS = ("model.layers", "language_model.model.layers", "transformer.h", "gpt_neox.layers")


class Mix:
    """What a model with memories keeps between its forward pass and its logits.

    Args:
        memories: at least one.
        hidden: width of the model's hidden states.
        tokens: of the largest step.
        dtype: of the hidden states.
        compiled: the model runs as a graph: every step's output has the columns, whether needed or not.

    Attributes:
        mixing: some token of the step has a weight above 0. Without, the output is the model's own.
    """

    def __init__(
        self,
        memories: Sequence[NamedMemory],
        *,
        hidden: int,
        tokens: int,
        device: torch.device,
        dtype: torch.dtype,
        compiled: bool,
    ) -> None:
        self.mixing = True  # while vLLM measures what a step takes
        self.hidden = hidden
        self.compiled = compiled
        self._memories = [each.memory for each in memories]
        layers = {memory.layer: None for memory in self._memories}
        self.taps = {layer: torch.zeros(tokens, hidden, device=device, dtype=dtype) for layer in layers}
        self._places = [list(layers).index(memory.layer) for memory in self._memories]
        self._weights = torch.zeros(tokens, len(memories), device=device)  # float32 [tokens, memories]
        self._filled = 0

    def attach(self, model: Any) -> None:
        """Make a loaded model mix; before its first forward pass.

        Raises:
            ValueError: the model has no such layer, or keeps its layers elsewhere.
        """
        layers = _decoder_layers(model)
        for layer, buffer in self.taps.items():
            if not 0 <= layer < len(layers):
                raise ValueError(f"memory: found layer {layer}, expected 0 to {len(layers) - 1}")
            MlpTap(layers[layer], buffer, lambda: not self.mixing, compiled=self.compiled)
        setattr(model, ATTRIBUTE, self)
        model.__class__ = mixing_class(type(model))  # type: ignore[arg-type]  # a type is hashable

    def begin_step(self, shares: Sequence[Sequence[float]], starts: torch.Tensor, tokens: int) -> None:
        """Say what the rows of the step that is about to run are mixed by.

        Args:
            shares: of each request, one for each memory.
            starts: int32 [requests + 1], first token of each request in the batch, on the device.
            tokens: in the batch; more rows are padding, whose weights are 0.
        """
        self.mixing = any(map(any, shares))
        if not self.mixing:
            return
        nothing = [0.0] * len(self._memories)
        each = torch.tensor([*shares, nothing], dtype=torch.float32)
        if starts.is_cuda:
            each = each.pin_memory().to(starts.device, non_blocking=True)
        rows = torch.arange(tokens, dtype=starts.dtype, device=starts.device)
        owners = torch.searchsorted(starts[1:], rows, right=True)
        self._weights[:tokens] = each[owners]
        self._weights[tokens : self._filled].zero_()
        self._filled = tokens

    @contextlib.contextmanager
    def plain(self) -> Iterator[None]:
        """Inside, a model that is not compiled is as without memories."""
        before, self.mixing = self.mixing, False
        try:
            yield
        finally:
            self.mixing = before

    def widen(self, states: torch.Tensor) -> torch.Tensor:
        """[tokens, hidden + tapped + weights] in the states' type, of [tokens, hidden]."""
        if not (self.mixing or self.compiled):
            return states
        count = states.shape[0]
        tapped = [buffer[:count] for buffer in self.taps.values()]
        weights = self._weights[:count].view(states.dtype)  # the bits of float32
        return torch.cat([states, *tapped, weights], -1)

    def logits(self, own: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of the mix, float32 [rows, vocabulary]; of rows without weights the own logits.

        Args:
            own: floating [rows, vocabulary].
            rows: [rows, hidden + tapped + weights].
        """
        tapped = rows[:, self.hidden : self.hidden * (1 + len(self.taps))].split(self.hidden, 1)
        weights = rows[:, self.hidden * (1 + len(self.taps)) :].contiguous().view(torch.float32)
        mixed = own.float()
        for memory, place, share in zip(self._memories, self._places, _conditional(weights).T, strict=True):
            states = tapped[place].contiguous()
            if share.is_cuda:  # to count rows would be to wait for them
                found = mix_log_probs(mixed, memory.logits(states), share, memory.columns)
                mixed = torch.where(share.unsqueeze(1) > 0, found, mixed)
                continue
            some = share.nonzero().squeeze(1)
            if len(some) == len(share):
                mixed = mix_log_probs(mixed, memory.logits(states), share, memory.columns)
            elif len(some):
                found = mix_log_probs(mixed[some], memory.logits(states[some]), share[some], memory.columns)
                mixed[some] = found
        return mixed


def _conditional(weights: torch.Tensor) -> torch.Tensor:
    """[rows, memories]: each one's share of what it and all before it, and the model, have together.

    Mixed one after another by these, memories come out with `weights`: later ones take from earlier ones.
    """
    later = weights.flip(1).cumsum(1).flip(1) - weights
    return (weights / (1 - later)).nan_to_num(0).clamp(0, 1)


@functools.cache
def mixing_class(base: type[Any]) -> type[Any]:
    """The subclass of a model's class whose objects have a `Mix`."""

    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        return mix_of(self).widen(base.forward(self, *args, **kwargs))

    @functools.wraps(base.compute_logits)
    def compute_logits(
        self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor | None:
        mix = mix_of(self)
        if hidden_states.shape[-1] == mix.hidden:
            found: torch.Tensor | None = base.compute_logits(self, hidden_states, *args, **kwargs)
            return found
        own = base.compute_logits(self, hidden_states[:, : mix.hidden].contiguous(), *args, **kwargs)
        return mix.logits(own, hidden_states) if mix.mixing and own is not None else own

    return type(base.__name__, (base,), {"forward": forward, "compute_logits": compute_logits})


def mix_of(model: Any) -> Any:
    """The model's `Mix`; None where it has no memories."""
    return getattr(model, ATTRIBUTE, None)


def own_states(model: Any, states: torch.Tensor) -> torch.Tensor:
    """[rows, hidden]: what the model itself put out, of rows that it may have widened."""
    mix = mix_of(model)
    return states if mix is None else states[..., : mix.hidden]


def plain(model: Any) -> contextlib.AbstractContextManager[None]:
    """Inside, the model's output and logits are its own alone."""
    mix = mix_of(model)
    found: contextlib.AbstractContextManager[None] = contextlib.nullcontext() if mix is None else mix.plain()
    return found


def _decoder_layers(model: Any) -> Sequence[Any]:
    for path in _LAYERS:
        found = functools.reduce(lambda owner, name: getattr(owner, name, None), path.split("."), model)
        if found is not None and len(found):
            layers: Sequence[Any] = found
            return layers
    raise ValueError(
        f"memory: expected a model with {', '.join(_LAYERS)}, {type(model).__name__} is built otherwise"
    )
