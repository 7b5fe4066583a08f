"""Memories of random values for a model, and the distribution that they make with it, from transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM

from galley_plugins.memory.checkpoint import Base, MemorySettings, load_network, load_settings, save_memory
from galley_plugins.memory.network import MemoryNetwork, Sizes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path


def make_memory(
    folder: Path, model: Path, *, layer: int, weight: float, seed: int, columns: torch.Tensor | None = None
) -> Path:
    """Write a memory of two small blocks into `folder`, which is returned.

    Args:
        columns: rising token ids that it has logits for; None for the vocabulary.
    """
    base = Base.of(model)
    outputs = base.vocabulary if columns is None else len(columns)
    sizes = Sizes("llama", base.hidden_size, base.hidden_size, 96, 2, outputs)
    network = MemoryNetwork(sizes).initialize(seed)
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: value.detach().clone() for name, value in network.named_parameters()}
    for name, spread in (("down_proj", 0.1), ("lm_head", 0.2)):
        for each in (each for each in tensors if name in each):
            tensors[each] = torch.randn(tensors[each].shape, generator=generator) * spread
    if columns is not None:
        tensors["columns"] = columns.int()
    save_memory(folder, MemorySettings(sizes, layer, weight, base), tensors)
    return folder


class MixReference:
    """
    Args:
        model: the model's folder.
        memories: folders of memories.
        loaded: a model of transformers in place of the folder's.
    """

    def __init__(self, model: Path, memories: Sequence[Path], loaded: Any = None) -> None:
        self._model = loaded or AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self._memories = []
        for folder in memories:
            settings = load_settings(folder)
            self._memories.append((settings.layer, *load_network(folder, settings, model)))

    @torch.no_grad()
    def log_probs(self, ids: list[int], weights: Sequence[float]) -> torch.Tensor:
        """float64 [tokens, vocabulary]: after each token, mixed by `weights`, one of each memory."""
        inputs: dict[int, torch.Tensor] = {}

        def keep(layer: int) -> object:
            return lambda module, args: inputs.__setitem__(layer, args[0][0])

        hooks = [
            self._model.model.layers[layer].mlp.register_forward_pre_hook(keep(layer))
            for layer, _, _ in self._memories
        ]
        try:
            logits = self._model(torch.tensor([ids])).logits[0].double()
        finally:
            for hook in hooks:
                hook.remove()
        mixed = (1 - sum(weights)) * logits.softmax(-1)
        for (layer, network, columns), weight in zip(self._memories, weights, strict=True):
            own = network(inputs[layer]).double().softmax(-1)
            mixed[:, slice(None) if columns is None else columns] += weight * own
        return mixed.log()


def assert_greedy(
    reference: MixReference, prompt: list[int], answer: Mapping[str, list[float]], weights: Sequence[float]
) -> None:
    """That an answer is the most probable one, token by token, and its log-probabilities are the mix's.

    Args:
        answer: of the Completions route: `token_ids`, and `token_logprobs` in `logprobs`.
    """
    tokens = [int(token) for token in answer["token_ids"]]
    expected = reference.log_probs([*prompt, *tokens], weights)[len(prompt) - 1 : -1]
    assert tokens == expected.argmax(-1).tolist()
    found = torch.tensor(answer["logprobs"]["token_logprobs"], dtype=torch.float64)
    assert torch.allclose(found, expected.max(-1).values, atol=2e-3)
