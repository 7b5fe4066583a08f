"""A running server as an encoder of MTEB, the Massive Text Embedding Benchmark (arXiv 2210.07316).

mteb.evaluate(ServerEncoder(EndpointEncoder(url, model), model), mteb.get_tasks(["SciFact"]), cache=None)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from galley_plugins.embedding.evaluation.metrics import unit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import NDArray

    from galley_plugins.embedding.evaluation.run import Encoder


class ServerEncoder:
    """Fulfils `mteb.models.EncoderProtocol`; vectors are compared by their cosine.

    Queries and documents go to the server with their `input_type`, texts of other tasks without one. Texts
    that are too long are cut, as MTEB's own models do it.

    Args:
        model: the name that results are kept by.
        begin: told a task and how many texts are to be embedded; its result, how many more are done.
    """

    def __init__(
        self,
        encoder: Encoder,
        model: str,
        *,
        begin: Callable[[str, int], Callable[[int], None]] = lambda task, texts: lambda count: None,
    ) -> None:
        self._encoder = encoder
        self._model = model
        self._begin = begin

    @property
    def mteb_model_meta(self) -> Any:
        """An `mteb.ModelMeta` that says the name and nothing else."""
        from mteb.models.model_meta import ModelMeta

        name = self._model if "/" in self._model else f"galley/{self._model}"
        return ModelMeta.create_empty({"name": name})

    def encode(
        self,
        inputs: Iterable[dict[str, Any]],
        *,
        task_metadata: Any,
        prompt_type: Any = None,
        **_: Any,
    ) -> NDArray[np.float32]:
        """[texts, dimensions] float32, in order.

        Args:
            inputs: batches with their texts as `text`.
            prompt_type: what all of them are: query, document or None.

        Raises:
            ServerError: with the server's own message.
        """
        texts = [text for batch in inputs for text in batch["text"]]
        fields = {} if prompt_type is None else {"input_type": str(prompt_type)}
        done = self._begin(task_metadata.name, len(texts))
        return np.asarray(self._encoder.encode(texts, done=done, truncate=True, **fields), np.float32)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> NDArray[np.float32]:
        """[rows of the first, rows of the second] float32: cosines."""
        found: NDArray[np.float32] = unit(np.asarray(embeddings1)) @ unit(np.asarray(embeddings2)).T
        return found

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> NDArray[np.float32]:
        """[rows] float32: cosines of the rows at the same places."""
        found: NDArray[np.float32] = (unit(np.asarray(embeddings1)) * unit(np.asarray(embeddings2))).sum(1)
        return found
