"""Perplexity of a text under a model alone, mixed with its memory, and mixed with kNN-LM."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from galley_plugins.memory.building.build import device_of
from galley_plugins.memory.building.corpus import Corpus, CorpusError
from galley_plugins.memory.building.mixture import mixture
from galley_plugins.memory.building.states import StateReader
from galley_plugins.memory.building.training import following_columns, following_probabilities
from galley_plugins.memory.checkpoint import Base, check_base, load_network, memory_folder
from galley_plugins.memory.knn import KnnLm

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray


def evaluate(
    path: Path,
    text: Path,
    model: Path,
    *,
    context: int = 1024,
    windows: int | None = None,
    knn: bool = False,
    device: str = "auto",
    advance: Callable[[int], Callable[[int], None]] = lambda total: lambda tokens: None,
) -> dict[str, Any]:
    """Rows of name, weight, nats a token, perplexity, and gain over the model alone.

    Args:
        path: folder of a build or of a memory.
        windows: only so many of `context` tokens, from the text's beginning; they do not overlap.
        knn: over the build's datastore, at the temperature and weight that suited its held-out text.
        advance: given the tokens in all, returns what is told of those done since its last call.

    Raises:
        MemoryFileError: the memory is not one of this model.
        StageError: kNN-LM was asked for, and the build has no datastore or teacher.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    folder = memory_folder(path)
    base = Base.of(model, tokenizer)
    settings = check_base(folder, base)
    network, columns = load_network(folder, settings, model)
    where = device_of(device)
    network = network.to(where)
    search = KnnLm(path, base, where) if knn else None
    reader = StateReader(model, settings.layer, where)
    parts: dict[str, list[NDArray[Any]]] = {"plain": [], "memory": [], "knn": []}
    pieces = _windows(Corpus(text), tokenizer, context, windows)
    told = advance(sum(len(ids) - 1 for ids in pieces))
    for ids in pieces:
        row = torch.from_numpy(ids.astype(np.int64))[None]
        states, likelihoods = reader.states_and_likelihoods(row[:, :-1], row[:, 1:])
        keys = states[0].half().cpu().numpy()
        following = ids[1:].astype(np.int32)
        parts["plain"].append(likelihoods[0].cpu().numpy())
        parts["memory"].append(following_probabilities(network, keys, following_columns(following, columns)))
        if search is not None:
            parts["knn"].append(search.following(keys, following))
        told(len(ids) - 1)
    plain = np.concatenate(parts["plain"])
    alone = -float(plain.mean(dtype=np.float64))
    rows = [_row("plain", None, alone, alone)]
    mixes = [("memory", settings.weight)] + ([("knn", search.weight)] if search is not None else [])
    for name, weight in mixes:
        mix = mixture(plain, np.concatenate(parts[name]), weight)
        rows.append(_row("kNN-LM" if name == "knn" else name, weight, mix.nats, mix.plain))
    return {"tokens": len(plain), "rows": rows}


def _windows(corpus: Corpus, tokenizer: Any, context: int, most: int | None) -> list[NDArray[np.int32]]:
    """Token ids, up to context + 1 of a document each; the last of one is the first of the next.

    Raises:
        CorpusError: the text has no two tokens.
    """
    found: list[NDArray[np.int32]] = []
    text: list[int] = []
    for piece in corpus.pieces():
        text += tokenizer(piece.text, add_special_tokens=False, verbose=False)["input_ids"]
        while len(text) > context or (piece.last and len(text) > 1):
            if most is not None and len(found) == most:
                return found
            found.append(np.array(text[: context + 1], np.int32))
            text = text[context:]
        if piece.last:
            text = []
    if not found:
        raise CorpusError(f"{corpus.path}: found no two tokens, expected a text")
    return found


def _row(name: str, weight: float | None, nats: float, plain: float) -> dict[str, Any]:
    return {
        "name": name,
        "weight": weight,
        "nats": nats,
        "perplexity": math.exp(nats),
        "gain": plain - nats,
    }
