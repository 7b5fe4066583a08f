from __future__ import annotations

import pytest

from loadtest import bench_gpu


def test_figures_are_medians_of_ratios_of_the_same_prompts() -> None:
    """Ratios 2, 1 and 0.5 of three repeats, whatever the machine's speed was in each."""
    waves = [
        {"server": server, "batch": 8, "repeat": repeat, "tokens_per_second": speed, "tokens_per_step": steps}
        for repeat, (plain, drafted) in enumerate([(10.0, 20.0), (40.0, 40.0), (90.0, 45.0)])
        for server, speed, steps in (("plain bf16", plain, 1.0), ("hybrid bf16", drafted, 1.5 + repeat))
    ]
    found = bench_gpu.figures_of(waves)
    assert found["speedup_hybrid_b8"] == 1.0
    assert found["tokens_per_second_plain_b8"] == 40.0
    assert found["tokens_per_step_hybrid_b8"] == 2.5


def test_a_server_of_another_name_is_refused_by_it() -> None:
    with pytest.raises(SystemExit, match=r"found plane, expected some of plain, trigram"):
        bench_gpu.starters(bench_gpu.read_options(["--servers", "plain,plane"]))
