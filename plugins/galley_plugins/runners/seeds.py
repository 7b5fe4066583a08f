"""Seeded sampling of prompts that span several prefill chunks, on runner V1 on a CPU.

vLLM samples a token at the end of every chunk and drops all but the last. Where the request has a seed it
then turns the generator back by its offset, which a CPU generator does not have: the engine dies of it. Here
the generators of rows whose sample will be dropped are held back, so that nothing is drawn from them.
"""

from __future__ import annotations

from typing import Any


class SeededChunks:
    """Mixed in before vLLM's V1 CPU runner."""

    def sample_tokens(self: Any, grammar_output: Any) -> Any:
        generators = self.input_batch.generators  # row -> generator; the sampler reads the same dict
        dropped = [row for row in generators if self.discard_request_mask.np[row]]
        held = {row: generators.pop(row) for row in dropped}
        try:
            return super().sample_tokens(grammar_output)  # type: ignore[misc]
        finally:
            generators.update(held)


def with_seeded_chunks(base: type[Any]) -> type[Any]:
    """`base`, a V1 CPU runner, with the mixin and its own name."""
    return type(base.__name__, (SeededChunks, base), {})
