from __future__ import annotations

from itertools import pairwise
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from galley_plugins.embedding.methods.plain import last_row
from galley_plugins.embedding.pooling import (
    MaxPool,
    MeanPool,
    PromptPooler,
    PromptRows,
    RowsPool,
    from_sparse,
    to_sparse,
)

HIDDEN = 8

unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the machine may be busy


@st.composite
def prompts(draw: st.DrawFn) -> torch.Tensor:
    """[tokens, hidden] hidden states of one prompt, float32 or bf16."""
    length = draw(st.integers(1, 64))
    seed = draw(st.integers(0, 2**32 - 1))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    scale = draw(st.sampled_from([0.01, 1.0, 4.0]))
    rows = np.random.default_rng(seed).normal(scale=scale, size=(length, HIDDEN))
    return torch.tensor(rows, dtype=torch.float32).to(dtype)


@st.composite
def splits(draw: st.DrawFn, length: int) -> list[tuple[int, int]]:
    """Consecutive [start, end) chunks of a prompt."""
    inner = draw(st.sets(st.integers(1, length - 1))) if length > 1 else set()
    return list(pairwise([0, *sorted(inner), length]))


def mean_of(rows: torch.Tensor, dimensions: int | None = None, *, normalize: bool = True) -> np.ndarray:
    """The vector of one pass in float64, by numpy."""
    vector = rows.double().numpy().mean(axis=0)[:dimensions]
    return vector / np.linalg.norm(vector) if normalize else vector


def pooler_of(pooling: str) -> PromptPooler:
    return PromptPooler(MeanPool) if pooling == "mean" else PromptPooler(last_row, every_row=False)


def feed(pooler: PromptPooler, name: str, rows: torch.Tensor, chunks: list[tuple[int, int]]) -> torch.Tensor:
    """Pool a prompt chunk by chunk; only the last chunk may bring the vector."""
    *earlier, (start, end) = chunks
    for begin, stop in earlier:
        assert pooler.pool(name, rows[begin:stop], begin) is None
    vector = pooler.pool(name, rows[start:end], start)
    assert vector is not None
    assert vector.dtype == torch.float32
    return vector


@unhurried
@given(data=st.data(), rows=prompts(), normalize=st.booleans(), dimensions=st.none() | st.integers(1, HIDDEN))
def test_any_split_into_chunks_gives_the_mean_of_one_pass(
    data: st.DataObject, rows: torch.Tensor, normalize: bool, dimensions: int | None
) -> None:
    pooler = pooler_of("mean")
    pooler.add("a", PromptRows.of(len(rows), None), dimensions=dimensions, normalize=normalize)
    vector = feed(pooler, "a", rows, data.draw(splits(len(rows))))
    np.testing.assert_allclose(vector.numpy(), mean_of(rows, dimensions, normalize=normalize), atol=1e-5)


@unhurried
@given(data=st.data(), rows=prompts(), dimensions=st.none() | st.integers(1, HIDDEN))
def test_any_split_into_chunks_gives_the_last_tokens_row(
    data: st.DataObject, rows: torch.Tensor, dimensions: int | None
) -> None:
    pooler = pooler_of("last")
    pooler.add("a", PromptRows.of(len(rows), None), dimensions=dimensions)
    vector = feed(pooler, "a", rows, data.draw(splits(len(rows))))
    np.testing.assert_allclose(vector.numpy(), mean_of(rows[-1:], dimensions), atol=1e-5)


@unhurried
@given(data=st.data(), rows=prompts(), pooling=st.sampled_from(["mean", "last"]))
def test_a_prompt_that_starts_over_forgets_what_it_saw_before(
    data: st.DataObject, rows: torch.Tensor, pooling
) -> None:
    pooler = pooler_of(pooling)
    pooler.add("a", PromptRows.of(len(rows), None))
    for _ in range(data.draw(st.integers(1, 3), label="preemptions")):
        *begun, _ = data.draw(splits(len(rows)))
        for start, end in begun:
            assert pooler.pool("a", rows[start:end] + 5, start) is None  # rows that must not count
    vector = feed(pooler, "a", rows, data.draw(splits(len(rows))))
    np.testing.assert_allclose(vector.numpy(), mean_of(rows if pooling == "mean" else rows[-1:]), atol=1e-5)


