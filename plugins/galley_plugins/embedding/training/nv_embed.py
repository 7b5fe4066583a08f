"""NV-Embed (arXiv 2405.17428): a decoder without its causal mask, latent attention over every token, mean.

Two stages: pairs that say the same with in-batch negatives, then scored pairs without. The paper's first
stage has retrieval data with mined hard negatives, and its second one blends tasks in the same way; here
the second one has scores in their place. The head starts as the identity: training begins with a mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from galley_plugins.embedding.latent_attention import PREFIX, LatentAttention
from galley_plugins.embedding.prompts import PromptBuilder
from galley_plugins.embedding.templates import Template
from galley_plugins.embedding.training.base import MAX_TOKENS, Padded, additive, present
from galley_plugins.embedding.training.data import AlikePairs, Blend, ClassPairs, ScoredPairs
from galley_plugins.embedding.training.lora import LoraDecoder
from galley_plugins.embedding.training.losses import blended

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from galley_plugins.embedding.training.base import BaseModel
    from galley_plugins.embedding.training.data import Source, TrainingData

SLOWER = 0.2  # the head's learning rate, of the run's


@dataclass(frozen=True)
class NvEmbedRecipe:
    """How nv-embed is trained.

    Attributes:
        latents, heads, head_size: of the latent attention; the public checkpoint's heads are as wide as its
            model, of which a narrow one learns as much faster.
        first_steps: of the first stage.
        class_share: of the first stage's steps, how many take banking77's classes.
    """

    latents: int = 512
    heads: int = 8
    head_size: int = 64
    first_steps: int = 48
    class_share: float = 0.25

    method = "nv-embed"

    def trainee(self, base: BaseModel, data: TrainingData, batch: int, rank: int, seed: int) -> NvEmbed:
        classes = ClassPairs(data.classes, batch, seed)
        alike = Blend(AlikePairs(data.train, batch, seed), classes, self.class_share)
        return NvEmbed(base, self, (alike, ScoredPairs(data.train, batch, seed)), rank)


class NvEmbed:
    """Latent attention and LoRA on all rows.

    Args:
        sources: of the first and of the second stage.
    """

    def __init__(
        self, base: BaseModel, recipe: NvEmbedRecipe, sources: tuple[Source, Source], rank: int
    ) -> None:
        self._base, self._recipe, self._sources = base, recipe, sources
        self.sizes: dict[str, object] = {"latents": recipe.latents, "heads": recipe.heads}
        self.options: dict[str, object] = {}
        size = base.language_model.config.hidden_size
        self._head = LatentAttention(size, recipe.latents, recipe.heads, recipe.head_size).to(base.device)
        begin_as_identity(self._head)
        self._builder = PromptBuilder(base.tokenizer, Template.named("plain"), suffix=[base.eos])
        self._decoder = LoraDecoder(base.decoder, rank)

    def parameters(self) -> dict[str, nn.Parameter]:
        head = {PREFIX + name: value for name, value in self._head.named_parameters()}
        return {**self._decoder.parameters(), **head}

    def rate(self, name: str) -> float:
        return SLOWER if name.startswith(PREFIX) else 1.0

    def tensors(self) -> dict[str, torch.Tensor]:
        head = {PREFIX + name: value.detach() for name, value in self._head.named_parameters()}
        return {**self._decoder.tensors(), **head}

    def add_files(self, folder: Path) -> None:
        pass

    def loss(self, step: int) -> torch.Tensor:
        first_steps = self._recipe.first_steps
        first_stage = step < first_steps
        batch = self._sources[0].batch(step) if first_stage else self._sources[1].batch(step - first_steps)
        first, second = self.encode([*batch.first, *batch.second]).split(len(batch.first))
        return blended(first, second, batch.scores, in_batch=first_stage)

    def encode(self, texts: Sequence[str]) -> torch.Tensor:
        prompts = self._builder.build(texts, MAX_TOKENS, cut="end")
        padded = Padded.of_prompts(prompts, self._base.device)
        width = padded.ids.shape[1]
        there = present(padded.lengths, width)
        mask = additive(there[:, None, :].expand(-1, width, -1))
        states = self._decoder(input_ids=padded.ids, attention_mask=mask).last_hidden_state
        starts = torch.tensor([prompt.start for prompt in prompts], device=states.device)
        counted = there & ~present(starts, width)  # an instruction is not
        owners = counted.nonzero()[:, 0]
        sums = states.new_zeros(len(texts), states.shape[-1]).index_add(
            0, owners, self._head(states[counted])
        )
        return sums / counted.sum(1, keepdim=True)


@torch.no_grad()
def begin_as_identity(head: LatentAttention) -> None:
    """Both blocks add nothing at first."""
    attend, feed = head.cross_attend_blocks
    last = feed.fn.net[-1]
    for parameter in (attend.fn.to_out.weight, last.weight, last.bias):
        parameter.zero_()
