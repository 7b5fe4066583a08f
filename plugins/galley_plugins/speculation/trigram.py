"""ADED: a tri-gram table that adapts to the text, and a Monte-Carlo tree search over it.

ADED, published as Adaptix (arXiv 2407.12021), and its authors' code. Differences: the score of a roll-out is
the paper's (see `search`), the learned table is bounded and kept by scope, and drafts are cut by visits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from galley_plugins.speculation import search, trigram_table
from galley_plugins.speculation.corpus import MOST_SUCCESSORS, empty_corpus
from galley_plugins.speculation.drafting import Draft
from galley_plugins.speculation.store import TableFileError, load_tables, save_tables

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from galley_plugins.speculation.corpus import Corpus
    from galley_plugins.speculation.drafting import Ask, Opening, Seen, Timing
    from galley_plugins.speculation.options import SpeculationOptions


class Trigram:
    """Drafts by tri-gram weights P(c | a, b): probabilities of a corpus, raised by what texts of a scope say.

    The weights are float32 and not normalised. A bi-gram has at most 32 successors: the corpus's 12, and what
    was learned, of which the authors bound nothing; the weakest gives way. `table_bytes` bounds what is
    learned, the least recently learned bi-gram giving way; a corpus takes its file's size besides.

    Args:
        corpus: the table that every scope starts from.
    """

    name = "trigram"

    def __init__(self, options: SpeculationOptions, vocab_size: int, corpus: Corpus | None = None) -> None:
        self._options = options.trigram
        self._vocab_size = vocab_size
        self._budget = options.table_bytes
        self._corpus = empty_corpus() if corpus is None else corpus
        self.table = trigram_table.new_trigrams(self._budget)
        self._tree = search.new_tree(self._options.iterations)
        self._scopes: dict[int, int] = {}
        self._windows: dict[int, NDArray[np.int32]] = {}  # the last tokens of each request

    def begin(self, request: int, opening: Opening) -> None:
        self._scopes[request] = opening.scope
        self._windows[request] = self._window(opening.tokens)

    def observe(self, seen: Seen) -> None:
        """Nothing is learned from predictions."""

    def extend(self, request: int, tokens: NDArray[np.int32]) -> None:
        """Learn: once a step, every tri-gram of the text's last 16 tokens gains 0.04, up to 3.

        A tri-gram gains as long as it lies in the window, about 14 times for one token a step. A prompt's
        tokens count if they are among the last ones when the first token is generated.
        """
        window = self._window(np.concatenate([self._windows[request], tokens]))
        self._windows[request] = window
        chosen = self._options
        trigram_table.adapt(self.table, self._corpus, self._scopes[request], window, chosen.gain, chosen.cap)

    def timed(self, timing: Timing) -> None:
        """Costs change nothing: the limit is the asker's."""

    def propose(self, asks: Sequence[Ask]) -> list[Draft]:
        return [self._draft(ask) for ask in asks]

    def end(self, request: int) -> None:
        self._scopes.pop(request, None)
        self._windows.pop(request, None)

    def save(self, path: str | os.PathLike[str], tokenizer: str) -> None:
        """Write what was learned; raises as `store.save_tables`."""
        names = ("keys", "sizes", "tokens", "weights")
        arrays = trigram_table.export(self.table)
        tensors = {name: torch.from_numpy(array) for name, array in zip(names, arrays, strict=True)}
        save_tables(path, self.name, tokenizer, tensors, {})

    def load(self, path: str | os.PathLike[str], tokenizer: str) -> None:
        """Put what `save` wrote in the place of what was learned; raises as `store.load_tables`.

        A table of another `table_bytes` is taken too; the least recently learned is what may not fit.
        """
        layout: dict[str, tuple[torch.dtype, tuple[int | None, ...]]] = {
            "keys": (torch.int64, (None,)),
            "sizes": (torch.int32, (None,)),
            "tokens": (torch.int32, (None,)),
            "weights": (torch.float32, (None,)),
        }
        tensors, _ = load_tables(path, self.name, tokenizer, layout)
        keys, sizes, tokens, weights = (tensors[name].numpy() for name in layout)
        if (
            len(keys) != len(sizes)
            or len(tokens) != len(weights)
            or int(sizes.sum()) != len(tokens)
            or not ((sizes > 0) & (sizes <= MOST_SUCCESSORS)).all()
            or not ((tokens >= 0) & (tokens < self._vocab_size)).all()
            or not (np.isfinite(weights) & (weights > 0)).all()
        ):
            raise TableFileError(f"{path}: sizes, tokens or weights are out of range")
        self.table = trigram_table.new_trigrams(self._budget)
        trigram_table.restore(self.table, keys, sizes, tokens, weights)

    def _window(self, tokens: NDArray[np.int32]) -> NDArray[np.int32]:
        return np.array(tokens[-self._options.window :], np.int32)

    def _draft(self, ask: Ask) -> Draft:
        window = self._windows[ask.request]
        if ask.limit <= 0 or len(window) < 2:
            return Draft.empty()
        chosen, scope = self._options, self._scopes[ask.request]
        nodes = search.search(
            self._tree,
            self.table,
            self._corpus,
            scope,
            int(window[-2]),
            int(window[-1]),
            chosen.iterations,
            chosen.depth,
            chosen.c1,
            chosen.c2,
        )
        tokens = np.empty(ask.limit, np.int32)
        if not ask.tree:
            count = search.walk(self._tree, self.table, self._corpus, scope, tokens)
            return Draft.chain(tokens[:count])
        parents = np.empty(ask.limit, np.int32)
        count = search.merge(
            self._tree, nodes, self.table, self._corpus, scope, chosen.paths, tokens, parents
        )
        return Draft(tokens[:count], parents[:count])