@unhurried
@given(
    data=st.data(),
    inputs=st.lists(prompts(), min_size=2, max_size=4),
    order=st.randoms(use_true_random=False),
)
def test_prompts_whose_chunks_are_interleaved_do_not_mix(
    data: st.DataObject, inputs: list[torch.Tensor], order
) -> None:
    pooler = pooler_of("mean")
    waiting = {}
    for name, rows in enumerate(inputs):
        pooler.add(str(name), PromptRows.of(len(rows), None))
        waiting[name] = data.draw(splits(len(rows)))
    vectors: dict[int, torch.Tensor | None] = {}
    while waiting:
        name = order.choice(sorted(waiting))
        start, end = waiting[name].pop(0)
        vectors[name] = pooler.pool(str(name), inputs[name][start:end], start)
        if not waiting[name]:
            del waiting[name]
    for name, rows in enumerate(inputs):
        np.testing.assert_allclose(vectors[name], mean_of(rows), atol=1e-5)


def test_a_worked_example_of_mean_dimensions_and_length() -> None:
    rows = torch.tensor([[2.0, 8.0, 1.0], [4.0, 0.0, 9.0]])  # mean 3, 4, 5
    pooler = pooler_of("mean")
    pooler.add("raw", PromptRows.of(2, None), normalize=False)
    pooler.add(
        "short", PromptRows.of(2, None), dimensions=2
    )  # 3-4-5 triangle: shortened first, then made unit length
    pooler.add("short raw", PromptRows.of(2, None), dimensions=2, normalize=False)
    expected = {"raw": [3.0, 4.0, 5.0], "short": [0.6, 0.8], "short raw": [3.0, 4.0]}
    for name, vector in expected.items():
        pooled = pooler.pool(name, rows, 0)
        assert pooled is not None
        assert pooled.tolist() == pytest.approx(vector)


def test_long_bf16_prompts_are_summed_in_float32() -> None:
    rows = torch.ones(1000, 2, dtype=torch.bfloat16)  # a bf16 sum of ones stops growing at 256
    pooler = pooler_of("mean")
    pooler.add("a", PromptRows.of(1000, None), normalize=False)
    assert feed(pooler, "a", rows, [(0, 400), (400, 1000)]).tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("seen", "start"),
    [([], 16), ([(0, 4)], 5), ([(0, 4)], 3), ([(0, 4), (4, 6)], 4)],
    ids=["cached prefix", "gap", "overlap", "chunk twice"],
)
def test_a_mean_refuses_a_chunk_that_does_not_follow_the_last_one(
    seen: list[tuple[int, int]], start: int
) -> None:
    rows = torch.ones(32, HIDDEN)
    pooler = pooler_of("mean")
    pooler.add("chatcmpl-7", PromptRows.of(32, None))
    for begin, end in seen:
        pooler.pool("chatcmpl-7", rows[begin:end], begin)
    expected = seen[-1][1] if seen else 0
    with pytest.raises(ValueError, match=rf"request chatcmpl-7: .* at token {start}, expected {expected}$"):
        pooler.pool("chatcmpl-7", rows[start:], start)


def test_the_last_token_needs_no_row_before_it() -> None:
    pooler = pooler_of("last")
    pooler.add("a", PromptRows.of(20, None), normalize=False)
    assert feed(pooler, "a", torch.arange(20.0).reshape(20, 1), [(16, 20)]).tolist() == [19.0]


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_a_vector_outlives_the_runners_buffer(pooling) -> None:
    rows = torch.full((3, 2), 4.0)
    pooler = pooler_of(pooling)
    pooler.add("a", PromptRows.of(3, None), normalize=False)
    vector = feed(pooler, "a", rows, [(0, 3)])
    rows.zero_()  # the next step writes its rows there
    assert vector.tolist() == [4.0, 4.0]


def test_earlier_chunks_outlive_the_runners_buffer() -> None:
    buffer = torch.full((2, 2), 4.0)
    pooler = pooler_of("mean")
    pooler.add("a", PromptRows.of(4, None), normalize=False)
    pooler.pool("a", buffer[:1], 0)
    pooler.pool("a", buffer[:1].fill_(6.0), 1)
    vector = pooler.pool("a", buffer.fill_(1.0), 2)
    assert vector is not None
    assert vector.tolist() == [3.0, 3.0]  # 4, 6, 1, 1


