"""GEM (arXiv 2506.04344): special tokens after a text, whose last hidden states are its vector.

The text is squeezed through them: first, what follows a text is predicted from the special tokens alone, then
vectors are told apart. Here the decoder stays as it is: LoRA acts on the special tokens' rows alone, so that
chats do not change and a text's keys and values are computed once. Scored pairs and classes take the place of
texts with dropped tokens, and every text has its special tokens.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from transformers import DynamicCache

from galley_plugins.embedding.prompts import PromptBuilder
from galley_plugins.embedding.templates import Template
from galley_plugins.embedding.training.base import MAX_TOKENS, Padded, additive, present
from galley_plugins.embedding.training.data import Blend, ClassPairs, ScoredPairs, spread
from galley_plugins.embedding.training.lora import LoraDecoder
from galley_plugins.embedding.training.losses import SCALE, blended, continued

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from galley_plugins.embedding.training.base import BaseModel
    from galley_plugins.embedding.training.data import Source, TrainingData

MOST_SCALE = 100.0
RECONSTRUCTED = 0.5  # of the texts of the first stage; the others are cut in two
NOISE = 0.1  # of the special tokens' first embeddings, by the embeddings' deviation
KEPT_BYTES = 4 << 30  # of texts' keys and values


@dataclass(frozen=True)
class GemRecipe:
    """How gem is trained.

    Attributes:
        tokens: special tokens.
        combine: what becomes of their hidden states.
        prompt: a template's name or a template, without a placeholder.
        ntp_steps: of next-token prediction, before the vectors are trained.
        pairs: of STS-B's training pairs, how many. What a pair costs at first, its texts' keys and values, is
            free when it comes again.
        class_share: of the steps after them, how many take banking77's classes.
    """

    tokens: int = 1
    combine: Literal["mean", "concat"] = "mean"
    prompt: str = "plain"
    ntp_steps: int = 30
    pairs: int = 2000
    class_share: float = 0.0

    method = "gem"

    def trainee(self, base: BaseModel, data: TrainingData, batch: int, rank: int, seed: int) -> Gem:
        pairs = ScoredPairs(spread(data.train, self.pairs), batch, seed)
        source = Blend(pairs, ClassPairs(data.classes, batch, seed), self.class_share)
        return Gem(base, self, source, rank, seed)


class Gem:
    """Special tokens and LoRA on their rows.

    Args:
        source: of pairs; the first stage takes its first texts.
        kept_bytes: of texts' keys and values that are not computed again.
    """

    def __init__(
        self,
        base: BaseModel,
        recipe: GemRecipe,
        source: Source,
        rank: int,
        seed: int,
        kept_bytes: int = KEPT_BYTES,
    ) -> None:
        self._base, self._recipe, self._source, self._seed = base, recipe, source, seed
        self.sizes: dict[str, object] = {"tokens": recipe.tokens, "combine": recipe.combine}
        self.options: dict[str, object] = {"prompt": recipe.prompt}
        template = Template.named(recipe.prompt).without_placeholder()
        self._builder = PromptBuilder(base.tokenizer, template)
        embeddings = base.decoder.get_input_embeddings().weight.detach()
        noise = torch.randn(recipe.tokens, embeddings.shape[1]) * NOISE * embeddings.std().cpu()
        self._special = nn.Parameter(embeddings[base.eos] + noise.to(embeddings.device))
        self._log_scale = nn.Parameter(torch.tensor(math.log(SCALE), device=embeddings.device))
        self._decoder = LoraDecoder(base.decoder, rank)
        self._prefixes = Prefixes(self._decoder, kept_bytes)

    def parameters(self) -> dict[str, nn.Parameter]:
        return {**self._decoder.parameters(), "special": self._special, "log_scale": self._log_scale}

    def rate(self, name: str) -> float:
        return 1.0

    def tensors(self) -> dict[str, torch.Tensor]:
        return {**self._decoder.tensors(), "special": self._special.detach()}

    def add_files(self, folder: Path) -> None:
        pass

    def loss(self, step: int) -> torch.Tensor:
        if step < self._recipe.ntp_steps:
            return self._next_token_loss(step)
        batch = self._source.batch(step - self._recipe.ntp_steps)
        vectors = self._vectors(self._ids([*batch.first, *batch.second]), keep=True)
        first, second = vectors.split(len(batch.first))
        scale = self._log_scale.clamp(0, math.log(MOST_SCALE)).exp()
        return blended(first, second, batch.scores, scale=scale)

    def encode(self, texts: Sequence[str]) -> torch.Tensor:
        return self._vectors(self._ids(texts), keep=False)

    def _ids(self, inputs: Sequence[str | list[int]]) -> list[list[int]]:
        return [prompt.ids for prompt in self._builder.build(inputs, MAX_TOKENS, cut="end")]

    def _vectors(self, ids: list[list[int]], *, keep: bool) -> torch.Tensor:
        states = self.special_states(self._prefixes.of(ids, keep=keep))
        return states.flatten(1) if self._recipe.combine == "concat" else states.mean(1)

    def special_states(self, prefix: Prefix) -> torch.Tensor:
        """[texts, special tokens, d]; their keys and values join the prefix."""
        count = self._recipe.tokens
        return self._decoder(
            inputs_embeds=self._special.expand(len(prefix.lengths), -1, -1),
            attention_mask=special_mask(prefix.lengths, prefix.width, count),
            position_ids=prefix.lengths[:, None].expand(-1, count),
            past_key_values=prefix.cache,
            use_cache=True,
        ).last_hidden_state

    def suffix_states(self, prefix: Prefix, suffixes: torch.Tensor) -> torch.Tensor:
        """[texts, tokens, d] of what follows the special tokens, by the decoder without LoRA.

        Args:
            prefix: with the special tokens.
            suffixes: int64 [texts, tokens]
        """
        count = suffixes.shape[1]
        places = prefix.lengths[:, None] + 1 + torch.arange(count, device=suffixes.device)
        with self._decoder.base():
            return self._decoder(
                inputs_embeds=self._decoder.embed(suffixes),
                attention_mask=suffix_mask(len(suffixes), prefix.width, self._recipe.tokens, count).to(
                    suffixes.device
                ),
                position_ids=places,
                past_key_values=prefix.cache,
                use_cache=True,
            ).last_hidden_state

    def _next_token_loss(self, step: int) -> torch.Tensor:
        texts = self._source.batch(step).first
        prefixes, suffixes = self._split(texts, random.Random(f"{self._seed} next {step}"))  # noqa: S311
        prefix = self._prefixes.of(prefixes, keep=False)
        self.special_states(prefix)
        told = Padded.of(suffixes, self._base.device)
        targets = told.ids.masked_fill(~present(told.lengths, told.ids.shape[1]), -100)
        states = self.suffix_states(prefix, told.ids)
        return continued(states, self._base.language_model.get_output_embeddings(), targets)

    def _split(self, texts: Sequence[str], draw: random.Random) -> tuple[list[list[int]], list[list[int]]]:
        """Prompts, and what is to be predicted after their special tokens: the same text, or its rest."""
        inputs: list[str | list[int]] = []
        suffixes = []
        for text, ids in zip(
            texts,
            self._base.tokenizer(list(texts), add_special_tokens=False)["input_ids"],
            strict=True,
        ):
            ids = ids[:MAX_TOKENS]
            if len(ids) < 4 or draw.random() < RECONSTRUCTED:
                inputs.append(text)
                suffixes.append(ids)
            else:
                cut = draw.randint(1, len(ids) - 2)
                inputs.append(ids[:cut])
                suffixes.append(ids[cut:])
        return self._ids(inputs), suffixes


def special_mask(lengths: torch.Tensor, width: int, count: int) -> torch.Tensor:
    """Special tokens see their text and themselves, but not one another.

    Args:
        lengths: int64 [texts]
        width: keys of the padded texts, before the special tokens' own.

    Returns:
        float32 [texts, 1, count, width + count]
    """
    text = present(lengths, width)[:, None, :].expand(-1, count, -1)
    own = torch.eye(count, dtype=torch.bool, device=lengths.device).expand(len(lengths), -1, -1)
    return additive(torch.cat([text, own], dim=2))


def suffix_mask(texts: int, width: int, specials: int, count: int) -> torch.Tensor:
    """What follows the special tokens sees them and what precedes it since, but no text.

    Returns:
        float32 [texts, 1, count, width + specials + count]
    """
    seen = torch.zeros(count, width + specials + count, dtype=torch.bool)
    seen[:, width : width + specials] = True
    seen[:, width + specials :] = torch.ones(count, count, dtype=torch.bool).tril()
    return additive(seen.expand(texts, -1, -1))


@dataclass(frozen=True)
class Prefix:
    """Keys and values of padded texts.

    Attributes:
        cache: of transformers.
        lengths: int64 [texts]
        width: of the longest text.
    """

    cache: Any
    lengths: torch.Tensor
    width: int


class Prefixes:
    """Texts' keys and values by the decoder without LoRA, which training does not change.

    Args:
        limit: bytes that are kept, in float16.
    """

    def __init__(self, decoder: LoraDecoder, limit: int) -> None:
        self._decoder = decoder
        self._left = limit
        self._kept: dict[tuple[int, ...], torch.Tensor] = {}

    def of(self, ids: list[list[int]], *, keep: bool) -> Prefix:
        """
        Args:
            keep: take and keep what is computed, rounded to float16; otherwise it is as exact as the model.
        """
        if not keep:
            return self._run(ids)
        missing = [text for text in ids if tuple(text) not in self._kept]
        computed = self._computed(missing) if missing else {}
        for text, found in computed.items():
            if found.nbytes <= self._left:
                self._left -= found.nbytes
                self._kept[text] = found
        texts = [self._kept.get(tuple(text), computed.get(tuple(text))) for text in ids]
        return self._joined([found for found in texts if found is not None])

    @torch.no_grad()
    def _run(self, ids: list[list[int]]) -> Prefix:
        """No mask is needed: what follows a shorter text is not seen by it."""
        padded = Padded.of(ids, self._decoder.device)
        cache = DynamicCache()
        with self._decoder.base():
            self._decoder(input_ids=padded.ids, past_key_values=cache, use_cache=True)
        return Prefix(cache, padded.lengths, padded.ids.shape[1])

    def _computed(self, ids: list[list[int]]) -> dict[tuple[int, ...], torch.Tensor]:
        """float16 [layers, 2, heads, tokens, head size] by text."""
        prefix = self._run(ids)
        layers = torch.stack([torch.stack([layer.keys, layer.values]) for layer in prefix.cache.layers])
        return {tuple(text): layers[:, :, place, :, : len(text)].half() for place, text in enumerate(ids)}

    def _joined(self, texts: list[torch.Tensor]) -> Prefix:
        lengths = [text.shape[3] for text in texts]
        layers, sides, heads, _, size = texts[0].shape
        device = texts[0].device
        whole = torch.zeros(layers, sides, len(texts), heads, max(lengths), size, device=device)
        for place, text in enumerate(texts):
            whole[:, :, place, :, : text.shape[3]] = text
        cache = DynamicCache((layer[0], layer[1]) for layer in whole)
        return Prefix(cache, torch.tensor(lengths, device=device), max(lengths))
