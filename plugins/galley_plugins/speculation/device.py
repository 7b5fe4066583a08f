"""Drafting on the device that the model runs on, as operations on whole batches.

Token Recycling (arXiv 2408.08696), ADED's tri-grams (arXiv 2407.12021) and prompt lookup, chains only, from
the table of `tables`. Where `mixing` adds opinions up, here the most confident source has its way.

Nothing waits for the device: shapes follow from the batch's size alone and no value is read back, so drafting
keeps up with asynchronous scheduling. What is written is deterministic, for the ranks of a tensor-parallel
group draft for themselves and must draft the same. `triton_drafter` does all of it in a few launches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from galley_kernels.choice import has_triton
from galley_plugins.speculation.device_steps import Asked, Rows, Texts
from galley_plugins.speculation.drafting import CONTEXT, TOP
from galley_plugins.speculation.tables import _MULTIPLIER, WAYS, NgramTable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from galley_plugins.speculation.options import Method, SpeculationOptions

# Orders of context that a method looks at, and how far a prediction moves an older one, by order.
ORDERS: dict[Method, tuple[int, ...]] = {
    "recycling": (1,),
    "trigram": (2,),
    "prompt-lookup": (),
    "hybrid": (1, 2, 3),
}
RATES: dict[Method, tuple[float, ...]] = {
    "recycling": (1.0,),  # the newest prediction replaces the older one, as in the paper
    "trigram": (0.6,),
    "prompt-lookup": (),
    "hybrid": (0.5, 0.6, 0.7),
}
LOOKUP_METHODS: tuple[Method, ...] = ("prompt-lookup", "hybrid")

SHORTEST, LONGEST = 2, 5  # tokens of the text's end that prompt lookup compares
WINDOW = 8192  # tokens that it looks back; bounds its memory: requests x window x a few bytes
PROB_BINS = 12
LENGTH_BINS = 13  # match lengths; the last one is 12 and more
BINS = CONTEXT * PROB_BINS + LENGTH_BINS
LOOKUP_BINS = CONTEXT * PROB_BINS  # where the lengths' bins begin
_BELIEF = (0.6, 0.75, 0.9)  # how much of its own probability a table is believed at first, by order
_PRIOR, MOST_SEEN = 8.0, 512.0  # examples that a bin's first rate is worth, and that count later
_MASK = 0x1FFFFFFFF


def _mix(hashed: torch.Tensor) -> torch.Tensor:
    hashed = hashed * _MULTIPLIER
    return hashed ^ ((hashed >> 31) & _MASK)


def scope_hashes(scopes: torch.Tensor) -> torch.Tensor:
    """What `tables.context_key` has hashed before it comes to the tokens.

    Args:
        scopes: int64 [n].

    Returns:
        int64 [n, 3], by order.
    """
    orders = torch.arange(1, CONTEXT + 1, device=scopes.device)
    return _mix(scopes[:, None] * 8 + orders + 1)


def context_keys(scoped: torch.Tensor, contexts: torch.Tensor) -> torch.Tensor:
    """`tables.context_key` of the last one, two and three tokens.

    Args:
        scoped: int64 [n, 3], `scope_hashes`.
        contexts: int64 [n, 3], oldest first.

    Returns:
        int64 [n, 3], by order.
    """
    oldest = _mix(scoped[:, 2] + contexts[:, 0] + 1)  # [n]
    longer = _mix(torch.stack((scoped[:, 1], oldest), 1) + contexts[:, 1:2] + 1)  # [n, 2]
    keys = _mix(torch.cat((scoped[:, :1], longer), 1) + contexts[:, 2:] + 1)
    return torch.where(keys == 0, 1, keys)


def top_predictions(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The most probable next tokens.

    Args:
        logits: [rows, vocabulary], any floating dtype.

    Returns:
        tokens int64 [rows, 8], best first, and their probabilities, float32 [rows, 8].
    """
    values, tokens = logits.topk(TOP, dim=-1)
    best = values[:, :1]
    mass = (logits - best).exp_().sum(-1, keepdim=True, dtype=torch.float32)
    return tokens, (values - best).float().exp_() / mass


