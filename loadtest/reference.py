"""Embeddings from transformers alone, each text by itself and in one pass, to compare an engine's with."""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers import AutoModel, AutoTokenizer

from galley_plugins.models import resolve
from loadtest.servers import MODEL


@functools.cache
def _loaded() -> tuple[Any, Any]:
    folder = resolve(MODEL)
    return AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(
        folder, dtype=torch.float32
    ).eval()


def _ids(text: str) -> list[int]:
    ids: list[int] = _loaded()[0](text)["input_ids"]
    return ids


def _unit(vector: torch.Tensor, dimensions: int | None = None) -> torch.Tensor:
    return torch.nn.functional.normalize(vector[:dimensions], dim=-1)


@torch.no_grad()
def hidden_states(ids: list[int], layer: int = -1) -> torch.Tensor:
    """[tokens, hidden] of one layer, numbered as transformers does."""
    return _loaded()[1](torch.tensor([ids]), output_hidden_states=True).hidden_states[layer][0]


def embed(text: str | list[int], pooling: str = "mean", dimensions: int | None = None) -> torch.Tensor:
    """[hidden] unit vector of one text, float32."""
    hidden = hidden_states(_ids(text) if isinstance(text, str) else text)
    return _unit(hidden.mean(0) if pooling == "mean" else hidden[-1], dimensions)


def instructed(instruction: str, text: str) -> torch.Tensor:
    """The mean over the text after an instruction, which is not counted."""
    ids = _ids(instruction + text)
    return _unit(hidden_states(ids)[-_tokens_of_the_end(ids, text) :].mean(0))


def echo(text: str) -> torch.Tensor:
    """The mean over the second copy of a text."""
    ids = _ids(f"Query:{text}\nQuery again:{text}")
    return _unit(hidden_states(ids)[-_tokens_of_the_end(ids, text) :].mean(0))


def _tokens_of_the_end(ids: list[int], end: str) -> int:
    """How many tokens it takes from the back until they hold `end`."""
    tokenizer = _loaded()[0]
    return next(count for count in range(1, len(ids) + 1) if end in tokenizer.decode(ids[-count:]))


def prompt_eol(sentence: str, layer: int = -1) -> torch.Tensor:
    """The last row of PromptEOL's prompt; `sentence` ends with a full stop and has no quotation marks."""
    return _unit(hidden_states(_ids(f'This sentence : "{sentence}" means in one word:"'), layer)[-1])


@torch.no_grad()
def token_prepending(sentence: str, start: int, stop: int, layer: int = -1) -> torch.Tensor:
    """Token Prepending on the same prompt, by hooks on transformers' layers `start` to `stop - 1`."""
    tokenizer, model = _loaded()
    ids = _ids(f'This sentence : <repo_name> "{sentence}" means in one word:"')
    place = ids.index(tokenizer.convert_tokens_to_ids("<repo_name>"))

    def prepend(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        hidden[:, place] = hidden[:, -1]

    hooks = [
        model.layers[index].register_forward_pre_hook(prepend, with_kwargs=True)
        for index in range(start, stop)
    ]
    try:
        return _unit(hidden_states(ids, layer)[-1])
    finally:
        for hook in hooks:
            hook.remove()


def cosine(vector: list[float], reference: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(torch.tensor(vector), reference, dim=0))


def token_count(text: str) -> int:
    return len(_ids(text))
