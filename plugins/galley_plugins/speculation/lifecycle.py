"""From options to a drafter that knows what an earlier process learned, and back to the file."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from galley_plugins.speculation.drafters import make_drafter
from galley_plugins.speculation.store import TableFileError, tokenizer_hash

if TYPE_CHECKING:
    from collections.abc import Callable

    from galley_plugins.speculation.drafting import Drafter
    from galley_plugins.speculation.options import SpeculationOptions

logger = logging.getLogger("vllm.galley.speculation")


class DrafterFiles:
    """Loads a drafter's tables at start and saves them at the end.

    A file that is damaged, or of another tokenizer, version or drafter, is refused with a warning that names
    it, and the worker starts cold. With `scope: request` nothing may outlive its request, so that
    nothing is saved or loaded.

    Args:
        tokenizer: a folder or hub id, read only where a file needs it.
    """

    def __init__(self, options: SpeculationOptions, vocab_size: int, tokenizer: str) -> None:
        self._options = options
        self._vocab_size = vocab_size
        self._tokenizer = tokenizer
        self._hash: str | None = None

    def open(self) -> Drafter:
        """The drafter of the options; without its corpus or tables where these cannot be used."""
        options = self._options
        corpus_hash = self._tokenizer_hash() if options.corpus else None
        try:
            drafter = make_drafter(options, self._vocab_size, corpus_hash)
        except (TableFileError, FileNotFoundError) as error:
            logger.warning("speculation starts without its corpus: %s", error)
            drafter = make_drafter(replace(options, corpus=None), self._vocab_size)
        load: Callable[[Any, str], None] | None = getattr(drafter, "load", None)
        if load is None or not self._kept:
            return drafter
        try:
            load(options.tables, self._tokenizer_hash())
            logger.info("speculation goes on with the tables of %s", options.tables)
        except FileNotFoundError:
            logger.info("speculation starts cold: %s is not there yet", options.tables)
        except TableFileError as error:
            logger.warning("speculation starts cold: %s", error)
        return drafter

    def save(self, drafter: Drafter) -> None:
        """Write the drafter's tables where the options name a file; a failure is logged."""
        save: Callable[[Any, str], None] | None = getattr(drafter, "save", None)
        if save is None or not self._kept:
            return
        try:
            save(self._options.tables, self._tokenizer_hash())
        except TableFileError as error:
            logger.warning("speculation's tables are lost: %s", error)

    @property
    def _kept(self) -> bool:
        return self._options.tables is not None and self._options.scope != "request"

    def _tokenizer_hash(self) -> str:
        if self._hash is None:
            self._hash = tokenizer_hash(self._tokenizer)
        return self._hash
