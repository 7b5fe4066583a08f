"""LoRA (arXiv 2106.09685) by peft: trained additions to a decoder's linear layers."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_PREFIX = "base_model.model."
_NAME = "default"


class LoraDecoder:
    """A frozen decoder with LoRA, which can be left out.

    Args:
        decoder: of transformers, without its output layer.

    Raises:
        ValueError: its layers have none of the modules' names.
    """

    def __init__(self, decoder: Any, rank: int) -> None:
        self.config = decoder.config
        self.model = get_peft_model(decoder, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=MODULES))

    def __call__(self, **inputs: Any) -> Any:
        return self.model(**inputs)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @contextmanager
    def base(self) -> Iterator[None]:
        """Within it, the decoder is itself alone."""
        self.model.base_model.disable_adapter_layers()
        try:
            yield
        finally:
            self.model.base_model.enable_adapter_layers()

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """[..., d] of token ids."""
        return self.model.get_input_embeddings()(ids)

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """What is trained, by the names of an adapter's tensors."""
        return {
            f"{name}.{side}": matrices[_NAME].weight
            for name, layer in self._layers()
            for side, matrices in (("A", layer.lora_A), ("B", layer.lora_B))
        }

    def tensors(self) -> dict[str, torch.Tensor]:
        """The adapter's tensors, with peft's scale in B."""
        scales = {name: layer.scaling[_NAME] for name, layer in self._layers()}
        return {
            name: value.detach() * (scales[name.removesuffix(".B")] if name.endswith(".B") else 1)
            for name, value in self.parameters().items()
        }

    def _layers(self) -> Iterator[tuple[str, Any]]:
        for name, module in self.model.named_modules():
            if isinstance(module, LoraLayer):
                yield name.removeprefix(_PREFIX), module
