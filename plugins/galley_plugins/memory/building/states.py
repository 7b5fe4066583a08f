"""What a model has at the input of one layer's MLP, through transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from pathlib import Path


class _Read(Exception):  # noqa: N818 -- no error
    """The layer has been reached."""


class StateReader:
    """A frozen model; float32 on a CPU, bfloat16 on a GPU.

    Args:
        folder: of the model.
        layer: from 0; negative ones count from the last.

    Raises:
        ValueError: the model has no such layer, or its layers have no MLP under that name.
    """

    def __init__(self, folder: Path, layer: int, device: torch.device) -> None:
        from transformers import AutoModelForCausalLM

        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        self._model = model.eval().requires_grad_(False).to(device)
        self.device = device
        layers = getattr(model.base_model, "layers", None) or getattr(model.base_model, "h", ())
        if not -len(layers) <= layer < len(layers):
            raise ValueError(f"layer: found {layer}, expected {-len(layers)} to {len(layers) - 1}")
        self.layer = layer % len(layers)
        mlp = getattr(layers[self.layer], "mlp", None)
        if mlp is None:
            raise ValueError(f"expected layers with an mlp, {type(layers[self.layer]).__name__} has none")
        self.width: int = model.config.get_text_config().hidden_size
        self._rows: torch.Tensor | None = None
        self._stops = False
        mlp.register_forward_pre_hook(self._keep)

    def _keep(self, module: Any, arguments: tuple[torch.Tensor, ...]) -> None:
        self._rows = arguments[0]
        if self._stops:
            raise _Read

    @torch.inference_mode()
    def states(self, ids: torch.Tensor) -> torch.Tensor:
        """[texts, tokens, width]; layers behind the one that is read do not run.

        Args:
            ids: int64 [texts, tokens]; rows may be padded at their end.
        """
        self._stops = True
        try:
            self._model.base_model(ids.to(self.device), use_cache=False)
        except _Read:
            pass
        finally:
            self._stops = False
        return self._taken()

    @torch.inference_mode()
    def states_and_likelihoods(
        self, ids: torch.Tensor, following: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The states, and float32 [texts, tokens]: log-probabilities of the tokens that follow, in nats."""
        logits = self._model(ids.to(self.device), use_cache=False).logits.float()
        log_probs = torch.log_softmax(logits, -1)
        return self._taken(), log_probs.gather(-1, following.to(self.device)[..., None])[..., 0]

    def _taken(self) -> torch.Tensor:
        rows, self._rows = self._rows, None
        assert rows is not None
        return rows
