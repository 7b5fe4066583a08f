"""vLLM's own bookkeeping runs on these: real CPU generators, and the line that turns one back by its offset."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from galley_plugins.runners.seeds import with_seeded_chunks


class Runner:
    """Draws one number for each row, then turns the generators of dropped rows back as vLLM does."""

    def __init__(self, seeds: dict[int, int], dropped: list[bool]) -> None:
        generators = {row: torch.Generator().manual_seed(seed) for row, seed in seeds.items()}
        self.input_batch = SimpleNamespace(generators=generators)
        self.discard_request_mask = SimpleNamespace(np=np.array(dropped))

    def sample_tokens(self, grammar_output: Any) -> dict[int, float]:
        drawn = {
            row: torch.rand(1, generator=generator).item()
            for row, generator in self.input_batch.generators.items()
        }
        for row in np.nonzero(self.discard_request_mask.np)[0]:
            generator = self.input_batch.generators.get(int(row))
            if generator is not None:
                generator.set_offset(generator.get_offset() - 4)
        return drawn


Seeded = with_seeded_chunks(Runner)


def first_number(seed: int) -> float:
    return torch.rand(1, generator=torch.Generator().manual_seed(seed)).item()


def test_a_cpu_generator_cannot_be_turned_back_so_vllm_alone_fails() -> None:
    with pytest.raises(RuntimeError, match="offset"):
        Runner({0: 5}, [True]).sample_tokens(None)


def test_rows_whose_sample_is_dropped_draw_nothing_and_keep_their_generator() -> None:
    runner = Seeded({0: 5, 2: 7}, [True, False, False])
    assert runner.sample_tokens(None) == {2: first_number(7)}
    runner.discard_request_mask.np[0] = False  # the last chunk
    assert runner.sample_tokens(None)[0] == first_number(5)


def test_generators_come_back_also_after_a_failure() -> None:
    class Broken(Runner):
        def sample_tokens(self, grammar_output: Any) -> Any:
            raise ValueError("broken")

    broken = with_seeded_chunks(Broken)({0: 5}, [True])
    with pytest.raises(ValueError, match="broken"):
        broken.sample_tokens(None)
    assert list(broken.input_batch.generators) == [0]
