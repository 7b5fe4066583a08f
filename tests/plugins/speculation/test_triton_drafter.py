"""Drafting by Triton's kernels, in its interpreter, against drafting by tensor operations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from galley_plugins.speculation.options import MiB
from galley_plugins.speculation.tables import ENTRY_BYTES, WAYS
from tests.support.drafting_steps import compile_kernels, counts_of_steps, rows_of_a_step, steps_of

if TYPE_CHECKING:
    from collections.abc import Callable

METHODS = ("hybrid", "recycling", "trigram", "prompt-lookup")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("budget", [4 * WAYS * ENTRY_BYTES, MiB], ids=["entries give way", "room for all"])
def test_drafts_and_tables_are_those_of_tensor_operations(
    method: str, budget: int, interpreted: Callable[..., Any]
) -> None:
    expected = steps_of("torch", method, budget, seed=5)
    found = interpreted(steps_of, "triton", method, budget, seed=5)
    for step, (ours, theirs) in enumerate(zip(found["said"], expected["said"], strict=True)):
        assert torch.equal(ours[0], theirs[0]), step
        torch.testing.assert_close(ours[1], theirs[1])
    for name in ("keys", "stamps", "tokens"):
        if expected["learned"]:
            assert torch.equal(found["learned"][name], expected["learned"][name]), name
    if expected["learned"]:
        torch.testing.assert_close(found["learned"]["weights"], expected["learned"]["weights"])
        assert (expected["learned"]["keys"] != 0).sum() > 10
    torch.testing.assert_close(found["rates"], expected["rates"])
    assert torch.equal(found["ahead"], expected["ahead"])
    assert torch.equal(found["size"], expected["size"])
    confident = torch.cat([chances for _, chances in expected["said"]])
    assert (confident > 0).any()


def test_rows_of_a_step_are_those_of_tensor_operations(interpreted: Callable[..., Any]) -> None:
    expected, found = rows_of_a_step("torch"), interpreted(rows_of_a_step, "triton")
    for name, values in expected.items():
        assert torch.equal(found[name], values), name
    assert (expected["following"] >= 0).any()
    assert (expected["contexts"][:, 2] < 0).any()


def test_counts_are_those_of_tensor_operations(interpreted: Callable[..., Any]) -> None:
    assert torch.equal(interpreted(counts_of_steps, "triton"), counts_of_steps("torch"))


@pytest.mark.parametrize("method", METHODS)
def test_kernels_compile_for_a_gpu_without_one(method: str) -> None:
    """By Triton's own compiler and assembler, for compute capability 9.0, which the interpreter does not use."""
    compiled = compile_kernels(method)
    assert len(compiled) == (5 if method == "prompt-lookup" else 7 if method == "hybrid" else 6)
    assert all(size > 0 for size in compiled.values())
