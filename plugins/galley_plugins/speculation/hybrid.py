"""The default drafter: every source at once, scored as probabilities, cut where drafting no longer pays.

Sources: the model's own predictions under one, two and three tokens of context (Token Recycling's matrix and
ADED's tri-grams, with probabilities in the place of ranks and counts), what followed what in prompts, and the
request's own text through its suffix automaton. `mixing` turns their opinions into one probability that a
candidate is accepted, looking at the last rows' predictions too; `cost` says what one more token costs. The
draft of a step is the set of nodes that makes the most tokens a second over the whole batch, or in a small
one a few more that nearly pay.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np
import torch
from numba import njit

from galley_plugins.speculation import automaton, mixing, tables
from galley_plugins.speculation.automaton import Text
from galley_plugins.speculation.cost import StepCost, least_worthwhile, worthwhile
from galley_plugins.speculation.drafting import CONTEXT, TOP, Ask, Draft, Opening, Seen, Timing, depth_first
from galley_plugins.speculation.mixing import DEPTHS, RECENT, Mixer
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
PACE = 0.005  # step size of the mixing weights, of which two sets move at once
DEPTH_PACE = 0.01
LEAST = 0.02  # nodes that are reached more rarely are never drafted
TOKEN_COST = 0.03  # see `StepCost`; with float weights on a CPU
PROBE, PROBED_REQUESTS = 16, 4  # each 16th step of a batch of 4 or more drafts nothing, to know its cost
GREEDY, SAMPLED = 0, 1


class _Request:
    """What the drafter holds of one request: its text, and the draft that the next step verifies.

    Attributes:
        context: int32 [3], the text's last tokens; -1 before it.
        recent: int32 [recent, top], predictions at the answer's last rows, newest first; -1 before.
        ahead: tokens that `observe` has added before `extend` brings them.
        nodes: of the draft.
        shape: int32 [3, limit], each node's token, parent and depth.
        odds: float32 [2, limit], the probability that each is accepted, and that given that its parent is.
    """

    def __init__(self, opening: Opening, limit: int) -> None:
        self.text = Text(opening.tokens)
        self.scope = opening.scope
        self.kind = GREEDY if opening.greedy else SAMPLED
        self.context = np.full(CONTEXT, -1, np.int32)
        tail = opening.tokens[-CONTEXT:]
        if len(tail):
            self.context[-len(tail) :] = tail
        self.recent = np.full((RECENT, TOP), -1, np.int32)
        self.ahead = 0
        self.nodes = 0
        self.shape = np.empty((3, limit), np.int32)
        self.odds = np.empty((2, limit), np.float32)


class Hybrid:
    """See the module. Not safe for threads: a runner has one."""

    name = "hybrid"

    def __init__(self, options: SpeculationOptions, vocab_size: int) -> None:
        self.limit = options.max_draft_tokens
        self._budget = options.table_bytes
        self._vocab_size = vocab_size
        self.table = NgramTable(self._budget)
        self.cost = StepCost(TOKEN_COST if options.token_cost is None else options.token_cost)
        self._mixer = mixing.new_mixer()
        self._arrays = self.table.arrays()
        self._requests: dict[int, _Request] = {}
        self._drafted = 0  # steps in a row
        self.worth = 0.0  # of looking for the last drafts; see `worthwhile`

    def begin(self, request: int, opening: Opening) -> None:
        opened = _Request(opening, self.limit)
        self._requests[request] = opened
        window = np.ascontiguousarray(opening.tokens[-PROMPT_WINDOW:], np.int32)
        self.table.clock += 1
        tables.learn_text(self._arrays, opened.scope, window, TEXT_RATE, TEXT_FIRST, self.table.clock)

    @property
    def mixer(self) -> Mixer:
        found: Mixer = mixing.mixer_in(self._mixer)
        return found

    def observe(self, seen: Seen) -> None:
        self.table.clock += 1
        bounds = _bounds(seen.requests).tolist()
        for start, stop in itertools.pairwise(bounds):
            opened = self._requests[int(seen.requests[start])]
            opened.text.reserve(stop - start)
            opened.ahead = _absorb(
                self._arrays, opened.scope, opened.text.memory, self._mixer, opened.kind, seen.contexts,
                seen.top_tokens, seen.top_probs, seen.accepted, start, stop, opened.shape, opened.odds,
                opened.nodes, opened.context, opened.recent, self.table.clock,
            )  # fmt: skip
            opened.nodes = 0

    def extend(self, request: int, tokens: NDArray[np.int32]) -> None:
        opened = self._requests[request]
        rest = tokens[opened.ahead :]
        opened.ahead = 0
        if len(rest):
            opened.text.extend(rest)
            opened.context = np.concatenate([opened.context, rest])[-CONTEXT:].astype(np.int32)

    def timed(self, timing: Timing) -> None:
        self.cost.add(timing)

    def propose(self, asks: Sequence[Ask]) -> list[Draft]:
        room = sum(min(ask.limit, self.limit) for ask in asks)
        least = max(LEAST, min(least_worthwhile(self.cost, len(asks), room), 1.0))
        grown = []
        for ask in asks:
            opened = self._requests[ask.request]
            limit = min(ask.limit, self.limit)
            opened.nodes = limit and mixing.grow(
                self._arrays, opened.scope, opened.text.memory, self._mixer, opened.kind, opened.context,
                opened.recent, limit, not ask.tree, least, opened.shape, opened.odds,
            )  # fmt: skip
            grown.append(opened)
        reach = [opened.odds[0, : opened.nodes] for opened in grown if opened.nodes]
        # Of one request, nodes come in the order of falling reach.
        order = reach[0] if len(reach) == 1 else -np.sort(-np.concatenate(reach)) if reach else _NOTHING
        count, self.worth = worthwhile(self.cost, len(asks), order)
        self._drafted = self._drafted + 1 if count else 0
        if self._drafted >= PROBE and len(asks) >= PROBED_REQUESTS:
            self._drafted = count = 0
        last = float(order[count - 1]) if count else np.inf
        drafts = []
        for opened in grown:
            if opened.nodes:
                opened.nodes = _keep(opened.shape, opened.odds, opened.nodes, last)
            if opened.nodes:
                tokens, parents, _ = opened.shape[:, : opened.nodes].copy()
                drafts.append(Draft(tokens, parents))
            else:
                drafts.append(_NO_DRAFT)
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
        for name, array in self.mixer._asdict().items():
            array[:] = arrays[name]


_NOTHING = np.empty(0, np.float32)
_NO_DRAFT = Draft.empty()


@njit(cache=True)
def _bounds(requests: NDArray[np.int32]) -> NDArray[np.int64]:
    """Where each request's rows start, and the last one's stop."""
    bounds = np.empty(len(requests) + 1, np.int64)
    count = 0
    for row in range(len(requests)):
        if row == 0 or requests[row] != requests[row - 1]:
            bounds[count] = row
            count += 1
    bounds[count] = len(requests)
    return bounds[: count + 1]


@njit(cache=True)
def _absorb(
    table: TableArrays,
    scope: int,
    text: NDArray[np.int32],
    mixer_memory: NDArray[np.float32],
    kind: int,
    contexts: NDArray[np.int32],
    top_tokens: NDArray[np.int32],
    top_probs: NDArray[np.float32],
    accepted: NDArray[np.int32],
    start: int,
    stop: int,
    shape: NDArray[np.int32],
    odds: NDArray[np.float32],
    nodes: int,
    context: NDArray[np.int32],
    recent: NDArray[np.int32],
    clock: int,
) -> int:
    """Learn from one request's rows, `start` to `stop`: its last token, then its draft's nodes.

    Returns:
        the number of tokens that were added to the text, the context and the recent rows.
    """
    a = automaton.automaton_in(text)
    mixer = mixing.mixer_in(mixer_memory)
    c = mixing.new_candidates()
    for node in range(min(nodes, stop - start - 1)):
        parent = shape[1, node]
        if parent < 0 or accepted[start + 1 + parent] >= 0:
            depth = min(shape[2, node], DEPTHS - 1)
            truth = 1.0 if accepted[start + 1 + node] >= 0 else 0.0
            mixer.depth[kind, depth] += DEPTH_PACE * (truth - odds[1, node])
    token = np.empty(1, np.int32)
    scopes = np.full(1, scope, np.int64)
    rates = np.array(RATES, np.float32)
    taken = 0
    for row in range(start, stop):
        if accepted[row] >= 0:
            state, length = automaton.matched(a)
            found = mixing.gather(
                c, table, scope, a, state, length,
                contexts[row, 0], contexts[row, 1], contexts[row, 2], recent, 0,
            )  # fmt: skip
            mixing.score(c, found, mixer, kind, 0)
            mixing.teach(c, found, mixer, kind, accepted[row], PACE)
        tables.learn_predictions(
            table, scopes, contexts[row : row + 1], top_tokens[row : row + 1], top_probs[row : row + 1],
            rates, clock,
        )  # fmt: skip
        if accepted[row] >= 0:
            token[0] = accepted[row]
            automaton.extend(a, token)
            for age in range(RECENT - 1, 0, -1):
                recent[age] = recent[age - 1]
            recent[0] = top_tokens[row]
            for place in range(CONTEXT - 1):
                context[place] = context[place + 1]
            context[CONTEXT - 1] = accepted[row]
            taken += 1
    return taken


@njit(cache=True)
def _keep(shape: NDArray[np.int32], odds: NDArray[np.float32], nodes: int, last: float) -> int:
    """Keep the nodes that are reached with `last` at least, depth first; returns how many these are.

    Nodes come in the order of falling reach, so what stays is a tree.
    """
    count = 0
    while count < nodes and odds[0, count] >= last:
        count += 1
    if count > 1:
        order, parents = depth_first(shape[1, :count])
        for row in (0, 2):
            shape[row, :count] = shape[row, :count][order]
        for row in range(2):
            odds[row, :count] = odds[row, :count][order]
        shape[1, :count] = parents
    return count
