"""Triton kernels of `device`: the same drafts from a few launches in place of a thousand.

On a GPU a tensor operation takes a few microseconds and as many again to be launched, and drafting chains of
16 is over a thousand of them. Here a program takes a block of requests, or of rows, through all of it: one
launch reads a step, two learn, two draft, and what was counted is settled by one more of each. Rows and
requests are blocks of vectors, so that the interpreter, which tests use, keeps up too.

What is added up over programs is whole numbers, whose sum is the same in any order: the ranks of a
tensor-parallel group draft the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from galley_plugins.speculation.device import (
    BINS,
    LENGTH_BINS,
    LONGEST,
    LOOKUP_BINS,
    MOST_SEEN,
    ORDERS,
    PROB_BINS,
    SHORTEST,
    WINDOW,
    DeviceDrafter,
)
from galley_plugins.speculation.device_steps import Asked, Rows, Texts
from galley_plugins.speculation.drafting import CONTEXT, TOP
from galley_plugins.speculation.tables import WAYS

if TYPE_CHECKING:
    from galley_plugins.speculation.options import SpeculationOptions

REQUESTS = 16  # of a program that drafts
ROWS = 32  # of a program that learns; a row is one order of one context
PIECE = 1024  # tokens that a lookup compares at once
_MULTIPLIER = tl.constexpr(-7046029254386353131)
_MASK = tl.constexpr(0x1FFFFFFFF)


@triton.jit
def _mixed(hashed):
    hashed = hashed * _MULTIPLIER
    return hashed ^ ((hashed >> 31) & _MASK)


@triton.jit
def _context_key(scoped_ptr, slots, inside, oldest, older, newest, ORDER: tl.constexpr):
    """`tables.context_key` of blocks of contexts."""
    hashed = tl.load(scoped_ptr + slots * 3 + (ORDER - 1), mask=inside, other=0)
    if ORDER == 3:
        hashed = _mixed(hashed + oldest + 1)
    if ORDER >= 2:
        hashed = _mixed(hashed + older + 1)
    hashed = _mixed(hashed + newest + 1)
    return tl.where(hashed == 0, 1, hashed)


@triton.jit
def _opinion(
    keys, inside, sampled, keys_ptr, tokens_ptr, weights_ptr, sets, order,
    WAYS: tl.constexpr, TOP: tl.constexpr, PROB_BINS: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """`DeviceDrafter._opinions` of one order: which keys are known, their best tokens, the bins of those."""
    first = ((keys >> 12) & (sets - 1)) * WAYS
    ways = tl.arange(0, WAYS)
    held = tl.load(keys_ptr + first[:, None] + ways[None, :], mask=inside[:, None], other=0)
    same = held == keys[:, None]
    known = (tl.max(same.to(tl.int32), 1) > 0) & inside
    entry = first + tl.argmax(same.to(tl.int32), 1)
    ranks = tl.arange(0, TOP)
    weights = tl.load(weights_ptr + entry[:, None] * TOP + ranks[None, :], mask=inside[:, None], other=0.0)
    token = tl.load(tokens_ptr + entry * TOP + tl.argmax(weights, 1), mask=inside, other=0).to(tl.int64)
    place = (tl.sqrt(tl.max(weights, 1)) * PROB_BINS).to(tl.int32)
    bins = tl.minimum(place, PROB_BINS - 1) + (order - 1) * PROB_BINS + sampled * BINS
    return known, token, bins


@triton.jit
def _count(bins, right, counted, hits_ptr, new_ptr):
    tl.atomic_add(hits_ptr + bins, right.to(tl.int32), mask=counted)
    tl.atomic_add(new_ptr + bins, tl.full(bins.shape, 1, tl.int32), mask=counted)


@triton.jit(do_not_specialize=["count", "requests"])
def rows_kernel(
    places_ptr, slots_ptr, local_ptr, bounds_ptr, ids_ptr, positions_ptr, prompts_ptr, limits_ptr,
    texts_ptr, stride, longest, lengths_ptr, new_ptr, sampled_ptr,
    slots_out, contexts_out, following_out, sampled_out, count, requests,
    HALVINGS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`DeviceDrafter.rows`; a program takes a block of rows."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < count
    place = tl.load(places_ptr + row, mask=inside, other=0).to(tl.int64)
    slots = tl.load(slots_ptr + row, mask=inside, other=0).to(tl.int64)
    local = tl.load(local_ptr + row, mask=inside, other=0).to(tl.int64)
    position = tl.load(positions_ptr + place, mask=inside, other=0).to(tl.int64)
    low = row * 0  # how many requests end at or before this row
    high = low + requests
    for _ in range(HALVINGS):
        middle = (low + high) // 2
        searching = inside & (low < high)
        past = tl.load(bounds_ptr + 1 + middle, mask=searching, other=0) <= row
        low = tl.where(searching & past, middle + 1, low)
        high = tl.where(searching & (past == 0), middle, high)
    owner = tl.minimum(low, requests - 1)
    new = tl.load(new_ptr + owner, mask=inside, other=0)
    length = tl.load(lengths_ptr + owner, mask=inside, other=0)
    prompt = tl.load(prompts_ptr + slots, mask=inside, other=0)
    limit = tl.load(limits_ptr + slots, mask=inside, other=0)
    dropped = (new == 0) | ((local > 0) & (position - local < prompt)) | (local > limit)
    for column in tl.static_range(3):
        back = 2 - column
        drafted = tl.load(ids_ptr + tl.maximum(place - back, 0), mask=inside, other=0).to(tl.int64)
        before = tl.maximum(position - back, 0)
        written = tl.load(texts_ptr + slots * stride + before, mask=inside, other=0).to(tl.int64)
        token = tl.where(local >= back, drafted, written)
        token = tl.where(dropped | (position < back), -1, token)
        tl.store(contexts_out + row * 3 + column, token, mask=inside)
    at = tl.minimum(length - new + local, longest - 1)
    came = tl.load(texts_ptr + slots * stride + at, mask=inside, other=0).to(tl.int64)
    tl.store(following_out + row, tl.where(local < new, came, -1), mask=inside)
    tl.store(slots_out + row, slots, mask=inside)
    tl.store(sampled_out + row, tl.load(sampled_ptr + owner, mask=inside, other=0), mask=inside)


@triton.jit
def settle_kernel(
    rates_ptr, seen_ptr, hits_ptr, new_ptr, clock_ptr, count, most_seen,
    TICK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`Calibration.learn` from what was counted, which starts again; `TICK` moves the table's clock."""
    place = tl.arange(0, BLOCK)
    inside = place < count
    hits = tl.load(hits_ptr + place, mask=inside, other=0).to(tl.float32)
    new = tl.load(new_ptr + place, mask=inside, other=0).to(tl.float32)
    seen = tl.load(seen_ptr + place, mask=inside, other=1.0) + new
    rates = tl.load(rates_ptr + place, mask=inside, other=0.0)
    tl.store(rates_ptr + place, rates + (hits - new * rates) / seen, mask=inside)
    tl.store(seen_ptr + place, tl.minimum(seen, most_seen), mask=inside)
    zeros = tl.zeros([BLOCK], tl.int32)
    tl.store(hits_ptr + place, zeros, mask=inside)
    tl.store(new_ptr + place, zeros, mask=inside)
    if TICK:
        tl.store(clock_ptr, tl.load(clock_ptr) + 1)


