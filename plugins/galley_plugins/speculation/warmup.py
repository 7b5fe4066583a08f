"""Compile what drafting needs before the first request waits for it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from galley_plugins.speculation import verification
from galley_plugins.speculation.drafters import make_drafter
from galley_plugins.speculation.drafting import CONTEXT, TOP, Ask, Opening, Seen, Timing
from galley_plugins.speculation.options import MiB
from galley_plugins.speculation.top_candidates import best_tokens, top_candidates

if TYPE_CHECKING:
    from galley_plugins.speculation.options import SpeculationOptions


def warm_up(options: SpeculationOptions, vocab_size: int) -> None:
    """Take a throw-away drafter of the same kind through a few steps."""
    drafter = make_drafter(replace(options, table_bytes=MiB, tables=None, corpus=None), vocab_size)
    text = np.tile(np.arange(1, 6, dtype=np.int32), 8) % vocab_size
    drafter.begin(0, Opening(text))
    for tree in (True, False):
        (draft,) = drafter.propose([Ask(0, options.max_draft_tokens, tree)])
        draft = draft.depth_first()
        rows = 1 + len(draft.tokens)
        inputs = np.concatenate([text[-1:], draft.tokens]).astype(np.int32)
        counts, ends = np.array([rows - 1], np.int32), np.array([rows], np.int32)
        _, starts, tokens, parents = verification.chain_rows(inputs, counts, ends)
        parents[1:] = draft.parents + 1
        for dtype in (torch.bfloat16, torch.float32):
            logits = torch.zeros(rows, vocab_size, dtype=dtype)
            top_tokens, top_probs = top_candidates(logits)
            best_tokens(logits)
        assert top_tokens.shape == (rows, TOP)
        best = np.ascontiguousarray(top_tokens[:, 0])
        gained, taken = verification.walk(best, starts, tokens, parents)
        requests, contexts, accepted = verification.shown(
            text[None], np.array([len(text)], np.int32), np.zeros(1, np.int32), starts, tokens, parents,
            gained, taken,
        )  # fmt: skip
        assert contexts.shape == (rows, CONTEXT)
        drafter.observe(Seen(requests, contexts, top_tokens, top_probs, accepted))
        drafter.extend(0, gained[0][gained[0] >= 0])
        drafter.timed(Timing(rows, 1, 0.05))
    drafter.end(0)
