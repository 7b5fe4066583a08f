"""Which drafter `speculation.method` names."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from galley_plugins.speculation.drafting import Drafter
    from galley_plugins.speculation.options import SpeculationOptions


def make_drafter(options: SpeculationOptions, vocab_size: int, tokenizer: str | None = None) -> Drafter:
    """Make the drafter of `options.method`.

    Args:
        tokenizer: the hash of the model's tokenizer, as `store.tokenizer_hash` gives it; needed to load
            `options.corpus`.

    Raises:
        ValueError: the method is none of a drafter, or a corpus is given without a tokenizer.
        FileNotFoundError, TableFileError: the corpus cannot be loaded.
    """
    if options.method == "hybrid":
        from galley_plugins.speculation.hybrid import Hybrid

        return Hybrid(options, vocab_size)
    if options.method == "trigram":
        from galley_plugins.speculation.corpus import load_corpus
        from galley_plugins.speculation.trigram import Trigram

        if options.corpus is None:
            return Trigram(options, vocab_size)
        if tokenizer is None:
            raise ValueError("speculation.corpus: the tokenizer's hash is missing")
        corpus = load_corpus(options.corpus, tokenizer, vocab_size, options.trigram.successors)
        return Trigram(options, vocab_size, corpus)
    if options.method == "recycling":
        from galley_plugins.speculation.recycling import Recycling

        return Recycling(options, vocab_size)
    if options.method == "prompt-lookup":
        from galley_plugins.speculation.prompt_lookup import PromptLookup

        return PromptLookup(options, vocab_size)
    raise ValueError(
        f"speculation.method: no drafter is made for {options.method!r}, "
        "expected hybrid, trigram, recycling or prompt-lookup"
    )
