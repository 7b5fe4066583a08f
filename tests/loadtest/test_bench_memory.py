from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from galley_plugins.memory.examples.gazetteer import make_facts
from galley_plugins.memory.network import Sizes
from loadtest import bench_memory, memory_search
from loadtest.memory_quality import bytes_of, detokenized
from loadtest.memory_servers import MEMORY, PLAIN, SILENT, figures_of
from loadtest.turns import Wave

if TYPE_CHECKING:
    from pathlib import Path


def test_detokenized_text_has_none_of_wikitexts_conventions() -> None:
    text = ' The <unk> @-@ made ship , 1 @,@ 200 t , cost £ 3 @.@ 5 ( in 1871 ) ; it \'s " lost " . \n'
    assert detokenized(text) == ' The-made ship, 1,200 t, cost £3.5 (in 1871); it\'s "lost".\n'


def test_options_name_a_text_that_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_memory.read_options(["--data", str(tmp_path)])
    assert "wikitext2_valid.txt" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", ["--only=speeds", "--rows=wiki", "--entries=many"])
def test_options_refuse_what_they_do_not_know(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_memory.read_options(["--only", "search", wrong])
    assert wrong.split("=")[1] in capsys.readouterr().err


def test_a_search_needs_no_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GALLEY_DATA", raising=False)
    options = bench_memory.read_options(["--only", "search", "--quick"])
    assert (options.only, options.repeats, options.windows) == (["search"], 1, 1)


def test_every_fact_is_told_and_asked_in_words_of_its_own() -> None:
    facts = make_facts(60)
    assert len({fact.asked for fact in facts}) == 60
    assert len({text for fact in facts for text in fact.told}) == 8 * 60
    for fact in facts:
        assert all(fact.answer in text for text in (*fact.told, fact.held_out))
        assert fact.answer not in fact.asked
        assert not any(text.startswith(fact.asked) for text in (*fact.told, fact.held_out))
    assert facts == make_facts(60)


def test_searches_are_compared_with_the_memory_row_by_row() -> None:
    sizes = Sizes("llama", 16, 16, 32, 1, 20)
    found = memory_search.measure([3000], 2, sizes, 50, quantized=False)
    assert len(found["rows"]) == 4
    figures = memory_search.figures_of(found)
    rows = [row for row in found["rows"] if row["rows"] == 1]
    expected = np.median([row["exact_ms"] / row["memory_ms"] for row in rows])
    assert figures["over_knn_3k"] == pytest.approx(expected, abs=0.06)


def test_synthetic_keys_repeat_no_row() -> None:
    keys = memory_search.synthetic(450_000, 2)
    assert keys.shape == (450_000, 2)
    assert np.array_equal(keys[200_000], keys[0] * np.float32(1.01))


def test_speeds_are_ratios_of_waves_of_the_same_prompts() -> None:
    waves = [
        Wave(server, load, repeat, seconds * (repeat + 1), 100, 10)
        for load in ("b1", "c8")
        for repeat in range(3)
        for server, seconds in ((PLAIN, 1.0), (MEMORY, 1.25), (SILENT, 1.0))
    ]
    figures = figures_of(waves)
    assert figures["speed_with_memory_b1"] == figures["speed_with_memory_b8"] == 0.8
    assert figures["speed_at_zero_b1"] == 1.0
    assert figures["tokens_per_second_plain_b8"] == 50.0


def test_bytes_leave_out_what_is_held_out(tmp_path: Path) -> None:
    for name, size in (
        ("datastore/keys.f16", 100),
        ("datastore/values.i32", 20),
        ("datastore/heldout_keys.f16", 7),
        ("index/index.faiss", 30),
        ("memory/memory.safetensors", 5),
    ):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"0" * size)
    assert bytes_of(tmp_path) == {"datastore_and_index": 150, "memory": 5}


def test_figures_name_each_row_of_quality() -> None:
    row = {
        "test": {
            name: {"perplexity": value}
            for name, value in (("plain", 20.0), ("kNN-LM", 16.0), ("memory", 15.0))
        },
        "gain_share_test": 1.5,
        "gain_share_heldout": 1.4,
        "seconds": {"datastore": 10.0, "train": 5.5},
        "corpus": {"entries": 1000},
        "bytes": {"datastore_and_index": 1_156_000, "memory": 80_000},
    }
    figures = bench_memory.quality_figures({"wikitext": row, "layer20": row})
    assert figures["ppl_memory"] == figures["ppl_memory_layer20"] == 15.0
    assert (figures["gain_share_test"], figures["seconds_build_layer20"]) == (1.5, 15.5)
    assert figures["bytes_a_token_datastore_and_index"] == 1156.0