@triton.jit(do_not_specialize=["count"])
def blend_kernel(
    slots_ptr, contexts_ptr, best_ptr, probs_ptr, following_ptr, sampled_ptr, scoped_ptr, column_rates_ptr,
    keys_ptr, stamps_ptr, tokens_ptr, weights_ptr, sets,
    hits_ptr, new_ptr, owner_ptr, found_ptr, entry_ptr, have_ptr, blended_ptr, count,
    FIRST: tl.constexpr, ORDERS: tl.constexpr, WAYS: tl.constexpr, TOP: tl.constexpr,
    PROB_BINS: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What each row's context is to become, of the table as it is; several rows may claim one entry.

    Also counts how often the table was right. Programs: blocks of rows x orders.
    """
    column = tl.program_id(1)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < count
    slots = tl.load(slots_ptr + row, mask=inside, other=0)
    oldest = tl.load(contexts_ptr + row * 3, mask=inside, other=-1)
    older = tl.load(contexts_ptr + row * 3 + 1, mask=inside, other=-1)
    newest = tl.load(contexts_ptr + row * 3 + 2, mask=inside, other=-1)
    sampled = tl.load(sampled_ptr + row, mask=inside, other=0).to(tl.int32)
    order = FIRST + column
    keys = _context_key(scoped_ptr, slots, inside, oldest, older, newest, 1)
    valid = inside & (newest >= 0)
    if order == 2:
        keys = _context_key(scoped_ptr, slots, inside, oldest, older, newest, 2)
        valid = valid & (older >= 0)
    if order == 3:
        keys = _context_key(scoped_ptr, slots, inside, oldest, older, newest, 3)
        valid = valid & (older >= 0) & (oldest >= 0)
    known, token, bins = _opinion(
        keys, inside, sampled, keys_ptr, tokens_ptr, weights_ptr, sets, order, WAYS, TOP, PROB_BINS, BINS
    )
    following = tl.load(following_ptr + row, mask=inside, other=-1)
    _count(bins, token == following, known & (following >= 0), hits_ptr, new_ptr)

    first = ((keys >> 12) & (sets - 1)) * WAYS
    ways = tl.arange(0, WAYS)[None, :]
    held = tl.load(keys_ptr + first[:, None] + ways, mask=inside[:, None], other=0)
    age = tl.load(stamps_ptr + first[:, None] + ways, mask=inside[:, None], other=0).to(tl.int64)
    age = tl.where(held == 0, -1, age)
    age = tl.where(held == keys[:, None], -2, age)
    oldest_way = tl.min(age * WAYS + ways, 1)  # its own way, else a free one, else the oldest
    own = oldest_way < -WAYS
    entry = first + (oldest_way & (WAYS - 1))

    ranks = tl.arange(0, TOP)[None, :]
    kept = (inside & own)[:, None]
    have = tl.load(tokens_ptr + entry[:, None] * TOP + ranks, mask=kept, other=-1)
    weights = tl.load(weights_ptr + entry[:, None] * TOP + ranks, mask=kept, other=0.0)
    rate = tl.load(column_rates_ptr + column)
    empty = tl.max(tl.where(ranks == 0, have, -1), 1) < 0
    rates = tl.where(empty, 1.0, rate)
    weights = weights * (1.0 - rates)[:, None]
    for index in tl.static_range(TOP):
        said = tl.load(best_ptr + row * TOP + index, mask=inside, other=-1).to(tl.int32)
        gain = rates * tl.load(probs_ptr + row * TOP + index, mask=inside, other=0.0)
        fits = (have == said[:, None]) | (have < 0)
        place = tl.argmin(tl.where(fits, -1.0, weights), 1)  # its own, a free one, the weakest
        here = ranks == place[:, None]
        fitting = tl.max((here & fits).to(tl.int32), 1) > 0
        before = tl.sum(tl.where(here, weights, 0.0), 1)
        taken = (said >= 0) & (fitting | (gain > before))
        after = tl.where(fitting, before + gain, gain)
        change = here & taken[:, None]
        weights = tl.where(change, after[:, None], weights)
        have = tl.where(change, said[:, None], have)

    mine = row * ORDERS + column
    tl.store(found_ptr + mine, keys, mask=inside)
    tl.store(entry_ptr + mine, tl.where(valid, entry, -1), mask=inside)
    tl.store(have_ptr + mine[:, None] * TOP + ranks, have, mask=inside[:, None])
    tl.store(blended_ptr + mine[:, None] * TOP + ranks, weights, mask=inside[:, None])
    tl.atomic_max(owner_ptr + entry, mine.to(tl.int32), mask=valid)


@triton.jit(do_not_specialize=["count"])
def write_kernel(
    found_ptr, entry_ptr, have_ptr, blended_ptr, owner_ptr, clock_ptr,
    keys_ptr, stamps_ptr, tokens_ptr, weights_ptr, count, TOP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of the rows that claimed an entry the last one writes it, and gives it free."""
    mine = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = mine < count
    entry = tl.load(entry_ptr + mine, mask=inside, other=-1)
    claimed = entry >= 0
    wins = claimed & (tl.load(owner_ptr + entry, mask=claimed, other=-1) == mine)
    ranks = tl.arange(0, TOP)[None, :]
    there, here = entry[:, None] * TOP + ranks, mine[:, None] * TOP + ranks
    each = wins[:, None]
    tl.store(keys_ptr + entry, tl.load(found_ptr + mine, mask=wins, other=0), mask=wins)
    tl.store(stamps_ptr + entry, tl.full(mine.shape, 0, tl.int32) + tl.load(clock_ptr), mask=wins)
    tl.store(tokens_ptr + there, tl.load(have_ptr + here, mask=each, other=0), mask=each)
    tl.store(weights_ptr + there, tl.load(blended_ptr + here, mask=each, other=0.0), mask=each)
    tl.store(owner_ptr + entry, tl.full(mine.shape, -1, tl.int32), mask=wins)


@triton.jit
def lookup_kernel(
    slots_ptr, texts_ptr, stride, lengths_ptr, new_ptr, sampled_ptr, ahead_ptr, matched_ptr,
    hits_ptr, seen_ptr, longest, window,
    MOST: tl.constexpr, STEPS: tl.constexpr, LONGEST: tl.constexpr, SHORTEST: tl.constexpr,
    LOOKUP: tl.constexpr, LENGTHS: tl.constexpr, BINS: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """`DeviceDrafter._judge` and then `_look_up`; a program takes one request."""
    request = tl.program_id(0)
    slot = tl.load(slots_ptr + request)
    length = tl.load(lengths_ptr + request)
    came = tl.load(new_ptr + request)
    sampled = tl.load(sampled_ptr + request).to(tl.int64)
    text = texts_ptr + slot * stride
    step = tl.arange(0, STEPS)
    inside = step < MOST

    size = tl.load(matched_ptr + slot)
    said = tl.load(ahead_ptr + slot * MOST + step, mask=inside, other=-1)
    position = tl.minimum(length - came + step, longest - 1)
    token = tl.load(text + position, mask=inside & (step < came), other=-2).to(tl.int64)
    right = inside & (step < came) & (said == token)
    wrong = tl.min(tl.where(right, STEPS, step), 0)  # the first that did not come
    bins = LOOKUP + tl.minimum(size + step, LENGTHS - 1) + sampled * BINS
    judged = tl.where(size > 0, step, STEPS) <= tl.minimum(wrong, came - 1)
    _count(bins, right, inside & judged, hits_ptr, seen_ptr)

    last = length - 1
    start = tl.maximum(length - window, 0)
    best = last * 0
    for begin in range(0, tl.minimum(length, window), PIECE):
        place = begin + tl.arange(0, PIECE).to(tl.int64)
        matching = (start + place < last) & (place < window)
        sizes = tl.zeros([PIECE], tl.int64)
        for back in tl.static_range(LONGEST):
            end = tl.load(text + tl.maximum(last - back, 0))
            there = matching & (place >= back)
            matching = there & (tl.load(text + start + place - back, mask=there, other=0) == end)
            sizes += matching.to(tl.int64)
        best = tl.maximum(best, tl.max(sizes * window + place, 0))
    size = best // window
    found = size >= SHORTEST
    end = tl.where(found, start + best % window, 0)
    period = tl.where(found, last - end, 1)
    source = tl.where(found, end + 1, 0) + step % period
    copied = tl.load(text + source, mask=inside, other=0).to(tl.int64)
    tl.store(ahead_ptr + slot * MOST + step, copied, mask=inside)
    tl.store(matched_ptr + slot, tl.where(found, size, 0))


@triton.jit(do_not_specialize=["count", "steps"])
def chain_kernel(
    slots_ptr, texts_ptr, stride, lengths_ptr, sampled_ptr, scoped_ptr, limits_ptr, rates_ptr,
    keys_ptr, tokens_ptr, weights_ptr, sets, ahead_ptr, matched_ptr, drafts_ptr, chances_ptr, count, steps,
    MOST: tl.constexpr, FIRST: tl.constexpr, ORDERS: tl.constexpr, LOOKS_UP: tl.constexpr,
    WAYS: tl.constexpr, TOP: tl.constexpr, PROB_BINS: tl.constexpr, BINS: tl.constexpr,
    LOOKUP: tl.constexpr, LENGTHS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`DeviceDrafter.propose` after `lookup_kernel`; a program takes a block of requests."""
    request = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = request < count
    slots = tl.load(slots_ptr + request, mask=inside, other=0)
    lengths = tl.load(lengths_ptr + request, mask=inside, other=1)
    sampled = tl.load(sampled_ptr + request, mask=inside, other=0).to(tl.int32)
    limits = tl.load(limits_ptr + slots, mask=inside, other=0)
    text = texts_ptr + slots * stride + lengths
    newest = tl.load(text - 1, mask=inside, other=0).to(tl.int64)
    older = tl.load(text - 2, mask=inside & (lengths >= 2), other=-1).to(tl.int64)
    oldest = tl.load(text - 3, mask=inside & (lengths >= 3), other=-1).to(tl.int64)
    if LOOKS_UP:
        size = tl.load(matched_ptr + slots, mask=inside, other=0)
        copying = size > 0
    for step in range(steps):
        chance = tl.full([BLOCK], -1.0, tl.float32)
        token = newest
        for column in tl.static_range(ORDERS):
            keys = _context_key(scoped_ptr, slots, inside, oldest, older, newest, FIRST + column)
            known, said, bins = _opinion(
                keys, inside, sampled, keys_ptr, tokens_ptr, weights_ptr, sets, FIRST + column,
                WAYS, TOP, PROB_BINS, BINS,
            )  # fmt: skip
            rate = tl.where(known, tl.load(rates_ptr + bins, mask=inside, other=0.0), 0.0)
            better = rate > chance
            token = tl.where(better, said, token)
            chance = tl.where(better, rate, chance)
        if LOOKS_UP:
            copied = tl.load(ahead_ptr + slots * MOST + step, mask=inside, other=0)
            bins = LOOKUP + tl.minimum(size + step, LENGTHS - 1) + sampled * BINS
            rate = tl.where(copying, tl.load(rates_ptr + bins, mask=inside, other=0.0), 0.0)
            better = rate > chance
            token = tl.where(better, copied, token)
            chance = tl.where(better, rate, chance)
        token = tl.where(chance > 0, token, newest)
        if LOOKS_UP:
            copying = copying & (token == copied)
        tl.store(drafts_ptr + request * MOST + step, token, mask=inside)
        tl.store(chances_ptr + request * MOST + step, tl.where(step < limits, chance, 0.0), mask=inside)
        oldest = older
        older = newest
        newest = token


class TritonDrafter(DeviceDrafter):
    """`DeviceDrafter` by the kernels above; arguments, results and tables are the same."""

    def __init__(
        self, options: SpeculationOptions, *, requests: int, most: int, device: torch.device | str
    ) -> None:
        super().__init__(options, requests=requests, most=most, device=device)
        orders = ORDERS[options.method]
        self._first, self._orders = (orders[0], len(orders)) if orders else (1, 0)
        bins = self._calibration.rates.shape[0]
        self._hits, self._new = torch.zeros((2, bins), dtype=torch.int32, device=device)
        if self.table is not None:
            self._owner = torch.full((self.table.entries,), -1, dtype=torch.int32, device=device)

    def _settle(self, *, tick: bool) -> None:
        calibration = self._calibration
        count = calibration.rates.shape[0]
        clock = self._hits if self.table is None else self.table.clock
        settle_kernel[1,](
            calibration.rates, calibration.seen, self._hits, self._new, clock, count, MOST_SEEN,
            TICK=tick, BLOCK=triton.next_power_of_2(count),
        )  # fmt: skip

    def rows(self, asked: Asked, texts: Texts, tokens: torch.Tensor, probs: torch.Tensor) -> Rows:
        count, requests = tokens.shape[0], texts.slots.shape[0]
        slots = torch.empty(count, dtype=torch.int64, device=self._device)
        following, contexts = torch.empty_like(slots), slots.new_empty((count, CONTEXT))
        sampled = torch.empty(count, dtype=torch.bool, device=self._device)
        rows_kernel[triton.cdiv(count, ROWS),](
            asked.places, asked.slots, asked.local, asked.bounds, asked.tokens, asked.positions,
            asked.prompts, self.limits, texts.tokens, texts.tokens.stride(0), texts.tokens.shape[1],
            texts.lengths, texts.new, texts.sampled, slots, contexts, following, sampled, count, requests,
            HALVINGS=self._scoped.shape[0].bit_length(), BLOCK=ROWS,
        )  # fmt: skip
        return Rows(slots, contexts, tokens, probs, following, sampled)

    def observe(self, rows: Rows) -> None:
        table = self.table
        count = rows.slots.shape[0]
        if table is None or count == 0:
            return
        most = count * self._orders
        found = torch.empty(most, dtype=torch.int64, device=self._device)
        entry = torch.empty_like(found)
        have = torch.empty((most, TOP), dtype=torch.int32, device=self._device)
        blended = torch.empty((most, TOP), device=self._device)
        blend_kernel[triton.cdiv(count, ROWS), self._orders](
            rows.slots, rows.contexts.contiguous(), rows.tokens.contiguous(), rows.probs.contiguous(),
            rows.following, rows.sampled, self._scoped, self._rates,
            table.keys, table.stamps, table.tokens, table.weights, table.table.sets,
            self._hits, self._new, self._owner, found, entry, have, blended, count,
            FIRST=self._first, ORDERS=self._orders, WAYS=WAYS, TOP=TOP,
            PROB_BINS=PROB_BINS, BINS=BINS, BLOCK=ROWS,
        )  # fmt: skip
        self._settle(tick=True)
        write_kernel[triton.cdiv(most, ROWS),](
            found, entry, have, blended, self._owner, table.clock,
            table.keys, table.stamps, table.tokens, table.weights, most, TOP=TOP, BLOCK=ROWS,
        )  # fmt: skip

    def propose(self, texts: Texts, steps: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        count, steps = texts.slots.shape[0], self.most if steps is None else steps
        tokens = torch.zeros((count, self.most), dtype=torch.int64, device=self._device)
        chances = torch.zeros((count, self.most), device=self._device)
        slots = texts.slots.contiguous()
        stride = texts.tokens.stride(0)
        if self._looks_up:
            longest = texts.tokens.shape[1]
            lookup_kernel[count,](
                slots, texts.tokens, stride, texts.lengths, texts.new, texts.sampled,
                self._ahead, self._matched, self._hits, self._new, longest, min(WINDOW, longest),
                MOST=self.most, STEPS=triton.next_power_of_2(self.most), LONGEST=LONGEST, SHORTEST=SHORTEST,
                LOOKUP=LOOKUP_BINS, LENGTHS=LENGTH_BINS, BINS=BINS, PIECE=PIECE,
            )  # fmt: skip
            self._settle(tick=False)
        table = self.table
        stored = (self._hits,) * 3 if table is None else (table.keys, table.tokens, table.weights)
        chain_kernel[triton.cdiv(count, REQUESTS),](
            slots, texts.tokens, stride, texts.lengths, texts.sampled, self._scoped, self.limits,
            self._calibration.rates, *stored, 1 if table is None else table.table.sets,
            self._ahead, self._matched, tokens, chances, count, steps,
            MOST=self.most, FIRST=self._first, ORDERS=self._orders, LOOKS_UP=self._looks_up,
            WAYS=WAYS, TOP=TOP, PROB_BINS=PROB_BINS, BINS=BINS,
            LOOKUP=LOOKUP_BINS, LENGTHS=LENGTH_BINS, BLOCK=REQUESTS,
        )  # fmt: skip
        return tokens, chances
