"""The one place that reads and writes hidden states between a model's layers.

Hooks before the decoder layers, of any vLLM model whose layers take hidden states and a residual. A step that
has nothing to do there costs one comparison a layer. They need a model that runs as Python (`compile: off`):
in a compiled or captured graph no hook would be called. `MlpTap` works there too: what it does is part of the
graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence


MLP_NAMES = ("mlp", "feed_forward", "block_sparse_moe")


@dataclass(frozen=True, slots=True)
class TappedRows:
    """Rows of one step, as indices into its tokens.

    Attributes:
        sources, targets: int64 [copies]; before the layers `copy_layers`, targets become what sources are.
        read: int64 [rows], in the order in which they are returned.
    """

    sources: torch.Tensor
    targets: torch.Tensor
    read: torch.Tensor


class LayerTaps:
    """Copies and reads rows between layers.

    Args:
        layers: the model's decoder layers, in order.
        copy_layers: layers before which rows are copied.
        read_layer: the layer before which rows are read; None for none.
    """

    def __init__(self, layers: Sequence[Any], copy_layers: range, read_layer: int | None) -> None:
        self._read_layer = read_layer
        self._step: TappedRows | None = None
        self._rows: torch.Tensor | None = None
        for index in {*copy_layers, *(() if read_layer is None else (read_layer,))}:
            copies = index in copy_layers
            layers[index].register_forward_pre_hook(self._hook(copies, index == read_layer), with_kwargs=True)

    def begin(self, step: TappedRows | None) -> None:
        """What the next forward pass is to do; None for nothing."""
        self._step, self._rows = step, None

    def end(self) -> torch.Tensor | None:
        """[rows, hidden] that the last pass read, or None; the next pass does nothing."""
        rows, self._rows, self._step = self._rows, None, None
        return rows

    def _hook(self, copies: bool, reads: bool) -> Any:
        def before(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            step = self._step
            if step is None:
                return
            states = _states(args, kwargs)
            if copies and len(step.targets):
                for state in states:
                    state[step.targets] = state[step.sources]
            if reads and len(step.read):
                self._rows = torch.stack([state[step.read] for state in states]).sum(0)

        return LayerHook(before, lambda: self._step is None)


class LayerHook:
    """A hook that says when it has nothing to do, so that layers which run otherwise know when they may."""

    def __init__(self, hook: Callable[..., None], idle: Callable[[], bool]) -> None:
        self._hook = hook
        self.idle = idle

    def __call__(self, *args: Any, **named: Any) -> None:
        self._hook(*args, **named)


class MlpTap(LayerHook):
    """Keeps what enters a layer's MLP in a buffer of that module.

    Args:
        layer: a decoder layer.
        buffer: [tokens of the largest step, hidden].
        idle: whether nobody will look at this step's rows.
        compiled: the model runs as a graph, which keeps the rows of every step.

    Raises:
        ValueError: the layer has no MLP of the usual names.
    """

    BUFFER = "galley_tap"

    def __init__(self, layer: Any, buffer: torch.Tensor, idle: Callable[[], bool], *, compiled: bool) -> None:
        mlp = next((getattr(layer, name) for name in MLP_NAMES if hasattr(layer, name)), None)
        if mlp is None:
            raise ValueError(
                f"expected a decoder layer with {', '.join(MLP_NAMES)}, {type(layer).__name__} is built "
                "otherwise"
            )
        super().__init__(_keep, idle)
        self.buffer = buffer
        mlp.register_buffer(self.BUFFER, buffer, persistent=False)
        mlp.register_forward_pre_hook(_keep if compiled else self, with_kwargs=True)

    def __call__(self, *args: Any, **named: Any) -> None:
        if not self.idle():
            super().__call__(*args, **named)


def _keep(mlp: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    states = args[0] if args else _states(args, kwargs)[0]
    mlp.galley_tap[: states.shape[0]].copy_(states)


def looked_into(modules: Iterable[Any], but: type[LayerHook] | None = None) -> bool:
    """Whether a module has a hook with something to do in this step, or a forward pass of its own.

    Args:
        but: hooks whose work the caller does itself.
    """
    for module in modules:
        if "forward" in module.__dict__:
            return True
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            if not all(_idle(hook) or (but is not None and isinstance(hook, but)) for hook in hooks.values()):
                return True
    return False


def _idle(hook: Any) -> bool:
    return isinstance(hook, LayerHook) and hook.idle()


def _states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """Hidden states and residual among a layer's inputs, [tokens, hidden] each; they add up to the state."""
    return [
        value
        for value in (*args, *kwargs.values())
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() == 2
    ]


def decoder_layers(model: Any) -> Sequence[Any]:
    """
    Raises:
        ValueError: the model keeps its layers elsewhere, naming its class.
    """
    layers: Sequence[Any] = getattr(getattr(model, "model", None), "layers", ())
    if not len(layers):
        raise ValueError(f"expected a model with model.layers, {type(model).__name__} is built otherwise")
    return layers
