"""Embeddings from transformers alone, each text by itself and in one pass, to compare an engine's with."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModel, AutoTokenizer

from galley_plugins.models import resolve
from loadtest.servers import MODEL

if TYPE_CHECKING:
    from pathlib import Path


KNOWLEDGE = (
    "The essence of a sentence is often captured by its main subjects and actions, while descriptive terms "
    "provide additional but less central details. With this in mind , this"
)


def _loaded(weights: str = MODEL) -> tuple[Any, Any]:
    return _load(weights)


@functools.cache
def _load(weights: str) -> tuple[Any, Any]:
    folder = resolve(weights)
    return AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(
        folder, dtype=torch.float32
    ).eval()


def _ids(text: str) -> list[int]:
    ids: list[int] = _loaded()[0](text)["input_ids"]
    return ids


def _unit(vector: torch.Tensor, dimensions: int | None = None) -> torch.Tensor:
    return torch.nn.functional.normalize(vector[:dimensions], dim=-1)


@torch.no_grad()
def hidden_states(ids: list[int], layer: int = -1, weights: str = MODEL) -> torch.Tensor:
    """[tokens, hidden] of one layer, numbered as transformers does."""
    return _loaded(weights)[1](torch.tensor([ids]), output_hidden_states=True).hidden_states[layer][0]


def embed(
    text: str | list[int], pooling: str = "mean", dimensions: int | None = None, weights: str = MODEL
) -> torch.Tensor:
    """[hidden] unit vector of one text, float32."""
    hidden = hidden_states(_ids(text) if isinstance(text, str) else text, weights=weights)
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
def token_prepending(
    sentence: str, start: int, stop: int, layer: int = -1, before: str = "This"
) -> torch.Tensor:
    """Token Prepending by hooks on transformers' layers `start` to `stop - 1`; `before` opens the prompt."""
    tokenizer, model = _loaded()
    ids = _ids(f'{before} sentence : <repo_name> "{sentence}" means in one word:"')
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


@torch.no_grad()
def splade(text: str) -> torch.Tensor:
    """[vocabulary] weights of a SPLADE head over the second copy of a text, not of length 1."""
    ids = _ids(f"Query:{text}\nQuery again:{text}")
    rows = hidden_states(ids)[-_tokens_of_the_end(ids, text) :]
    embeddings = _loaded()[1].get_input_embeddings().weight  # the model's output layer is its input layer
    return torch.log1p(torch.relu(rows @ embeddings.T)).amax(0)


Tensors = dict[str, torch.Tensor]


@torch.no_grad()
def _adapted(inputs: torch.Tensor, tensors: Tensors, rows: slice, *, causal: bool = True) -> torch.Tensor:
    """[tokens, hidden] of the last layer, with LoRA x A^T B^T on some rows.

    Args:
        inputs: [tokens, hidden] embeddings.
        tensors: LoRA's, by layer and module.
    """
    model = _loaded()[1]

    def hook(name: str) -> Any:
        def add(module: Any, args: tuple[Any, ...], output: torch.Tensor) -> None:
            down, up = tensors[f"{name}.A"], tensors[f"{name}.B"]
            output[:, rows] += args[0][:, rows] @ down.T @ up.T

        return add

    names = {name.rsplit(".", 1)[0] for name in tensors if name.startswith("layers.")}
    hooks = [model.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    mask = None if causal else torch.zeros(1, 1, len(inputs), len(inputs))
    try:
        return model(inputs_embeds=inputs[None], attention_mask=mask).last_hidden_state[0]
    finally:
        for handle in hooks:
            handle.remove()


def _embeddings(ids: list[int]) -> torch.Tensor:
    return _loaded()[1].get_input_embeddings().weight[torch.tensor(ids)].detach()


def gem(text: str, tensors: Tensors, combine: str = "mean") -> torch.Tensor:
    """Special tokens after the text, one at a time, LoRA on their rows alone."""
    ids = _embeddings(_ids(text))
    found = [
        _adapted(torch.cat([ids, special[None]]), tensors, slice(-1, None))[-1]
        for special in tensors["special"]
    ]
    rows = torch.stack(found)
    return _unit(rows.mean(0) if combine == "mean" else rows.flatten())


@torch.no_grad()
def causal2vec(text: str, tensors: Tensors, encoder: Path, *, unit: bool = False) -> torch.Tensor:
    """Contextual token, text, end of text; first and last row side by side."""
    batch = AutoTokenizer.from_pretrained(encoder)(
        [text], return_tensors="pt", truncation=True, max_length=256
    )
    states = AutoModel.from_pretrained(encoder, dtype=torch.float32).eval()(**batch).last_hidden_state[0]
    summary = states.mean(0)
    summary = summary / summary.norm() * summary.numel() ** 0.5
    middle = tensors["projection.0.weight"] @ summary + tensors["projection.0.bias"]
    context = tensors["projection.2.weight"] @ torch.nn.functional.gelu(middle) + tensors["projection.2.bias"]
    end = _loaded()[0].eos_token_id
    rows = _adapted(torch.cat([context[None], _embeddings([*_ids(text), end])]), tensors, slice(None))
    first, last = rows[0], rows[-1]
    return _unit(torch.cat([_unit(first), _unit(last)] if unit else [first, last]))


def nv_embed(text: str, tensors: Tensors, heads: int, instruction: str = "") -> torch.Tensor:
    """All tokens see all; latent attention; the mean over the text and its end, without the instruction."""
    ids = _ids(instruction + text)
    rows = _adapted(_embeddings([*ids, _loaded()[0].eos_token_id]), tensors, slice(None), causal=False)
    kept = _tokens_of_the_end(ids, text) + 1
    return _unit(latent_attention(rows, tensors, heads)[-kept:].mean(0))


@torch.no_grad()
def latent_attention(rows: torch.Tensor, tensors: Tensors, heads: int) -> torch.Tensor:
    """NV-Embed's head as its paper describes it, head by head; [tokens, d] to [tokens, d]."""
    own = {name.removeprefix("latent_attention_model."): tensor for name, tensor in tensors.items()}
    attend, feed = "cross_attend_blocks.0.", "cross_attend_blocks.1."

    def norm(values: torch.Tensor, name: str) -> torch.Tensor:
        values = values - values.mean(-1, keepdim=True)
        values = values / (values.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        return values * own[f"{name}.weight"] + own[f"{name}.bias"]

    context = norm(own["latents"], f"{attend}norm_context")
    queries = norm(rows, f"{attend}norm") @ own[f"{attend}fn.to_q.weight"].T
    keys, values = (context @ own[f"{attend}fn.to_kv.weight"].T).chunk(2, -1)
    size = queries.shape[1] // heads
    found = []
    for start in range(0, heads * size, size):
        part = slice(start, start + size)
        shares = torch.softmax(queries[:, part] @ keys[:, part].T / size**0.5, -1)
        found.append(shares @ values[:, part])
    rows = rows + torch.cat(found, -1) @ own[f"{attend}fn.to_out.weight"].T
    inner = norm(rows, f"{feed}norm") @ own[f"{feed}fn.net.0.weight"].T + own[f"{feed}fn.net.0.bias"]
    value, gate = inner.chunk(2, -1)
    gated = value * torch.nn.functional.gelu(gate)
    return rows + gated @ own[f"{feed}fn.net.2.weight"].T + own[f"{feed}fn.net.2.bias"]


def cosine(vector: list[float], reference: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(torch.tensor(vector), reference, dim=0))


def token_count(text: str) -> int:
    return len(_ids(text))
