"""What the speculation benchmark computes from prompts, pages of metrics and measured cells; no server."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import pytest

from loadtest import bench_speculation as bench
from loadtest import specbench, speculation_cells, speculation_figures, speculation_servers
from loadtest.bench_speculation import Bench
from loadtest.specbench import Prompt
from loadtest.speculation_cells import Answer, Cell, Wave, Work

if TYPE_CHECKING:
    from pathlib import Path

MT_BENCH = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
OTHERS = ("translation", "summarization", "qa", "math_reasoning", "rag")
PAGE = """\
# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{engine="0",model_name="m"} 3.0
vllm:spec_decode_num_drafts_created{engine="0",model_name="m"} 1.7e+09
vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="m"} 5.0
vllm:spec_decode_num_accepted_tokens_total{engine="1",model_name="m"} 2.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="0"} 3.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="1"} 2.0
vllm:generation_tokens_total{engine="0",model_name="m"} 40.0
vllm:inter_token_latency_seconds_bucket{engine="0",le="0.01",model_name="m"} 9.0
vllm:inter_token_latency_seconds_count{engine="0",model_name="m"} 30.0
vllm:prompt_tokens_total{engine="0",model_name="m"} 70.0
vllm:cache_config_info{block_size="32",cache_dtype="auto",engine="0"} 1.0
galley_speculation_draft_seconds_total 0.25
galley_speculation_step_seconds_total{model_name="m"} 2.5
"""


def lines(of_category: int = 3) -> list[str]:
    rows = [
        {"question_id": 10 * place + index, "category": category, "turns": [f"{category} {index}", "more"]}
        for place, category in enumerate((*MT_BENCH, *OTHERS))
        for index in range(of_category)
    ]
    return [json.dumps(row) for row in rows]


def wave(seconds: float, tokens: int, counters: dict[str, float] | None = None, text: str = "a") -> Wave:
    return Wave(seconds, [Answer(1, tokens, seconds, "stop", text)], counters or {})


def cell(method: str, batch: int, speeds: dict[str, float], repeat: int = 0, text: str = "a") -> Cell:
    """A cell of one second a task, at as many tokens a second."""
    return Cell(
        method, batch, repeat, {task: wave(1.0, int(speed), text=text) for task, speed in speeds.items()}
    )


def test_the_data_is_the_given_file_or_lies_below_galley_data(tmp_path: Path) -> None:
    given, below = tmp_path / "own.jsonl", tmp_path / "spec" / "specbench.jsonl"
    below.parent.mkdir()
    for path in (given, below):
        path.touch()
    assert specbench.data_path(given, {"GALLEY_DATA": str(tmp_path)}) == given
    assert specbench.data_path(None, {"GALLEY_DATA": str(tmp_path)}) == below


def test_absent_data_is_named() -> None:
    with pytest.raises(FileNotFoundError, match="--data, or its folder with GALLEY_DATA"):
        specbench.data_path(None, {})
    with pytest.raises(FileNotFoundError, match=r"/nowhere/spec/specbench\.jsonl is not there"):
        specbench.data_path(None, {"GALLEY_DATA": "/nowhere"})


def test_prompts_are_first_turns_by_task() -> None:
    prompts = specbench.load_prompts(lines())
    assert list(prompts) == ["mt_bench", *OTHERS]
    assert [prompt.text for prompt in prompts["qa"]] == ["qa 0", "qa 1", "qa 2"]
    assert len(prompts["mt_bench"]) == 24


def test_a_stretch_of_mt_bench_spans_its_categories() -> None:
    prompts = specbench.load_prompts(lines())["mt_bench"]
    assert [prompt.category for prompt in prompts[:8]] == list(MT_BENCH)
    assert [prompt.text for prompt in prompts[8:10]] == ["writing 1", "roleplay 1"]


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"question_id": 1, "category": "poetry", "turns": ["a"]}', '{"category": "qa"}']
)
def test_a_line_that_is_no_question_is_named(line: str) -> None:
    with pytest.raises(ValueError, match="line 2 is no question of Spec-Bench"):
        specbench.load_prompts([lines()[0], line])


def test_a_task_without_questions_is_named() -> None:
    with pytest.raises(ValueError, match="no question for mt_bench, rag"):
        specbench.load_prompts([line for line in lines() if json.loads(line)["category"] in OTHERS[:-1]])


def test_a_stretch_is_taken_from_each_task() -> None:
    chosen = specbench.stretch(specbench.load_prompts(lines(4)), 1, 2)
    assert [prompt.text for prompt in chosen["rag"]] == ["rag 1", "rag 2"]
    assert {len(every) for every in chosen.values()} == {2}


def test_too_few_prompts_are_an_error() -> None:
    with pytest.raises(ValueError, match="translation has 3 prompts, this needs 4"):
        specbench.stretch(specbench.load_prompts(lines(3)), 2, 2)


def test_a_wave_is_no_smaller_than_its_batch() -> None:
    measured = Bench(specbench.load_prompts(lines(8)), 3, 16)
    assert {len(wave) for wave in measured.of_batch(1).values()} == {3}
    assert {len(wave) for wave in measured.of_batch(5).values()} == {5}


def test_what_warms_is_not_measured() -> None:
    measured = Bench(specbench.load_prompts(lines(8)), 3, 16)
    for batch in (1, 4):
        chosen, others = measured.of_batch(batch), measured.of_batch(batch, others=True)
        assert all(not set(chosen[task]) & set(others[task]) for task in chosen)


def test_one_process_sees_no_prompt_twice() -> None:
    alone, eight, sixteen = Bench(specbench.load_prompts(lines(8)), 1, 16).mixed([1, 8, 16])
    assert {len(wave) for wave in alone.values()} == {1}
    assert (len(eight[bench.MIXED]), len(sixteen[bench.MIXED])) == (12, 18)
    seen = [prompt for waves in (alone, eight, sixteen) for wave in waves.values() for prompt in wave]
    assert len(seen) == len(set(seen)) == 36


def test_counters_are_summed_over_labels_but_positions() -> None:
    assert speculation_cells.counters_of(PAGE) == {
        "vllm:spec_decode_num_drafts_total": 3.0,
        "vllm:spec_decode_num_accepted_tokens_total": 7.0,
        "vllm:spec_decode_num_accepted_tokens_per_pos_total[0]": 3.0,
        "vllm:spec_decode_num_accepted_tokens_per_pos_total[1]": 2.0,
        "vllm:generation_tokens_total": 40.0,
        "vllm:inter_token_latency_seconds_count": 30.0,
        "galley_speculation_draft_seconds_total": 0.25,
        "galley_speculation_step_seconds_total": 2.5,
    }


def test_growth_takes_a_new_counter_from_zero() -> None:
    assert speculation_cells.growth({"a": 1.0}, {"a": 3.0, "b": 2.0}) == {"a": 2.0, "b": 2.0}


def test_the_block_size_is_the_engines() -> None:
    assert speculation_cells.block_size_of(PAGE) == 32
    assert speculation_cells.block_size_of("") is None


def test_totals_pool_waves() -> None:
    counters = {
        speculation_cells.LATER_STEPS: 9.0,
        speculation_figures.DRAFTS: 8.0,
        speculation_figures.ACCEPTED: 12.0,
        speculation_figures.DRAFT_SECONDS: 0.1,
        speculation_figures.STEP_SECONDS: 2.0,
    }
    totals = speculation_figures.Totals.of([wave(1.0, 25, counters), wave(3.0, 15, counters)])
    assert totals.tokens_per_step == 40 / 20
    assert totals.mean_accepted_length == 1 + 24 / 16
    assert totals.draft_share == pytest.approx(0.05)


def test_totals_of_nothing_say_nothing() -> None:
    totals = speculation_figures.Totals()
    assert (totals.tokens_per_step, totals.mean_accepted_length, totals.draft_share) == (None, None, None)


def test_a_speedup_is_the_mean_over_tasks_of_ratios_of_medians() -> None:
    cells = [cell("none", 1, {"qa": 10, "rag": 10}, repeat) for repeat in range(3)]
    cells += [cell("hybrid", 1, {"qa": qa, "rag": 10}, repeat) for repeat, qa in enumerate((20, 30, 500))]
    rates = speculation_figures.rates_of(cells)
    assert speculation_figures.ratios(rates, "hybrid", "none", 1) == {"qa": 3.0, "rag": 1.0}
    assert speculation_figures.speedup(rates, "hybrid", "none", 1) == 2.0
    assert speculation_figures.speedup(rates, "hybrid", "none", 8) is None


def test_the_best_peer_is_chosen_by_batch_size() -> None:
    cells = [cell("none", batch, {"qa": 10, "rag": 10}) for batch in (1, 8)]
    cells += [cell("ngram", batch, {"qa": 12, "rag": 12}) for batch in (1, 8)]
    cells += [cell("suffix", 1, {"qa": 10, "rag": 20}), cell("suffix", 8, {"qa": 9, "rag": 9})]
    rates = speculation_figures.rates_of(cells)
    assert (speculation_figures.best_peer(rates, 1), speculation_figures.best_peer(rates, 8)) == (
        "suffix",
        "ngram",
    )
    assert speculation_figures.best_peer(rates, 4) is None


def test_texts_that_the_base_never_gave_are_counted() -> None:
    cells = [cell("none", 1, {"qa": 10}, repeat, text) for repeat, text in enumerate(("a", "b"))]
    cells += [cell("suffix", 1, {"qa": 10}, text="b"), cell("hybrid", 8, {"qa": 10}, text="c")]
    assert speculation_figures.different_texts(cells) == {"suffix": 0, "hybrid": 1}
    assert speculation_figures.varying_prompts(cells) == 1
    figures = speculation_figures.figures_of(cells)
    assert figures["identical"] is False
    assert speculation_figures.figures_of(cells[:-1])["identical"] is True


def measured_cells() -> list[Cell]:
    cells = []
    for batch, gain in ((1, 2.0), (8, 0.5)):
        cells += [
            cell("none", batch, {"qa": 100, "rag": 100}),
            cell("ngram", batch, {"qa": 80, "rag": 120}),
            cell("suffix", batch, {"qa": 100, "rag": 150}),
            cell("hybrid-warm", batch, {"qa": 300, "rag": 300}),
        ]
        counters = {
            speculation_cells.LATER_STEPS: 49.0,
            speculation_figures.DRAFT_SECONDS: 0.01,
            speculation_figures.STEP_SECONDS: 1.0,
        }
        waves = {"qa": wave(1.0, int(100 * gain), counters), "rag": wave(1.0, 150, counters)}
        cells.append(Cell("hybrid", batch, 0, waves))
    return cells


def test_figures_are_those_of_hybrid() -> None:
    figures = speculation_figures.figures_of(measured_cells())
    expected: dict[str, Any] = {
        "identical": True,
        "tokens_per_step_b1": 3.5,
        "tokens_per_step_b1_by_task": {"qa": 4.0, "rag": 3.0},
        "speedup_b1": 1.75,
        "speedup_b8": 1.0,
        "best_peer_b1": "suffix",
        "over_best_peer_b1": 1.5,
        "over_best_peer_b8": 0.75,
        "worst_speedup": 1.0,
        "worst_task_speedup_b1": 1.5,
        "draft_share_b8": 0.01,
        "warm_speedup_b1": 3.0,
    }
    assert {name: figures[name] for name in expected} == expected
    assert figures["speedup_by_method"]["ngram"] == {"1": 1.0, "8": 1.0}
    json.dumps(figures)


def test_hybrid_is_compared_with_galleys_own_steps_where_they_were_measured() -> None:
    cells = [cell("none", 8, {"qa": 10}), cell("hybrid", 8, {"qa": 21})]
    assert "over_own_none_b8" not in speculation_figures.figures_of(cells)
    figures = speculation_figures.figures_of([*cells, cell("galley-none", 8, {"qa": 20})])
    assert (figures["over_own_none_b8"], figures["speedup_b8"]) == (1.05, 2.1)


def test_figures_of_other_methods_leave_hybrids_open() -> None:
    figures = speculation_figures.figures_of([cell("none", 4, {"qa": 10}), cell("trigram", 4, {"qa": 20})])
    assert figures["speedup_by_method"] == {"trigram": {"4": 2.0}}
    assert figures["worst_speedup"] is figures["tokens_per_step_b1"] is figures["over_best_peer_b4"] is None


def test_the_table_has_a_row_for_each_method() -> None:
    first, second = speculation_figures.markdown(measured_cells()).split("\n\n")
    rows = [line.split("|")[1].strip() for line in first.splitlines()]
    assert rows == ["method", "---", "none", "ngram", "suffix", "hybrid", "hybrid-warm"]
    assert "| hybrid | 2.00 | 1.50 |" in second
    assert len({line.count("|") for line in first.splitlines()}) == 1


def test_a_summary_keeps_numbers_without_texts() -> None:
    summary = cell("none", 1, {"qa": 10}, text="secret").summary()
    assert summary["waves"]["qa"]["tokens_per_second"] == 10
    assert summary["waves"]["qa"]["requests"] == {"1": {"tokens": 10, "seconds": 1.0}}
    assert "secret" not in json.dumps(summary)


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "cells.jsonl"
    work = Work(path, {"prompts": 6}, resume=False)
    kept = cell("none", 1, {"qa": 10})
    work.add(kept)
    with path.open("a") as file:
        file.write('{"method": "hyb')  # killed while it wrote
    resumed = Work(path, {"prompts": 6}, resume=True)
    assert resumed.cells == [kept]
    resumed.add(cell("hybrid", 1, {"qa": 20}))
    assert [json.loads(line) for line in path.read_text().splitlines()][1:] == [
        asdict(kept),
        asdict(cell("hybrid", 1, {"qa": 20})),
    ]
    resumed.remove()
    assert not path.exists()


def test_an_interrupted_run_is_neither_overwritten_nor_mixed(tmp_path: Path) -> None:
    path = tmp_path / "cells.jsonl"
    Work(path, {"prompts": 6}, resume=False)
    with pytest.raises(ValueError, match="go on with --resume, or remove it"):
        Work(path, {"prompts": 6}, resume=False)
    with pytest.raises(ValueError, match="measured otherwise"):
        Work(path, {"prompts": 8}, resume=True)


def test_the_time_left_follows_the_batch_size() -> None:
    assert bench.seconds_left([], [1]) == 0
    assert bench.seconds_left([(1, 10.0), (1, 20.0), (8, 60.0)], [1, 8, 16]) == 15 + 60 + 30


def test_options_have_a_long_and_a_quick_form() -> None:
    long, quick = bench.read_options([]), bench.read_options(["--quick"])
    assert (long.prompts, long.repeats, long.max_tokens) == (6, 3, 128)
    assert long.methods == list(speculation_servers.METHODS)
    assert long.batches == [1, 4, 8, 16]
    assert quick.methods == ["none", "suffix", "hybrid"]
    assert (quick.prompts, quick.repeats, quick.batches) == (1, 1, [1, 8])


def test_what_is_compared_with_is_always_measured() -> None:
    assert bench.read_options(["--methods", "hybrid,suffix-warm"]).methods == [
        "none",
        "hybrid",
        "suffix-warm",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "magic"], "found magic, expected some of none"),
        (["--batches", "1,x"], "found 1,x, expected numbers"),
        (["--batches", "0"], "are at least 1"),
        (["--quick", "--resume"], "--quick has neither"),
        (["--quick", "--methods", "hybrid-warm"], "--quick has neither"),
    ],
)
def test_options_that_cannot_be_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        bench.read_options(arguments)
    assert message in capsys.readouterr().err


def test_too_few_prompts_are_found_before_the_first_server() -> None:
    prompts = specbench.load_prompts(lines(4))
    plenty = Bench(prompts, 2, 16)
    plenty.check(bench.read_options(["--batches", "4", "--methods", "hybrid"]))
    with pytest.raises(ValueError, match="has 4 prompts, this needs 8"):
        plenty.check(bench.read_options(["--batches", "4", "--methods", "hybrid-warm"]))


def test_a_method_says_what_its_server_is_told() -> None:
    assert speculation_servers.speculation_of("none") is None
    assert speculation_servers.speculation_of("ngram") == speculation_servers.PEERS["ngram"]
    assert speculation_servers.speculation_of("hybrid-warm") == {"method": "hybrid"}
    assert speculation_servers.speculation_of("none-warm") is None


def test_prompts_of_all_tasks_take_turns() -> None:
    groups = [[Prompt(1, "qa", "a"), Prompt(2, "qa", "b")], [Prompt(3, "rag", "c")]]
    assert [prompt.question for prompt in specbench.in_turn(groups)] == [1, 3, 2]
