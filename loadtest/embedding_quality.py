"""How good a method's vectors are, and whether they are transformers', both through a live server."""

from __future__ import annotations

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from galley_plugins.embedding.evaluation.encoder import EndpointEncoder
from galley_plugins.embedding.evaluation.run import evaluate
from loadtest import reference
from loadtest.servers import MODEL, NAME

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import torch
    from numpy.typing import NDArray

    from galley_plugins.embedding.evaluation.run import Encoder
    from loadtest.servers import Server

CHAT_CLIENTS = 4
CHATS = ("Name three facts about iron.", "Why do people build bridges?", "Write two sentences about bread.")
MINILM_TOKENS = 256  # what its authors cut texts to
MINILM_BATCH = 32


class Silent:
    """Progress that nobody watches."""

    def begin(self, task: str, texts: int) -> Callable[[int], None]:
        return lambda count: None


def quality(encoder: Encoder, folder: Path, tasks: Sequence[str], limit: int | None) -> dict[str, float]:
    """By task, the figure of `galley embed eval`."""
    found = evaluate(folder, encoder, Silent(), tasks=tasks, limit=limit)
    return {result.task: round(result.value, 3) for result in found}


def endpoint(server: Server) -> Encoder:
    return EndpointEncoder(server.url, NAME)


def reference_of(method: str, adapters: Path | None) -> Callable[[str], torch.Tensor] | None:
    """The method by transformers alone; None for an adapter whose prompt such a reference does not know."""
    if method in ("mean", "last"):
        return partial(reference.embed, pooling=method)
    if method == "token-prepending":
        from transformers import AutoConfig

        from galley_plugins.embedding.methods.token_prepending import START_LAYER, family_of
        from galley_plugins.models import resolve

        family = family_of(AutoConfig.from_pretrained(resolve(MODEL)))
        return partial(
            reference.token_prepending,
            start=START_LAYER,
            stop=family.exit_layer,
            layer=family.output_layer,
            before={"prompt-eol": "This", "knowledge": reference.KNOWLEDGE}[family.prompt],
        )
    if method in ("prompt-eol", "echo"):
        return reference.prompt_eol if method == "prompt-eol" else reference.echo
    assert adapters is not None
    return _trained_reference(method, adapters / method)


def _trained_reference(method: str, folder: Path) -> Callable[[str], torch.Tensor] | None:
    from safetensors.torch import load_file

    from galley_plugins.embedding.adapter import ENCODER, WEIGHTS, load_settings

    settings = load_settings(folder)
    if settings.options.get("prompt", "plain") != "plain":
        return None
    tensors = {name: tensor.float() for name, tensor in load_file(folder / WEIGHTS).items()}
    if method == "gem":
        return partial(reference.gem, tensors=tensors, combine=settings.sizes["combine"])
    if method == "nv-embed":
        return partial(reference.nv_embed, tensors=tensors, heads=settings.sizes["heads"])
    unit = settings.sizes.get("parts") == "unit"
    return partial(reference.causal2vec, tensors=tensors, encoder=folder / ENCODER, unit=unit)


class Chats:
    """Clients that chat, one short answer after another, while the scope lasts."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(CHAT_CLIENTS)

    def __enter__(self) -> Chats:
        self._clients = [self._pool.submit(self._run) for _ in range(CHAT_CLIENTS)]
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._pool.shutdown()

    def count(self) -> int:
        """How many were answered, after the scope.

        Raises:
            AssertionError: one was refused.
        """
        return sum(client.result() for client in self._clients)

    def _run(self) -> int:
        for turn in itertools.count():
            if self._stop.is_set():
                return turn
            self._server.chat(CHATS[turn % len(CHATS)], max_tokens=32)
        raise AssertionError("never ends by itself")


def cosines(
    server: Server, expected_of: Callable[[str], torch.Tensor] | None, texts: Sequence[str]
) -> dict[str, Any]:
    """With each text's own request, and all in one, beside chats; nothing where there is no reference."""
    if expected_of is None:
        return {}
    expected = [expected_of(text) for text in texts]
    with Chats(server) as chats:
        with ThreadPoolExecutor(CHAT_CLIENTS) as pool:
            vectors = [rows[0] for rows in pool.map(server.embed, texts)]
        vectors += server.embed(list(texts))
    found = [
        reference.cosine(vector, row) for vector, row in zip(vectors, itertools.cycle(expected), strict=False)
    ]
    return {"cosines": found, "chats": chats.count()}


class MiniLm:
    """all-MiniLM-L6-v2 by transformers: the mean of the last hidden states, float32.

    Args:
        folder: its configuration, tokenizer and weights.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModel, AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model = AutoModel.from_pretrained(folder, dtype="float32").eval()

    def encode(
        self, texts: Sequence[str], *, done: Callable[[int], None] = lambda count: None, **fields: Any
    ) -> NDArray[np.float32]:
        """[texts, hidden] float32, in order; it knows no `fields`."""
        order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
        rows: list[NDArray[np.float32] | None] = [None] * len(texts)
        for start in range(0, len(order), MINILM_BATCH):
            places = order[start : start + MINILM_BATCH]
            for place, row in zip(places, self._batch([texts[place] for place in places]), strict=True):
                rows[place] = row
            done(len(places))
        return np.stack([row for row in rows if row is not None])

    def _batch(self, texts: list[str]) -> NDArray[np.float32]:
        import torch

        inputs = self._tokenizer(
            texts, padding=True, truncation=True, max_length=MINILM_TOKENS, return_tensors="pt"
        )
        with torch.inference_mode():
            hidden = self._model(**inputs).last_hidden_state  # [texts, tokens, hidden]
        mask = inputs["attention_mask"].unsqueeze(-1)
        vectors: NDArray[np.float32] = ((hidden * mask).sum(1) / mask.sum(1)).numpy()
        return vectors
