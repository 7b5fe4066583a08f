"""The decoder's attention is vLLM's, over the cache that vLLM's own kernels write."""

from __future__ import annotations

import pytest
import torch

from galley_kernels.bench import random_matrix, relative_error
from galley_kernels.compiled import (
    CompiledDecoder,
    DecoderLayer,
    IntegerLinear,
    PagedCache,
    Requests,
    available,
)
from galley_plugins.quantization.decoder import LAYOUT

pytestmark = pytest.mark.skipif(not available(), reason="no C++ compiler")

HIDDEN, INNER, QUERIES, KEYS, HEAD, BLOCK, BLOCKS = 64, 96, 6, 2, 32, 64, 40


def decoder_of(dtype: torch.dtype) -> CompiledDecoder:
    torch.manual_seed(7)

    def linear(inputs: int, outputs: int) -> IntegerLinear:
        return IntegerLinear([random_matrix(inputs, outputs, 8, 32, torch.float32, "cpu", 0.0)])

    layers = [
        DecoderLayer(
            torch.ones(HIDDEN),
            torch.ones(HIDDEN),
            linear(HIDDEN, (QUERIES + 2 * KEYS) * HEAD),
            linear(QUERIES * HEAD, HIDDEN),
            linear(HIDDEN, 2 * INNER),
            linear(INNER, HIDDEN),
        )
        for _ in range(2)
    ]
    angles = torch.randn(2048, HEAD // 2)
    return CompiledDecoder(
        layers,
        torch.ones(HIDDEN),
        torch.cat([angles.cos(), angles.sin()], -1),
        query_heads=QUERIES,
        key_heads=KEYS,
        head=HEAD,
        epsilon=1e-5,
        dtype=dtype,
    )


class Batch:
    """Requests with a past of `before` tokens and `now` rows each, in blocks of their own in any order."""

    def __init__(self, before: list[int], now: list[int]) -> None:
        order = torch.randperm(BLOCKS)
        lengths = [past + rows for past, rows in zip(before, now, strict=True)]
        tables = torch.zeros(len(now), 24, dtype=torch.int32)
        slots, positions, taken = [], [], 0
        for request, (past, length) in enumerate(zip(before, lengths, strict=True)):
            count = -(-length // BLOCK)
            tables[request, :count] = order[taken : taken + count].to(torch.int32)
            taken += count
            for token in range(past, length):
                slots.append(int(tables[request, token // BLOCK]) * BLOCK + token % BLOCK)
                positions.append(token)
        starts = torch.tensor([0, *now]).cumsum(0).to(torch.int32)
        self.positions = torch.tensor(positions)
        self.requests = Requests(
            starts, torch.tensor(lengths, dtype=torch.int32), tables, torch.tensor(slots)
        )


def new_caches(dtype: torch.dtype) -> list[torch.Tensor]:
    """Full of numbers, as vLLM's are of other requests' keys; what has not been written may be anything."""
    return [torch.randn(BLOCKS, KEYS, BLOCK, 2 * HEAD).to(dtype) for _ in range(2)]


def by_vllm(
    decoder: CompiledDecoder, batch: Batch, x: torch.Tensor, caches: list[torch.Tensor]
) -> torch.Tensor:
    from vllm import _custom_ops as ops

    given, scale = batch.requests, HEAD**-0.5
    metadata = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=len(given.lengths),
        num_heads=QUERIES,
        num_kv_heads=KEYS,
        head_dim=HEAD,
        seq_lens=given.lengths,
        dtype=decoder.dtype,
        query_start_loc=given.starts,
        causal=True,
        sliding_window_size=-1,
        isa=LAYOUT,
        enable_kv_split=False,
    )
    step = decoder.begin(batch.positions, x)
    for layer, cache in enumerate(caches):
        query, key, value = step.qkv.split([QUERIES, KEYS, KEYS], 1)
        keys, values = cache.view(BLOCKS, KEYS, 2 * BLOCK, HEAD).chunk(2, 2)
        ops.cpu_attn_reshape_and_cache(
            key, value, keys, values, given.slots, LAYOUT, k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto"
        )
        ops.cpu_attention_with_kv_cache(
            query, keys, values, step.attention, given.starts, given.lengths, scale, True, None, -1,
            given.tables, 0.0, metadata, None,
        )  # fmt: skip
        decoder.follow(layer, step)
    return step.result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("before", "now"),
    [
        ([0], [1]),
        ([0], [70]),
        ([31, 0, 64], [1, 5, 3]),
        ([530, 3, 1100], [40, 17, 1]),  # several chunks of keys; more rows than one thread takes
    ],
)
def test_a_pass_is_that_of_vllms_attention(dtype: torch.dtype, before: list[int], now: list[int]) -> None:
    decoder = decoder_of(dtype)
    batch = Batch(before, now)
    x = torch.randn(len(batch.positions), HIDDEN)
    theirs = new_caches(dtype)
    ours = [cache.clone() for cache in theirs]
    expected = by_vllm(decoder, batch, x, theirs)
    found = decoder.run(batch.positions, x, PagedCache(ours, HEAD, HEAD**-0.5), batch.requests)
    assert relative_error(found, expected) < {torch.float32: 1e-4, torch.bfloat16: 1e-2}[dtype]
    assert torch.equal(ours[0], theirs[0])  # keys and values lie where vLLM's kernels put them
    assert relative_error(ours[1], theirs[1]) < {torch.float32: 1e-4, torch.bfloat16: 1e-2}[dtype]


def test_a_request_does_not_depend_on_those_beside_it_nor_on_what_lies_behind_its_end() -> None:
    decoder, batch = decoder_of(torch.float32), Batch([530, 3, 100], [9, 17, 1])
    x, caches = torch.randn(27, HIDDEN), new_caches(torch.float32)
    alone = [cache.clone() for cache in caches]
    together = decoder.run(batch.positions, x, PagedCache(caches, HEAD, HEAD**-0.5), batch.requests)
    given = batch.requests
    for request in range(3):
        rows = slice(int(given.starts[request]), int(given.starts[request + 1]))
        own = Requests(
            torch.tensor([0, rows.stop - rows.start], dtype=torch.int32),
            given.lengths[request : request + 1],
            given.tables[request : request + 1],
            given.slots[rows],
        )
        last = int(given.tables[request, (int(given.lengths[request]) - 1) // BLOCK])
        for cache in alone:  # values behind the request's last token
            cache[last].view(KEYS, 2 * BLOCK, HEAD)[:, BLOCK + int(given.lengths[request]) % BLOCK :] = (
                torch.nan
            )
        found = decoder.run(batch.positions[rows].clone(), x[rows], PagedCache(alone, HEAD, HEAD**-0.5), own)
        assert torch.equal(found, together[rows])


def test_a_branch_sees_its_ancestors_and_not_the_other_branch() -> None:
    """Rows 0 to 2 go on from the text; row 3 follows row 0, in a block of its own that begins as a copy."""
    decoder, past = decoder_of(torch.float32), 70
    own, private = 5, 9
    x, caches = torch.randn(4, HIDDEN), new_caches(torch.float32)
    positions = torch.tensor([past, past + 1, past + 2, past + 1])
    table = [3, own]
    as_chain = [cache.clone() for cache in caches]
    for cache in caches:
        cache[private] = cache[own]
    place = past % BLOCK
    slots = [own * BLOCK + place + step for step in range(3)] + [private * BLOCK + place + 1]
    requests = Requests(
        torch.tensor([0, 3, 4], dtype=torch.int32),
        torch.tensor([past + 3, past + 2], dtype=torch.int32),
        torch.tensor([table, [3, private]], dtype=torch.int32),
        torch.tensor(slots),
        (torch.tensor([0]), torch.tensor([private * BLOCK + place])),
    )
    found = decoder.run(positions, x, PagedCache(caches, HEAD, HEAD**-0.5), requests)
    for rows in ([0, 1, 2], [0, 3]):
        chain = Requests(
            torch.tensor([0, len(rows)], dtype=torch.int32),
            torch.tensor([past + len(rows)], dtype=torch.int32),
            torch.tensor([table], dtype=torch.int32),
            torch.tensor([own * BLOCK + place + step for step in range(len(rows))]),
        )
        kept = PagedCache([cache.clone() for cache in as_chain], HEAD, HEAD**-0.5)
        expected = decoder.run(positions[rows], x[rows], kept, chain)
        assert torch.equal(found[rows], expected)


def test_caches_of_another_shape_are_refused() -> None:
    caches = new_caches(torch.float32)
    with pytest.raises(ValueError, match="which does not fit"):
        PagedCache([caches[0], caches[1].transpose(0, 1)], HEAD, 1.0)
    with pytest.raises(ValueError, match="which does not fit"):
        PagedCache(caches, HEAD // 2, 1.0)
    decoder, batch = decoder_of(torch.bfloat16), Batch([0], [1])
    with pytest.raises(ValueError, match=r"found a cache of torch\.float32"):
        decoder.run(batch.positions, torch.ones(1, HIDDEN), PagedCache(caches, HEAD, 1.0), batch.requests)
