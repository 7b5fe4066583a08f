"""The default drafter: every source at once, scored as probabilities, cut where drafting no longer pays.

Sources: the model's own predictions under one, two and three tokens of context (Token Recycling's matrix and
ADED's tri-grams, with probabilities in the place of ranks and counts), what followed what in prompts, and the
request's own text through its suffix automaton. `mixing` turns their opinions into one probability that a
candidate is accepted; `cost` says what one more token costs. The draft of a step is the set of nodes that
makes the most tokens a second over the whole batch.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np
import torch
from numba import njit

from galley_plugins.speculation import automaton, mixing, tables
from galley_plugins.speculation.automaton import Automaton, Text
from galley_plugins.speculation.cost import StepCost, least_worthwhile, worthwhile
from galley_plugins.speculation.drafting import CONTEXT, Ask, Draft, Opening, Seen, Timing, depth_first
from galley_plugins.speculation.mixing import DEPTHS, MOST, Candidates, Mixer
from galley_plugins.speculation.store import TableFileError, load_tables, save_tables
from galley_plugins.speculation.tables import ROWS_LAYOUT, NgramTable, TableArrays, table_from_rows

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from galley_plugins.speculation.options import SpeculationOptions

PROMPT_WINDOW = 1024  # tokens of a prompt's end whose n-grams enter the table
TEXT_RATE, TEXT_FIRST = 0.2, 0.3  # how far a prompt moves a prediction; a new one's weight
RATES = (0.5, 0.6, 0.7)  # how far a prediction moves an older one under one, two, three tokens of context
PACE = 0.01  # step size of the mixing weights
DEPTH_PACE = 0.01
LEAST = 0.02  # nodes that are reached more rarely are never drafted
TOKEN_COST = 0.03  # see `StepCost`; with float weights on a CPU
PROBE, PROBED_REQUESTS = 16, 4  # each 16th step of a batch of 4 or more drafts nothing, to know its cost
GREEDY, SAMPLED = 0, 1


class _Request:
    """What the drafter holds of one request: its text, and the draft that the next step verifies."""

    def __init__(self, opening: Opening, limit: int) -> None:
        self.text = Text(opening.tokens)
        self.scope = opening.scope
        self.kind = GREEDY if opening.greedy else SAMPLED
        self.context = np.full(CONTEXT, -1, np.int32)
        tail = opening.tokens[-CONTEXT:]
        if len(tail):
            self.context[-len(tail) :] = tail
        self.ahead = 0  # tokens that `observe` has added before `extend` brings them
        self.nodes = 0
        self.tokens = np.empty(limit, np.int32)
        self.parents = np.empty(limit, np.int32)
        self.reach = np.empty(limit, np.float32)
        self.chance = np.empty(limit, np.float32)
        self.depths = np.empty(limit, np.int32)

    def keep(self, count: int) -> None:
        """Keep the first `count` nodes, and put them in depth-first order."""
        self.nodes = count
        if count > 1:
            order, parents = depth_first(self.parents[:count])
            self.parents[:count] = parents
            for column in (self.tokens, self.reach, self.chance, self.depths):
                column[:count] = column[:count][order]


class Hybrid:
    """See the module. Not safe for threads: a runner has one."""

    name = "hybrid"

    def __init__(self, options: SpeculationOptions, vocab_size: int) -> None:
        self.limit = options.max_draft_tokens
        self._budget = options.table_bytes
        self._vocab_size = vocab_size
        self.table = NgramTable(self._budget)
        self.cost = StepCost(TOKEN_COST if options.token_cost is None else options.token_cost)
        self.mixer = mixing.new_mixer()
        self._arrays = self.table.arrays()
        self._rates = np.array(RATES, np.float32)
        self._scratch = mixing.new_candidates()
        self._pool = np.empty(((self.limit + 1) * (MOST + 1), 4))
        self._requests: dict[int, _Request] = {}
        self._drafted = 0  # steps in a row
        self.worth = 0.0  # of looking for the last drafts; see `worthwhile`

    def begin(self, request: int, opening: Opening) -> None:
        opened = _Request(opening, self.limit)
        self._requests[request] = opened
        window = np.ascontiguousarray(opening.tokens[-PROMPT_WINDOW:], np.int32)
        self.table.clock += 1
        tables.learn_text(self._arrays, opened.scope, window, TEXT_RATE, TEXT_FIRST, self.table.clock)

    def observe(self, seen: Seen) -> None:
        self.table.clock += 1
        bounds = np.flatnonzero(np.diff(seen.requests, prepend=-1, append=-1))
        for start, stop in itertools.pairwise(bounds):
            opened = self._requests[int(seen.requests[start])]
            rows = slice(int(start), int(stop))
            accepted = seen.accepted[rows]
            taken = accepted[accepted >= 0]
            opened.text.reserve(len(taken))
            _absorb(
                self._scratch, self._arrays, opened.scope, opened.text.automaton, self.mixer, opened.kind,
                seen.contexts[rows], seen.top_tokens[rows], seen.top_probs[rows], accepted,
                opened.parents, opened.chance, opened.depths, min(opened.nodes, len(accepted) - 1),
                self._rates, self.table.clock,
            )  # fmt: skip
            opened.nodes = 0
            opened.ahead = len(taken)

    def extend(self, request: int, tokens: NDArray[np.int32]) -> None:
        opened = self._requests[request]
        rest = tokens[opened.ahead :]
        if len(rest):
            opened.text.extend(rest)
        opened.ahead = 0
        opened.context = np.concatenate([opened.context, tokens])[-CONTEXT:].astype(np.int32)

    def timed(self, timing: Timing) -> None:
        self.cost.add(timing)

    def propose(self, asks: Sequence[Ask]) -> list[Draft]:
        grown = []
        room = sum(min(ask.limit, self.limit) for ask in asks)
        least = max(LEAST, min(least_worthwhile(self.cost, len(asks), room), 1.0))
        for ask in asks:
            opened = self._requests[ask.request]
            opened.nodes = 0
            limit = min(ask.limit, self.limit)
            if limit > 0:
                opened.nodes = mixing.grow(
                    self._scratch, self._arrays, opened.scope, opened.text.automaton, self.mixer,
                    opened.kind, opened.context, limit, not ask.tree, least, opened.tokens, opened.parents,
                    opened.reach, opened.chance, opened.depths, self._pool,
                )  # fmt: skip
            grown.append(opened)
        reach = np.concatenate([opened.reach[: opened.nodes] for opened in grown]) if grown else np.empty(0)
        order = np.sort(reach)[::-1]
        count, self.worth = worthwhile(self.cost, len(asks), order)
        self._drafted = self._drafted + 1 if count else 0
        if self._drafted >= PROBE and len(asks) >= PROBED_REQUESTS:
            self._drafted = count = 0
        last = order[count - 1] if count else np.inf
        drafts = []
        for opened in grown:
            # Nodes come in the order of falling reach, so what stays is a tree.
            opened.keep(int((opened.reach[: opened.nodes] >= last).sum()))
            drafts.append(Draft(opened.tokens[: opened.nodes].copy(), opened.parents[: opened.nodes].copy()))
        return drafts

    def end(self, request: int) -> None:
        self._requests.pop(request, None)

    def save(self, path: str | os.PathLike[str], tokenizer: str) -> None:
        """Write the table and what was learned of the sources; raises as `store.save_tables`."""
        mixer = {f"mixer.{name}": torch.from_numpy(array) for name, array in self.mixer._asdict().items()}
        save_tables(path, self.name, tokenizer, {**self.table.rows(), **mixer}, {})

    def load(self, path: str | os.PathLike[str], tokenizer: str) -> None:
        """Put what `save` wrote in the place of what was learned; raises as `store.load_tables`."""
        layout = ROWS_LAYOUT | {
            f"mixer.{name}": (torch.float32, array.shape) for name, array in self.mixer._asdict().items()
        }
        tensors, _ = load_tables(path, self.name, tokenizer, layout)
        arrays = {name: tensors[f"mixer.{name}"].numpy().copy() for name in Mixer._fields}
        if not all(np.isfinite(array).all() for array in arrays.values()):
            raise TableFileError(f"{path}: the mixer's values are not finite")
        self.table = table_from_rows(path, tensors, self._budget, self._vocab_size)
        self._arrays = self.table.arrays()
        self.mixer = Mixer(**arrays)


@njit(cache=True)
def _absorb(
    c: Candidates,
    table: TableArrays,
    scope: int,
    a: Automaton,
    mixer: Mixer,
    kind: int,
    contexts: NDArray[np.int32],
    top_tokens: NDArray[np.int32],
    top_probs: NDArray[np.float32],
    accepted: NDArray[np.int32],
    parents: NDArray[np.int32],
    chance: NDArray[np.float32],
    depths: NDArray[np.int32],
    nodes: int,
    rates: NDArray[np.float32],
    clock: int,
) -> None:
    """Learn from one request's rows: its last token, then its draft's nodes."""
    for node in range(nodes):
        parent = parents[node]
        if parent < 0 or accepted[parent + 1] >= 0:
            depth = min(depths[node], DEPTHS - 1)
            truth = 1.0 if accepted[node + 1] >= 0 else 0.0
            mixer.depth[kind, depth] += DEPTH_PACE * (truth - chance[node])
    token = np.empty(1, np.int32)
    scopes = np.full(1, scope, np.int64)
    for row in range(len(accepted)):
        if accepted[row] >= 0:
            state, length = automaton.matched(a)
            found = mixing.gather(
                c, table, scope, a, state, length, contexts[row, 0], contexts[row, 1], contexts[row, 2]
            )
            mixing.score(c, found, mixer, kind, 0)
            mixing.teach(c, found, mixer, kind, accepted[row], PACE)
        tables.learn_predictions(
            table, scopes, contexts[row : row + 1], top_tokens[row : row + 1], top_probs[row : row + 1],
            rates, clock,
        )  # fmt: skip
        if accepted[row] >= 0:
            token[0] = accepted[row]
            automaton.extend(a, token)
