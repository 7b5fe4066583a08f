"""Choose Token Prepending's layers on labelled pairs.

The paper's method has a first and a last layer of copying and an output layer. One pass of a set of pairs for
each range of layers gives the hidden states of every output layer, so that all of them are scored at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from galley_plugins.embedding.evaluation.metrics import sts_spearman
from galley_plugins.embedding.prompts import PromptBuilder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from galley_plugins.embedding.evaluation.data import Pairs
    from galley_plugins.embedding.prompts import Prompt
    from galley_plugins.embedding.templates import Template

BATCH = 32


@dataclass(frozen=True, order=True)
class Trial:
    """One choice of layers and its Spearman correlation times 100; `exit_layer` 0 copies nothing."""

    spearman: float
    start_layer: int
    exit_layer: int
    output_layer: int


class LayerStates:
    """Last rows of prompts at every layer, by transformers.

    Args:
        model: a decoder of transformers without its head, whose layers are `model.layers`.
    """

    def __init__(self, model: Any, pad: int) -> None:
        self._model = model
        self._pad = pad
        self._copies: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    @torch.inference_mode()
    def last_rows(
        self, prompts: Sequence[Prompt], copy_layers: range, done: Callable[[int], None] = lambda count: None
    ) -> NDArray[np.float32]:
        """[layers + 1, prompts, hidden], numbered as transformers numbers hidden states."""
        order = sorted(range(len(prompts)), key=lambda place: len(prompts[place].ids))
        found: NDArray[np.float32] | None = None
        hooks = [
            self._model.layers[layer].register_forward_pre_hook(self._copy, with_kwargs=True)
            for layer in copy_layers
        ]
        try:
            for start in range(0, len(order), BATCH):
                places = order[start : start + BATCH]
                rows = self._batch([prompts[place] for place in places])
                if found is None:
                    found = np.empty((rows.shape[0], len(prompts), rows.shape[2]), np.float32)
                found[:, places] = rows
                done(len(places))
        finally:
            for hook in hooks:
                hook.remove()
        assert found is not None
        return found

    def _batch(self, prompts: list[Prompt]) -> NDArray[np.float32]:
        longest = max(len(prompt.ids) for prompt in prompts)
        ids = torch.full((len(prompts), longest), self._pad)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt.ids)] = torch.tensor(prompt.ids)
            mask[row, : len(prompt.ids)] = 1
        rows = torch.arange(len(prompts))
        last = mask.sum(1) - 1
        self._copies = (rows, torch.tensor([prompt.placeholder or 0 for prompt in prompts]), last)
        states = self._model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
        return torch.stack([state[rows, last] for state in states]).float().numpy()

    def _copy(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        assert self._copies is not None
        rows, targets, sources = self._copies
        hidden[rows, targets] = hidden[rows, sources]


def ranges(layers: int, start: int, longest: int) -> list[range]:
    """Ranges of layers to try: none, and from `start` to each of the next `longest`."""
    return [range(0), *(range(start, stop) for stop in range(start + 1, min(start + longest, layers) + 1))]


def trials(
    states: LayerStates,
    tokenizer: Any,
    template: Template,
    placeholder: str,
    pairs: Pairs,
    tried: Sequence[range],
    done: Callable[[int], None] = lambda count: None,
) -> Iterator[list[Trial]]:
    """Score every output layer for each range of copying; without copying, the prompt has no placeholder."""
    texts = [*pairs.first, *pairs.second]
    for layers in tried:
        asked = template if layers else template.without_placeholder()
        prompts = PromptBuilder(tokenizer, asked, placeholder=placeholder).build(texts, limit=1 << 30)
        rows = states.last_rows(prompts, layers, done)
        yield [
            Trial(
                round(sts_spearman(layer[: len(pairs)], layer[len(pairs) :], pairs), 3),
                layers.start,
                layers.stop,
                index,
            )
            for index, layer in enumerate(rows)
        ]