def blend(
    have: torch.Tensor, weights: torch.Tensor, tokens: torch.Tensor, probs: torch.Tensor, rates: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`tables.blend` for many entries: weights move towards `probs`, weak ones give way.

    Args:
        have: int64 [m, 8], an entry's tokens; -1 is free.
        weights: float32 [m, 8].
        tokens: int64 [m, 8], best first; -1 ends them.
        probs: float32 [m, 8].
        rates: float32 [m].

    Returns:
        the entries' tokens and weights.
    """
    rates = torch.where(have[:, 0] < 0, 1.0, rates)[:, None]
    weights = weights * (1.0 - rates)
    gains = rates * probs
    for index in range(TOP):
        token, gain = tokens[:, index : index + 1], gains[:, index : index + 1]
        fits = (have == token) | (have < 0)
        place = torch.where(fits, -1.0, weights).argmin(1, keepdim=True)  # its own, a free one, the weakest
        fitting, held = fits.gather(1, place), weights.gather(1, place)
        taken = (token >= 0) & (fitting | (gain > held))
        gain = torch.where(fitting, held + gain, gain)
        weights = weights.scatter(1, place, torch.where(taken, gain, held))
        have = have.scatter(1, place, torch.where(taken, token, have.gather(1, place)))
    return have, weights


class DeviceTable:
    """`NgramTable` for batches of keys.

    Of several rows of a batch that fall on one entry the last one counts; `NgramTable` takes them in turn.
    One spare set lies past the table's end: what must not be written goes there, so that shapes stay fixed.

    Attributes:
        entries: how many there are; also where the spare ones begin.
        clock: int32 [], how many batches were learned.
        keys: int64, stamps: int32 [sets + 1, 4]; tokens: int32, weights: float32 [entries + 4, 8].
    """

    def __init__(self, budget: int, device: torch.device | str) -> None:
        self.table = table = NgramTable(budget, device)
        self.entries = table.sets * WAYS
        keys, stamps, tokens, weights = (
            torch.cat((tensor, tensor[:1])) for tensor in table.tensors().values()
        )
        table.keys, table.stamps = keys[:-1], stamps[:-1]
        table.tokens, table.weights = tokens[:-1], weights[:-1]
        self.keys, self.stamps = keys.view(-1, WAYS), stamps.view(-1, WAYS)
        self.tokens, self.weights = tokens.view(-1, TOP), weights.view(-1, TOP)
        self.clock = torch.zeros((), dtype=torch.int32, device=device)
        self._ways = torch.arange(WAYS, device=device)

    def find(self, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What is stored under int64 `keys` [...].

        Returns:
            tokens int64 [..., 8], weights float32 [..., 8], and which keys are known, bool [...].
        """
        sets = self._set_of(keys)
        known, way = (self.keys[sets] == keys[..., None]).int().max(-1)
        entry = sets * WAYS + way
        return self.tokens[entry].long(), self.weights[entry], known > 0

    def learn(
        self,
        keys: torch.Tensor,
        valid: torch.Tensor,
        tokens: torch.Tensor,
        probs: torch.Tensor,
        rates: torch.Tensor,
    ) -> None:
        """Blend one prediction into the entry of each key; a new one takes the least recently used entry.

        Args:
            keys: int64 [m].
            valid: bool [m], rows that count.
            tokens: int64 [m, 8].
            probs: float32 [m, 8].
            rates: float32 [m].
        """
        self.clock += 1
        sets = self._set_of(keys)
        held = self.keys[sets]  # [m, ways]
        age = torch.where(held == 0, -1, self.stamps[sets].long())
        age = torch.where(held == keys[:, None], -2, age)
        oldest = (age * WAYS + self._ways).amin(1)  # its own way, else a free one, else the oldest
        known = (oldest < -WAYS)[:, None]
        entry = sets * WAYS + (oldest & (WAYS - 1))
        have = torch.where(known, self.tokens[entry].long(), -1)
        weights = torch.where(known, self.weights[entry], 0.0)
        have, weights = blend(have, weights, tokens, probs, rates)
        entry = self._last_of_each(torch.where(valid, entry, self.entries))
        self.keys.view(-1)[entry] = keys
        self.stamps.view(-1)[entry] = self.clock
        self.tokens[entry] = have.int()
        self.weights[entry] = weights

    def _set_of(self, keys: torch.Tensor) -> torch.Tensor:
        return (keys >> 12) & (self.table.sets - 1)

    def _last_of_each(self, entry: torch.Tensor) -> torch.Tensor:
        """The same entries [m], the spare one in the place of all but the last of those that are equal."""
        count = entry.shape[0]
        ordered = (entry * count + torch.arange(count, device=entry.device)).sort().values
        place = ordered // count
        last = torch.ones_like(place, dtype=torch.bool)
        last[:-1] = place[1:] != place[:-1]
        return torch.empty_like(entry).scatter_(0, ordered % count, torch.where(last, place, self.entries))


class Calibration:
    """How often candidates were right, by the bin that their source's own opinion falls into.

    A bin is (greedy or sampled) x (order x probability, or match length). It starts at the source's own word,
    longer contexts believed more, and then runs after what was accepted.
    """

    def __init__(self, device: torch.device | str) -> None:
        first = [
            max(0.01, belief * ((index + 0.5) / PROB_BINS) ** 2)
            for belief in _BELIEF
            for index in range(PROB_BINS)
        ]
        first += [1 - 1 / (1 + 0.5 * length) if length else 0.01 for length in range(LENGTH_BINS)]
        self.rates = torch.tensor([*first, *first, 0.0], device=device)  # the last is for what does not count
        self.seen = torch.full_like(self.rates, _PRIOR)

    def rate(self, bins: torch.Tensor) -> torch.Tensor:
        """Float32 [...] of int64 `bins` [...]."""
        return self.rates[bins]

    def learn(self, bins: torch.Tensor, right: torch.Tensor, counted: torch.Tensor) -> None:
        """Take in examples.

        Args:
            bins: int64 [...].
            right: bool [...], the candidate was the token that followed.
            counted: bool [...], the rest is left out.
        """
        places = torch.where(counted, bins, self.rates.shape[0] - 1).flatten()
        # Sums of whole numbers are the same in whatever order the device adds them.
        hits = torch.zeros_like(self.rates).index_add_(0, places, right.flatten().float())
        new = torch.zeros_like(self.rates).index_add_(0, places, torch.ones_like(places, dtype=hits.dtype))
        self.seen += new
        self.rates += (hits - new * self.rates) / self.seen
        self.seen.clamp_(max=MOST_SEEN)


class DeviceDrafter:
    """Drafts one chain for each request of a batch; requests are known by their slots.

    Args:
        requests: slots.
        most: tokens of a draft.

    Raises:
        ValueError: the options ask for what only runner V1 has.
    """

    def __init__(
        self, options: SpeculationOptions, *, requests: int, most: int, device: torch.device | str
    ) -> None:
        _check(options)
        self.most = most
        self.limits = torch.full((requests,), most, dtype=torch.int64, device=device)
        self._device = torch.device(device)
        self._scoped = scope_hashes(torch.zeros(requests, dtype=torch.int64, device=device))
        self._calibration = Calibration(device)
        self._steps = torch.arange(most, device=device)
        self._back = torch.arange(CONTEXT - 1, -1, -1, device=device)  # oldest first
        orders = ORDERS[options.method]
        self._columns = slice(orders[0] - 1, orders[-1]) if orders else None
        self._rates = torch.tensor(RATES[options.method], device=device)
        self._offsets = torch.tensor([(order - 1) * PROB_BINS for order in orders], device=device)
        self.table = DeviceTable(options.table_bytes, device) if orders else None
        self._looks_up = options.method in LOOKUP_METHODS
        self._ahead = torch.zeros((requests, most), dtype=torch.int64, device=device)  # as the lookup has it
        self._matched = torch.zeros(requests, dtype=torch.int64, device=device)  # tokens it rests on; 0: none

    def begin(self, slots: Sequence[int], scopes: Sequence[int], limits: Sequence[int]) -> None:
        """Requests enter: their slots, the scopes that they learn in, and the most tokens of their drafts."""
        values = torch.tensor([slots, scopes, limits], dtype=torch.int64)
        if self._device.type == "cuda":
            values = values.pin_memory()
        at, scope, limit = values.to(self._device, non_blocking=True)
        self._scoped[at] = scope_hashes(scope)
        self.limits[at] = limit
        self._matched[at] = 0

    def rows(self, asked: Asked, texts: Texts, tokens: torch.Tensor, probs: torch.Tensor) -> Rows:
        """What the model said; dropped requests, placeholders and drafts past a limit teach nothing.

        Args:
            tokens: int64 [m, 8] of the first m rows, best first.
            probs: float32 [m, 8].
        """
        count = tokens.shape[0]
        places, slots, local = (
            asked.places[:count].long(),
            asked.slots[:count].long(),
            asked.local[:count].long(),
        )
        positions = asked.positions[places]
        ends = asked.bounds[1:]
        index = torch.arange(count, dtype=ends.dtype, device=ends.device)
        owner = torch.searchsorted(ends, index, right=True)

        drafted = asked.tokens[(places[:, None] - self._back).clamp(min=0)].long()  # [rows, 3]
        before = positions[:, None] - self._back
        written = texts.tokens[slots[:, None], before.clamp(min=0)].long()
        contexts = torch.where(local[:, None] >= self._back, drafted, written)
        placeholder = (local > 0) & (positions - local < asked.prompts[slots])
        dropped = (texts.new[owner] == 0) | placeholder | (local > self.limits[slots])
        contexts = torch.where(dropped[:, None] | (before < 0), -1, contexts)

        at = (texts.lengths[owner] - texts.new[owner] + local).clamp(max=texts.tokens.shape[1] - 1)
        following = torch.where(local < texts.new[owner], texts.tokens[slots, at].long(), -1)
        return Rows(slots, contexts, tokens, probs, following, texts.sampled[owner])

    def observe(self, rows: Rows) -> None:
        """Learn from verified rows, those of accepted and of rejected drafts alike."""
        if self.table is None:
            return
        keys = context_keys(self._scoped[rows.slots], rows.contexts)[:, self._columns]  # [rows, orders]
        known, tokens, bins = self._opinions(keys, rows.sampled)
        following = rows.following[:, None]
        self._calibration.learn(bins, tokens == following, known & (following >= 0))
        count, orders = keys.shape
        valid = (rows.contexts.flip(1).cummin(1).values >= 0)[:, self._columns]
        # One row of each order in turn, as `tables.learn_predictions` has it.
        self.table.learn(
            keys.flatten(),
            valid.flatten(),
            rows.tokens.repeat_interleave(orders, 0, output_size=count * orders),
            rows.probs.repeat_interleave(orders, 0, output_size=count * orders),
            self._rates.repeat(count),
        )

    def propose(self, texts: Texts, steps: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """One chain for each request.

        Args:
            steps: draft no more than so many tokens; what comes after them is 0.

        Returns:
            tokens, int64 [n, most], and the probability that each is accepted if those before it are, float32
            [n, most]; 0 past a request's limit and where no source knows anything.
        """
        count, steps = texts.slots.shape[0], self.most if steps is None else steps
        tokens = torch.zeros((count, self.most), dtype=torch.int64, device=self._device)
        chances = torch.zeros((count, self.most), device=self._device)
        before = texts.lengths[:, None] - torch.arange(CONTEXT, 0, -1, device=self._device)
        contexts = texts.tokens[texts.slots[:, None], before.clamp(min=0)].long()
        contexts = torch.where(before < 0, -1, contexts)
        scoped = self._scoped[texts.slots]
        if self._looks_up:
            self._judge(texts)
            ahead, lookup_bins, following = self._look_up(texts)
        for step in range(steps):
            candidates, confidences = [], []
            if self.table is not None:
                keys = context_keys(scoped, contexts)[:, self._columns]
                known, found, bins = self._opinions(keys, texts.sampled)
                candidates.append(found)
                confidences.append(torch.where(known, self._calibration.rate(bins), 0.0))
            if self._looks_up:
                copied = ahead[:, step : step + 1]
                candidates.append(copied)
                rate = self._calibration.rate(lookup_bins[:, step : step + 1])
                confidences.append(torch.where(following, rate, 0.0))
            chance, source = torch.cat(confidences, 1).max(1, keepdim=True)  # [n, 1]
            token = torch.cat(candidates, 1).gather(1, source)
            token = torch.where(chance > 0, token, contexts[:, -1:])
            if self._looks_up:
                following = following & (token == copied)
            tokens[:, step : step + 1], chances[:, step : step + 1] = token, chance
            contexts = torch.cat((contexts[:, 1:], token), 1)
        chances *= self._steps < self.limits[texts.slots][:, None]
        return tokens, chances

    def _opinions(
        self, keys: torch.Tensor, sampled: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Which `keys` [n, orders] are known, their best tokens, and the bins of those; all [n, orders]."""
        assert self.table is not None
        tokens, weights, known = self.table.find(keys)
        weight, rank = weights.max(-1, keepdim=True)  # [n, orders, 1]
        bins = (weight[..., 0].sqrt() * PROB_BINS).long().clamp(max=PROB_BINS - 1)
        return known, tokens.gather(-1, rank)[..., 0], bins + self._offsets + sampled[:, None] * BINS

    def _look_up(self, texts: Texts) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Where the text's end occurred before: the longest match, of those the latest.

        What follows the match may reach the text's end; it goes on with what was copied first, as a text that
        repeats itself does.

        Returns:
            the tokens that follow, int64 [n, most]; their bins [n, most]; whether there is a match [n, 1].
        """
        slots, last = texts.slots[:, None], texts.lengths[:, None] - 1  # [n, 1]
        width = min(WINDOW, texts.tokens.shape[1])
        places = torch.arange(width, device=self._device)
        start = (texts.lengths[:, None] - width).clamp(min=0)
        positions = start + places  # [n, width]
        window = texts.tokens[slots, positions]
        matching = positions < last
        sizes = torch.zeros_like(window)
        for back in range(LONGEST):
            same = window == texts.tokens[slots, (last - back).clamp(min=0)]
            if back:
                matching[:, back:] &= same[:, :-back]
                matching[:, :back] = False
            else:
                matching &= same
            sizes += matching
        best = (sizes.long() * width + places).amax(1, keepdim=True)  # [n, 1]
        size, place = best // width, best % width
        found = size >= SHORTEST
        end = torch.where(found, start + place, 0)
        period = torch.where(found, last - end, 1)
        ahead = texts.tokens[slots, torch.where(found, end + 1, 0) + self._steps % period].long()
        size = torch.where(found, size, 0)
        self._ahead[texts.slots] = ahead
        self._matched[texts.slots] = size[:, 0]
        return ahead, self._length_bins(size, texts.sampled), found

    def _judge(self, texts: Texts) -> None:
        """Compare what the lookup said at the step before with the tokens that came."""
        slots = texts.slots[:, None]
        size = self._matched[texts.slots][:, None]
        came = self._steps < texts.new[:, None]  # [n, most]
        positions = (texts.lengths - texts.new)[:, None] + self._steps
        tokens = texts.tokens[slots, positions.clamp(max=texts.tokens.shape[1] - 1)]
        right = (self._ahead[texts.slots] == tokens) & came
        reached = torch.ones_like(right)
        reached[:, 1:] = right[:, :-1].cumprod(1) > 0
        self._calibration.learn(self._length_bins(size, texts.sampled), right, came & reached & (size > 0))

    def _length_bins(self, size: torch.Tensor, sampled: torch.Tensor) -> torch.Tensor:
        """Bins [n, most] of copies after a match of `size` [n, 1]; a copy that holds makes it longer."""
        return LOOKUP_BINS + (size + self._steps).clamp(max=LENGTH_BINS - 1) + sampled[:, None] * BINS


def drafter_on(
    device: torch.device | str, options: SpeculationOptions, *, requests: int, most: int
) -> DeviceDrafter:
    """By Triton's kernels on a GPU, by tensor operations elsewhere; see `DeviceDrafter`."""
    if torch.device(device).type == "cuda" and has_triton():
        from galley_plugins.speculation.triton_drafter import TritonDrafter

        return TritonDrafter(options, requests=requests, most=most, device=device)
    return DeviceDrafter(options, requests=requests, most=most, device=device)


def _check(options: SpeculationOptions) -> None:
    if options.method not in ORDERS:
        raise ValueError(
            f"speculation.method: {options.method} drafts with the model's own layers, which vLLM's runner "
            f"V2 does not run apart; expected one of {', '.join(ORDERS)}"
        )
    if options.tree == "on":
        raise ValueError("speculation.tree: vLLM's runner V2 verifies chains only, expected auto or off")
    for name in ("tables", "corpus"):
        if getattr(options, name) is not None:
            raise ValueError(f"speculation.{name}: not supported on vLLM's runner V2")