def test_a_zero_vector_stays_zero_and_is_never_nan() -> None:
    pooler = pooler_of("mean")
    pooler.add("a", PromptRows.of(2, None))
    assert feed(pooler, "a", torch.zeros(2, 3), [(0, 2)]).tolist() == [0.0, 0.0, 0.0]


def test_requests_are_known_until_they_are_removed() -> None:
    pooler = pooler_of("mean")
    assert not pooler
    pooler.add("a", PromptRows.of(2, None))
    pooler.add("b", PromptRows.of(2, None))
    pooler.remove("a")
    pooler.remove("a")
    assert "a" not in pooler
    assert "b" in pooler
    assert len(pooler) == 1


def test_a_known_id_that_is_added_again_is_another_prompt() -> None:
    pooler = pooler_of("mean")
    pooler.add("a", PromptRows.of(4, None))
    pooler.pool("a", torch.ones(3, 2), 0)
    pooler.add("a", PromptRows.of(2, None), dimensions=1, normalize=False)
    assert feed(pooler, "a", torch.tensor([[1.0, 0.0], [3.0, 0.0]]), [(0, 1), (1, 2)]).tolist() == [2.0]


@pytest.mark.parametrize("length", [0, -1])
def test_an_empty_prompt_is_refused(length: int) -> None:
    with pytest.raises(
        ValueError, match=f"request a: found a prompt of {length} tokens, expected at least 1"
    ):
        pooler_of("mean").add("a", PromptRows.of(length, None))


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_rows_past_the_prompt_are_padding(pooling: Literal["mean", "last"]) -> None:
    rows = torch.randn(5, HIDDEN)
    pooler = pooler_of(pooling)
    pooler.add("a", PromptRows.of(3, None))
    assert pooler.pool("a", rows[:2], 0) is None
    expected = mean_of(rows[:3]) if pooling == "mean" else mean_of(rows[2:3])
    vector = pooler.pool("a", rows[2:], 2)
    assert vector is not None
    np.testing.assert_allclose(vector.numpy(), expected, atol=1e-6)


def test_a_head_sees_the_texts_rows_alone_and_their_largest_values_are_kept() -> None:
    rows = torch.tensor([[9.0, 9.0], [1.0, -2.0], [0.5, 3.0], [8.0, 8.0]])
    prompt = PromptRows(4, 1, 3)
    seen: list[int] = []

    def head(part: torch.Tensor) -> torch.Tensor:
        seen.append(len(part))
        return torch.cat([part, -part], dim=-1)

    pooler = PromptPooler(lambda rows: MaxPool(rows, head))
    pooler.add("a", prompt, normalize=False)
    assert pooler.pool("a", rows[:2], 0) is None
    vector = pooler.pool("a", rows[2:], 2)
    assert vector is not None
    assert vector.tolist() == [1.0, 3.0, -0.5, 2.0]
    assert seen == [1, 1]


def test_sparse_vectors_are_the_largest_positive_weights() -> None:
    vector = torch.tensor([0.0, 2.0, -1.0, 0.5, 3.0])
    assert from_sparse(to_sparse(vector, 2)) == {4: 3.0, 1: 2.0}
    assert from_sparse(to_sparse(vector, 99)) == {4: 3.0, 1: 2.0, 3: 0.5}
    assert from_sparse(to_sparse(-vector.abs(), 3)) == {}


def test_rows_of_length_one_are_side_by_side() -> None:
    pooler = PromptPooler(lambda rows: RowsPool((0, rows.length - 1), unit=True))
    pooler.add("a", PromptRows(3, 0, 3), normalize=False)
    vector = pooler.pool("a", torch.tensor([[3.0, 4.0], [1.0, 1.0], [0.0, 2.0]]), 0)
    assert vector is not None
    assert vector.tolist() == pytest.approx([0.6, 0.8, 0.0, 1.0])


def test_a_part_of_a_vector_is_left_as_it_is() -> None:
    pooler = PromptPooler(last_row, every_row=False)
    pooler.add("a", PromptRows(1, 0, 1, part=True), dimensions=1, normalize=True)
    vector = pooler.pool("a", torch.tensor([[3.0, 4.0]]), 0)
    assert vector is not None
    assert vector.tolist() == [3.0, 4.0]
