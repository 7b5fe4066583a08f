"""NV-Embed's public checkpoints as a model of vLLM: a Mistral decoder, and the head that the worker uses.

The attention mask is not the model's concern: the runner asks for bidirectional rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.utils import AutoWeightsLoader

from galley_plugins.embedding.latent_attention import PREFIX, LatentAttention

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import torch

DECODER = "embedding_model."


class NVEmbedModel(LlamaForCausalLM):
    """It has no words to say: its logits are zeros."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        vllm_config.model_config.hf_config.tie_word_embeddings = True  # the checkpoint has no output layer
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self._heads: list[LatentAttention] = []  # not a submodule: vLLM neither fills nor moves it

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states.new_zeros(len(hidden_states), self.config.vocab_size)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """
        Raises:
            ValueError: a tensor of the head is missing, too many, or of another shape.
        """
        head: dict[str, torch.Tensor] = {}

        def decoder() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in weights:
                if name.startswith(PREFIX):
                    head[name] = tensor.clone()
                else:
                    yield f"model.{name.removeprefix(DECODER)}", tensor

        loaded: set[str] = AutoWeightsLoader(self).load_weights(decoder())
        self._heads = [LatentAttention.from_tensors(head, self.config.latent_heads)]
        return loaded

    def take_head(self) -> LatentAttention:
        """The latent attention; it is large, and nobody needs it twice."""
        return self._heads.pop()
