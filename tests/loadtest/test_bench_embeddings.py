"""What the embeddings benchmark computes from texts, options and measured cells; no engine."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.decoders import ByteLevel
from transformers import PreTrainedTokenizerFast

from loadtest import bench_embeddings as bench
from loadtest import embedding_documents, embedding_figures, embedding_servers, embedding_texts
from loadtest.embedding_loads import Load, drive
from loadtest.embedding_texts import Texts
from loadtest.embedding_work import Step, Work

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

Rates = dict[str, dict[str, float]]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte pairs: letters, and `th` and `the` with and without the space before."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the")]
    vocabulary = {token: place for place, token in enumerate([*letters, "th", "the", "Ġthe"])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made)


@pytest.fixture
def sources() -> list[str]:
    words = ("the", "then", "other", "a", "moth", "these", "bathe", "hut")
    return [" ".join(words[(7 * row + 3 * place) % 8] for place in range(40)) for row in range(30)]


@pytest.mark.parametrize("length", [4, 9, 33])
def test_texts_have_exactly_as_many_tokens_and_differ(
    tokenizer: PreTrainedTokenizerFast, sources: list[str], length: int
) -> None:
    texts = Texts(tokenizer, sources).of_length(length, 3)
    assert [len(tokenizer(text)["input_ids"]) for text in texts] == [length] * 3
    assert len(set(texts)) == 3
    assert all(text == text.strip() for text in texts)


def test_texts_begin_with_words_and_are_the_same_in_every_run(
    tokenizer: PreTrainedTokenizerFast, sources: list[str]
) -> None:
    texts = Texts(tokenizer, sources).of_length(20, 8)
    assert texts == Texts(tokenizer, sources).of_length(20, 8)
    whole = " " + " ".join(sources)
    assert all(f" {text.split()[0]} " in whole for text in texts)


def test_too_little_to_cut_from_is_an_error(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="found 1 different texts of 3 tokens, expected 2"):
        Texts(tokenizer, ["the a"]).of_length(3, 2)
    with pytest.raises(ValueError, match="found 0 different texts of 9 tokens"):
        Texts(tokenizer, ["the a"]).of_length(9, 1)


def test_absent_data_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="with --data or GALLEY_DATA"):
        embedding_texts.data_folder(None, {})
    with pytest.raises(FileNotFoundError, match="has no folder retrieval/"):
        embedding_texts.data_folder(tmp_path, {})
    (tmp_path / "retrieval").mkdir()
    assert embedding_texts.data_folder(None, {"GALLEY_DATA": str(tmp_path)}) == tmp_path


def test_sentences_are_those_that_no_prompt_changes(tmp_path: Path) -> None:
    for name in ("sts", "retrieval"):
        (tmp_path / name).mkdir()
    kept = [f"Number {number} is here." for number in range(9)]
    rows = ['"Is it ""so""?",b,1', "no end,b,1", *(f"{text},b,2" for text in kept)]
    (tmp_path / "sts" / "stsb_en_dev.csv").write_text("\n".join(rows) + "\n")
    (tmp_path / "retrieval" / "cran.all.1400.xml").write_text(
        '<docno>1</docno><text>what is "lift" , is it drag ? yes .</text>'
    )
    (tmp_path / "retrieval" / "cran.qry.xml").write_text("<title>a</title>")
    (tmp_path / "retrieval" / "cranqrel.trec.txt").write_text("1 0 1 1\n")
    found = embedding_texts.sentences(tmp_path, 8, words=8)
    assert found == [*kept[:7], "what is lift , is it drag."]


def test_a_load_is_so_many_tokens_and_no_smaller_than_its_clients() -> None:
    assert [Load(16).requests(100), Load(16, clients=8).requests(100)] == [7, 8]
    assert Load(16, batch=4).requests(100) == 2
    assert [Load(16, 8).key, Load(128, batch=32).key] == ["16x8", "128x1b32"]


def test_a_loads_requests_use_each_text_once() -> None:
    load = Load(10, clients=2, batch=3)
    texts = [str(number) for number in range(load.texts(60))]
    warm, measured = load.fill(texts, 60)
    assert (len(warm), len(measured)) == (2, 2)
    assert [text for request in (*warm, *measured) for text in request] == texts


def test_every_server_gets_every_length_and_slower_methods_one_number_of_clients() -> None:
    every = [load.key for load in bench.loads_of("vllm", (16, 128, 512), (1, 8))]
    assert every == ["16x1", "16x8", "128x1", "128x8", "512x1", "512x8", "128x1b32"]
    assert [load.key for load in bench.loads_of("galley-echo", (16, 128), (1, 8))] == ["16x8", "128x8"]
    assert [load.key for load in bench.loads_of("galley-echo", (16,), (4,))] == ["16x4"]
    assert [load.key for load in bench.loads_of("vllm", (128,), (8,))] == ["128x8"]


class Embedder(BaseHTTPRequestHandler):
    """Answers with as many vectors as it was sent texts; refuses "bad" and forgets one for "few"."""

    protocol_version = "HTTP/1.1"
    running: list[int]

    def do_POST(self) -> None:
        texts = json.loads(self.rfile.read(int(self.headers["content-length"])))["input"]
        rows = texts[1:] if "few" in texts else texts
        body = json.dumps({"data": [{"embedding": ""} for _ in rows]}).encode()
        self.send_response(400 if "bad" in texts else 200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Embedder) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_clients_send_every_request_and_go_on_after_a_failure(url: str) -> None:
    wave = drive(url, [["a"], ["bad"], ["a", "b"], ["few", "a"], ["c"]], clients=2)
    assert len(wave.latencies) == 3
    assert max(wave.latencies) <= wave.seconds
    refused, short = sorted(wave.failures)
    assert "found 1 vectors, expected 2" in refused
    assert "found the status 400" in short


def test_a_server_that_is_gone_is_a_failure_of_each_request() -> None:
    wave = drive("http://127.0.0.1:1", [["a"], ["b"]], clients=1)
    assert (len(wave.failures), wave.latencies) == (2, [])


def method_row(method: str, sts: float | None, cosines: list[float] | None = None) -> dict[str, Any]:
    quality = {} if sts is None else {"sts": sts, "cranfield": 20.0}
    return {"part": "method", "method": method, "quality": quality, "cosines": cosines or []}


def speed_row(server: str, repeat: int, seconds: dict[str, float]) -> dict[str, Any]:
    """Ten texts at each load, in so many seconds."""
    waves = {load: {"texts": 10, "seconds": value} for load, value in seconds.items()}
    return {"part": "speed", "server": server, "repeat": repeat, "waves": waves}


def test_gains_are_over_prompt_eol_and_minilm_is_a_ratio() -> None:
    rows = [
        method_row("prompt-eol", 60.0),
        method_row("token-prepending", 64.5),
        method_row("causal2vec", 75.0),
        method_row("minilm", 80.0),
    ]
    figures = embedding_figures.quality_figures(rows)
    assert figures["tp_gain"] == 4.5
    assert figures["causal2vec_gain"] == 15.0
    assert figures["causal2vec_over_minilm"] == 0.9375
    assert figures["gem_gain"] is figures["nv_embed_gain"] is None


def test_no_gain_is_said_without_its_base() -> None:
    figures = embedding_figures.quality_figures([method_row("token-prepending", 64.5)])
    assert figures["tp_gain"] is figures["causal2vec_over_minilm"] is None


def test_the_lowest_cosine_is_over_methods_and_texts() -> None:
    rows = [
        method_row("mean", None, [1.0, 0.9999]),
        method_row("echo", None, [0.99995]),
        method_row("gem", 1),
    ]
    assert embedding_figures.cosine_figures(rows) == {
        "reference_cosine_min": 0.9999,
        "reference_cosine_min_by_method": {"mean": 0.9999, "echo": 0.99995},
    }
    assert embedding_figures.cosine_figures([])["reference_cosine_min"] is None


def test_a_speed_is_the_median_of_the_repeats() -> None:
    rows = [speed_row("vllm", repeat, {"16x1": value}) for repeat, value in enumerate((1.0, 2.0, 40.0))]
    assert embedding_figures.rates_of(rows) == {"vllm": {"16x1": 5.0}}


def test_ratios_are_a_geometric_mean_over_loads_with_the_median_and_the_worst() -> None:
    rates: Rates = {
        "galley": {"16x1": 40.0, "16x8": 10.0, "128x1": 20.0},
        "vllm": {"16x1": 10.0, "16x8": 20.0, "128x1": 20.0},
        "galley-dual": {"16x1": 5.0},
    }
    figures = embedding_figures.speed_figures(rates)
    assert figures["over_vllm_pooling"] == pytest.approx(2 ** (1 / 3), abs=1e-3)
    assert (figures["over_vllm_pooling_median"], figures["over_vllm_pooling_worst"]) == (1.0, 0.5)
    assert figures["dual_over_vllm_pooling"] == 0.5
    assert figures["over_infinity"] is figures["over_infinity_worst"] is None


def test_a_slower_methods_time_is_over_mean_on_the_same_engine() -> None:
    rates: Rates = {"galley-dual": {"16x8": 12.0, "128x8": 9.0}, "galley-echo": {"16x8": 6.0, "128x8": 3.0}}
    figures = embedding_figures.speed_figures(rates)
    assert figures["echo_time_by_load"] == {"16x8": 2.0, "128x8": 3.0}
    assert figures["echo_time"] == pytest.approx(6**0.5, abs=1e-3)
    assert figures["causal2vec_time"] is None


def document_row() -> dict[str, Any]:
    alone = embedding_documents.spread([10.0] * 99 + [20.0])
    beside = embedding_documents.spread([30.0] * 99 + [80.0])
    return {
        "part": "documents",
        "documents": 4,
        "tokens": 4000,
        "seconds": 40.0,
        "failures": [],
        "gap_ms": {"alone": alone, "beside": beside},
        "first_token_ms": {"alone": alone, "beside": embedding_documents.spread([])},
    }


def test_documents_are_told_by_the_chats_gaps_beside_them() -> None:
    figures = embedding_figures.document_figures([document_row()])
    assert figures["document_failures"] == 0
    assert figures["document_tokens_per_second"] == 400.0
    assert (figures["chat_gap_p50_ratio"], figures["chat_gap_ms_p99_beside"]) == (3.0, 30.0)
    assert figures["chat_first_token_ms_p50_beside"] is None


def test_gaps_belong_to_the_stretch_of_time_in_which_they_ended() -> None:
    times = [(1.0, 0.5), (2.0, 0.25), (3.0, 0.125)]
    assert embedding_documents.within(times, 2.0, 3.0) == [250.0]


def test_a_perplexity_changes_relative_to_plain_vllms() -> None:
    row = {"part": "perplexity", "plain": 20.0, "gem": 19.9}
    assert embedding_figures.perplexity_figures([row])["gem_perplexity_change"] == 0.005
    assert embedding_figures.perplexity_figures([])["gem_perplexity_change"] is None


def test_only_lines_with_text_are_tokens() -> None:
    def line(delta: dict[str, Any]) -> bytes:
        return b"data: " + json.dumps({"choices": [{"delta": delta}]}).encode() + b"\n"

    assert embedding_documents.has_text(line({"content": " a"}))
    assert not embedding_documents.has_text(line({"role": "assistant", "content": ""}))
    assert not embedding_documents.has_text(b"\n")
    assert not embedding_documents.has_text(b'data: {"choices": []}\n')
    with pytest.raises(ValueError, match="too busy"):
        embedding_documents.has_text(b'data: {"error": "too busy"}\n')


def test_only_the_parts_that_ran_have_figures() -> None:
    rows = [method_row("mean", None, [1.0]), speed_row("galley", 0, {"16x1": 1.0}), document_row()]
    assert set(embedding_figures.figures_of(rows, ["cosine"])) == {
        "reference_cosine_min",
        "reference_cosine_min_by_method",
    }
    every = embedding_figures.figures_of(rows, embedding_figures.PARTS)
    names = {"tp_gain", "gem_gain", "causal2vec_gain", "nv_embed_gain", "causal2vec_over_minilm"}
    names |= {"reference_cosine_min", "over_vllm_pooling", "over_sentence_transformers", "over_infinity"}
    assert names < set(every)
    json.dumps(every)


def test_tables_have_methods_by_task_and_servers_by_load() -> None:
    rows = [
        method_row("mean", 50.0),
        speed_row("galley", 0, {"16x1": 1.0}),
        speed_row("vllm", 0, {"16x1": 2.0}),
    ]
    quality, speed = embedding_figures.markdown(rows).split("\n\n")
    assert "| mean | 50.00 | 20.00 |" in quality
    assert "| galley | 160 |" in speed
    assert "| galley / vllm | 2.00 |" in speed


def test_a_trained_method_needs_its_adapter(tmp_path: Path) -> None:
    (tmp_path / "gem").mkdir()
    assert embedding_servers.options_of("mean", None) == {"method": "mean"}
    assert embedding_servers.options_of("gem", tmp_path) == {"adapter": str(tmp_path / "gem")}
    assert embedding_servers.options_of("nv-embed", tmp_path) is None


def test_what_cannot_be_measured_is_left_out_and_said(tmp_path: Path) -> None:
    (tmp_path / "causal2vec").mkdir()
    nowhere = str(tmp_path / "python")
    absent = ["--infinity", nowhere, "--minilm", str(tmp_path)]
    options = bench.read_options(["--adapters", str(tmp_path), *absent])
    reasons = bench.leave_out(options)
    assert options.methods == ["mean", "last", "prompt-eol", "token-prepending", "echo", "causal2vec"]
    assert "infinity" not in options.servers
    assert "galley-causal2vec" in options.servers
    said = {reason.split(":")[0]: reason for reason in reasons}
    missing = {"gem", "nv-embed", "minilm", "infinity", "perplexity"}
    assert set(said) - {"sentence-transformers"} == missing
    assert nowhere in said["infinity"]
    assert "expected all-MiniLM-L6-v2" in said["minilm"]
    options = bench.read_options(absent)
    assert "galley-causal2vec: no adapter" in bench.leave_out(options)
    assert "galley-causal2vec" not in options.servers


def test_parts_that_do_not_run_need_nothing(tmp_path: Path) -> None:
    options = bench.read_options(["--only", "cosine", "--infinity", str(tmp_path), "--methods", "mean"])
    options.servers = ["infinity"]
    assert bench.leave_out(options) == []


def test_options_have_a_long_and_a_quick_form() -> None:
    long, quick = bench.read_options([]), bench.read_options(["--quick"])
    assert (long.repeats, long.tokens, long.limit) == (3, 8192, None)
    assert (long.lengths, long.clients) == ([16, 128, 512], [1, 8, 32])
    assert long.only == ["quality", "cosine", "speed", "documents", "perplexity"]
    assert quick.only == ["quality", "cosine", "speed"]
    assert (quick.repeats, quick.lengths, quick.clients) == (1, [128], [8])
    assert quick.servers == ["galley", "vllm", "sentence-transformers", "infinity"]


def test_a_run_of_some_parts_has_results_of_its_own() -> None:
    assert bench.name_of(bench.read_options([])) == "bench_embeddings"
    assert bench.name_of(bench.read_options(["--quick"])) == "bench_embeddings.quick"
    assert bench.name_of(bench.read_options(["--only", "speed"])) == "bench_embeddings.speed"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "speed,colour"], "--only: found colour, expected some of quality"),
        (["--methods", "magic"], "--methods: found magic, expected some of mean"),
        (["--servers", "tei"], "--servers: found tei, expected some of galley"),
        (["--tasks", "sts,mteb"], "--tasks: found mteb, expected some of sts, cranfield, banking77"),
        (["--clients", "1,x"], "--clients: found 1,x, expected numbers"),
        (["--lengths", "0"], "numbers are at least 1"),
        (["--quick", "--resume"], "--quick has no --resume"),
    ],
)
def test_options_that_cannot_be_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        bench.read_options(arguments)
    assert message in capsys.readouterr().err


def test_an_interrupted_run_goes_on_with_what_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "cells.jsonl"
    ran: list[str] = []

    def step(key: str) -> Step:
        def run() -> dict[str, Any]:
            ran.append(key)
            return {"key": key}

        return Step(key, run)

    Work(path, {"tokens": 1}, resume=False).do([step("a")])
    with path.open("a") as file:
        file.write('["b", {"ke')  # killed while it wrote
    resumed = Work(path, {"tokens": 1}, resume=True)
    assert resumed.do([step("a"), step("b")]) == [{"key": "a"}, {"key": "b"}]
    assert ran == ["a", "b"]
    assert Work(path, {"tokens": 1}, resume=True).cells == {"a": {"key": "a"}, "b": {"key": "b"}}
    resumed.remove()
    assert not path.exists()


def test_an_interrupted_run_is_neither_overwritten_nor_mixed(tmp_path: Path) -> None:
    path = tmp_path / "cells.jsonl"
    Work(path, {"tokens": 1}, resume=False)
    with pytest.raises(ValueError, match="go on with --resume, or remove it"):
        Work(path, {"tokens": 1}, resume=False)
    with pytest.raises(ValueError, match="measured otherwise"):
        Work(path, {"tokens": 2}, resume=True)


def test_a_run_without_a_file_keeps_its_cells_in_memory() -> None:
    work = Work(None, {}, resume=False)
    assert work.do([Step("a", lambda: {"value": 1})]) == [{"value": 1}]
    work.remove()
