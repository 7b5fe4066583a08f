#!/usr/bin/env python
"""How good Galley's embeddings are and how fast, on SmolLM2-135M-Instruct in float32.

Parts, each with its baselines in the same run:
    quality    each method through a live server, by the evaluation of `galley embed eval`, and MiniLM beside
    cosine     the same servers' vectors against transformers', with chats in the same batches
    speed      tokens and texts a second by length and number of clients, against vLLM's own pooling runner,
               sentence-transformers and infinity, all with these weights, mean pooling and float32
    documents  documents of thousands of tokens beside streaming chats on one engine
    perplexity of WikiText-2's test text under plain vLLM and under an engine with GEM's adapter

A method without its adapter, and infinity without its environment, are left out, which is said.

Figures:
    *_gain                 Spearman correlation on STS-B's test set less PromptEOL's, times 100
    causal2vec_over_minilm ratio of the two correlations
    reference_cosine_min   the lowest cosine over methods and texts
    over_PEER              texts a second of Galley's engine for embeddings alone over the peer's: for each
                           load the ratio of the medians over the repeats, over the loads the geometric mean;
                           *_median and *_worst are the median and the lowest over the loads, dual_* the
                           engine for chats and embeddings
    METHOD_time            how many times as long a text takes as by mean, on the engine for both
    chat_gap_*             inter-token latency of the chats, alone and beside documents
    gem_perplexity_change  of text without special tokens, relative; 0.001 is 0.1 %

A load is a length of texts, a number of clients and the texts of a request. Clients send their next request
when the last is answered, until a fixed number of tokens is embedded; all servers get the same texts, none
twice, in a process of their own for each repeat, and every other option is the server's own default. Galley's
and vLLM's workers, and infinity, answer over HTTP; the gateway in front of workers is not among what is
measured. sentence-transformers has no server: it is called in its own process, one request after another,
without HTTP or a queue, which favours it.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from loadtest import embedding_servers as servers
from loadtest.embedding_figures import MINILM, PARTS, figures_of, markdown
from loadtest.embedding_loads import Load, drive
from loadtest.embedding_peers import (
    SENTENCE_TRANSFORMERS,
    PeerError,
    infinity_python,
    infinity_versions,
    minilm_folder,
    package_folder,
)
from loadtest.embedding_texts import Texts, abstracts, data_folder, sentences
from loadtest.embedding_work import Step, Work
from loadtest.harness import RESULTS, Report, commit, versions

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from loadtest.servers import Server

METHODS = (*servers.METHODS, MINILM)
TASKS = ("sts", "cranfield", "banking77")
LENGTHS, QUICK_LENGTHS = (16, 128, 512), (128,)
CLIENTS, QUICK_CLIENTS = (1, 8, 32), (8,)
BATCH = 32
SLOWER_CLIENTS = 8
TOKENS, QUICK_TOKENS = 8192, 2048
QUICK_METHODS = ("prompt-eol", "token-prepending")
QUICK_SERVERS = (servers.OURS, *servers.PEERS)
QUICK_LIMIT = 100
COSINE_TEXTS, QUICK_COSINE_TEXTS = 24, 4
WIKITEXT = Path("lm") / "wikitext2_test.txt"
WINDOWS, QUICK_WINDOWS, WINDOW_TOKENS = 16, 2, 1024
PROBE = "A galley proof is checked before it is printed."
SAME_MODEL = 0.999  # the least cosine of a peer that serves the same weights and pooling


class Bench:
    """The steps of a run and what they need."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self._options = options
        self._folder = folder
        self._filled: dict[tuple[Load, ...], dict[Load, list[str]]] = {}

    def steps(self) -> list[Step]:
        options = self._options
        found = []
        if {"quality", "cosine"} & set(options.only):
            names = [name for name in options.methods if name != MINILM]
            found += [Step(f"method {name}", partial(self._method, name)) for name in names]
        if "quality" in options.only and MINILM in options.methods:
            found.append(Step(f"method {MINILM}", self._minilm))
        if "speed" in options.only:
            found += [
                Step(f"speed {name} {repeat + 1}", partial(self._speed, name, repeat))
                for repeat in range(options.repeats)
                for name in options.servers
            ]
        if "documents" in options.only:
            found.append(Step("documents", self._documents))
        if "perplexity" in options.only:
            found.append(Step("perplexity", self._perplexity))
        return found

    def _method(self, method: str) -> dict[str, Any]:
        from loadtest.embedding_quality import cosines, endpoint, quality, reference_of

        options = self._options
        embedding = servers.options_of(method, options.adapters)
        assert embedding is not None
        row: dict[str, Any] = {"part": "method", "method": method, "quality": {}, **_state()}
        with servers.embedding_worker(servers.QUALITY, embedding) as server:
            if "cosine" in options.only:
                texts = sentences(self._folder, options.cosine_texts)
                row |= cosines(server, reference_of(method, options.adapters), texts)
            if "quality" in options.only:
                row["quality"] = quality(endpoint(server), self._folder, options.tasks, options.limit)
        return row

    def _minilm(self) -> dict[str, Any]:
        from loadtest.embedding_quality import MiniLm, quality

        options = self._options
        encoder = MiniLm(minilm_folder(options.minilm))
        found = quality(encoder, self._folder, options.tasks, options.limit)
        return {"part": "method", "method": MINILM, "quality": found, **_state()}

    def _speed(self, name: str, repeat: int) -> dict[str, Any]:
        loads = tuple(loads_of(name, self._options.lengths, self._options.clients))
        row = {"part": "speed", "server": name, "repeat": repeat, **_state()}
        if loads not in self._filled:
            self._filled[loads] = self._texts(loads)
        tokens = self._options.tokens
        filled = [(load, *load.fill(texts, tokens)) for load, texts in self._filled[loads].items()]
        if name == servers.IN_PROCESS:
            found = servers.in_process(PROBE, [(warm, requests) for _, warm, requests in filled])
            _check_probe(name, found["probe"])
            waves = {
                load.key: {"texts": load.batch * len(requests), **wave}
                for (load, _, requests), wave in zip(filled, found["waves"], strict=True)
            }
            return {**row, "waves": waves}
        start = time.monotonic()
        with servers.serving(
            name, adapters=self._options.adapters, infinity=self._options.infinity
        ) as server:
            row["start_seconds"] = round(time.monotonic() - start, 1)
            if name not in servers.SLOWER:
                _check_probe(name, server.embed(PROBE)[0])
            return {**row, "waves": {load.key: _wave(server, load, *rest) for load, *rest in filled}}

    def _texts(self, loads: Sequence[Load]) -> dict[Load, list[str]]:
        """Texts for each load, none of them in two."""
        maker = self._maker()
        needed = {load: load.texts(self._options.tokens) for load in loads}
        lengths = sorted({load.length for load in loads})
        every = {
            length: maker.of_length(length, sum(needed[load] for load in loads if load.length == length))
            for length in lengths
        }
        found = {}
        for load in loads:
            found[load] = every[load.length][: needed[load]]
            del every[load.length][: needed[load]]
        return found

    def _maker(self) -> Texts:
        from transformers import AutoTokenizer

        from galley_plugins.models import resolve
        from loadtest.servers import MODEL

        return Texts(AutoTokenizer.from_pretrained(resolve(MODEL)), abstracts(self._folder))

    def _documents(self) -> dict[str, Any]:
        from loadtest.embedding_documents import beside_chats

        options = self._options
        documents = self._maker().of_length(options.document_tokens, options.documents)
        row = {"part": "documents", "tokens": options.document_tokens, **_state()}
        with servers.embedding_worker(servers.DOCUMENTS, {"method": "mean"}) as server:
            return {**row, **beside_chats(server, documents, options.alone_seconds)}

    def _perplexity(self) -> dict[str, Any]:
        from transformers import AutoTokenizer

        from galley_plugins.models import resolve
        from galley_plugins.quantization.perplexity import windows
        from loadtest.perplexity import perplexity
        from loadtest.servers import MODEL, plain_vllm

        options = self._options
        gem = servers.options_of("gem", options.adapters)
        assert gem is not None
        text = (self._folder / WIKITEXT).read_text(encoding="utf-8")
        ids = AutoTokenizer.from_pretrained(resolve(MODEL))(text, verbose=False)["input_ids"]
        texts = windows(ids, options.windows, WINDOW_TOKENS)
        row: dict[str, Any] = {"part": "perplexity", "windows": len(texts), "tokens": WINDOW_TOKENS}
        with plain_vllm(servers.QUALITY) as server:
            row["plain"] = perplexity(server, texts)
        with servers.embedding_worker(servers.QUALITY, gem) as server:
            row["gem"] = perplexity(server, texts)
        return {**row, **_state()}


def _state() -> dict[str, Any]:
    """The machine's load over the last minute, and the code that is measured."""
    return {"load": round(os.getloadavg()[0], 2), "commit": commit()}


def _check_probe(name: str, vector: list[float]) -> None:
    from loadtest import reference

    cosine = reference.cosine(vector, reference.embed(PROBE))
    if cosine < SAME_MODEL:
        raise RuntimeError(f"{name}: found a cosine of {cosine:.4f} with the model's mean, expected 1")


def _wave(server: Server, load: Load, warm: list[list[str]], requests: list[list[str]]) -> dict[str, Any]:
    failures = drive(server.url, warm, load.clients).failures
    wave = drive(server.url, requests, load.clients)
    failures += wave.failures
    if failures:
        raise RuntimeError(f"{load.key}: {len(failures)} requests failed, the first with {failures[0]}")
    latencies = [round(latency, 5) for latency in wave.latencies]
    return {"texts": load.batch * len(requests), "seconds": round(wave.seconds, 5), "latencies": latencies}


def loads_of(server: str, lengths: Sequence[int], clients: Sequence[int]) -> list[Load]:
    """What a server is measured with: every length with every number of clients, and one load of batches.

    Slower methods are measured at one number of clients, by length.
    """
    if server in servers.SLOWER:
        number = SLOWER_CLIENTS if SLOWER_CLIENTS in clients else clients[0]
        return [Load(length, number) for length in lengths]
    found = [Load(length, number) for length in lengths for number in clients]
    if len(found) > 1:
        found.append(Load(sorted(lengths)[len(lengths) // 2], batch=BATCH))
    return found


def read_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder with sts/, retrieval/, cls/; default: $GALLEY_DATA")
    parser.add_argument("--adapters", type=Path, help="folder with gem/, causal2vec/ and nv-embed/")
    parser.add_argument("--minilm", type=Path, help="folder of all-MiniLM-L6-v2; default: the installed one")
    parser.add_argument(
        "--infinity", type=Path, metavar="PYTHON", help="default: what embedding_peers.py installs"
    )
    parser.add_argument("--only", help=f"comma-separated parts; default {','.join(PARTS)}")
    parser.add_argument("--methods", help=f"comma-separated; default {','.join(METHODS)}")
    parser.add_argument("--tasks", default="sts", help=f"of {','.join(TASKS)}; default %(default)s")
    parser.add_argument("--limit", type=int, help="pairs, queries or texts of a task; default all")
    parser.add_argument("--servers", help=f"comma-separated; default {','.join(servers.SERVERS)}")
    parser.add_argument("--lengths", help=f"of texts, in tokens; default {','.join(map(str, LENGTHS))}")
    parser.add_argument("--clients", help=f"comma-separated; default {','.join(map(str, CLIENTS))}")
    parser.add_argument("--tokens", type=int, help=f"of a load; default {TOKENS}")
    parser.add_argument("--repeats", type=int, help="of speed; default 3")
    parser.add_argument("--documents", type=int, default=64, help="default %(default)s")
    parser.add_argument("--document-tokens", type=int, default=4000, help="default %(default)s")
    parser.add_argument(
        "--alone-seconds", type=float, default=60.0, help="of chats without documents; default %(default)s"
    )
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    parser.add_argument(
        "--quick", action="store_true", help="two methods, one load, no documents: under 4 minutes on 2 cores"
    )
    options = parser.parse_args(arguments)
    quick = options.quick
    options.only = _chosen(parser, "--only", options.only, PARTS, PARTS[:3] if quick else PARTS)
    options.tasks = _chosen(parser, "--tasks", options.tasks, TASKS, TASKS)
    options.methods = _chosen(
        parser, "--methods", options.methods, METHODS, QUICK_METHODS if quick else METHODS
    )
    options.servers = _chosen(
        parser, "--servers", options.servers, servers.SERVERS, QUICK_SERVERS if quick else servers.SERVERS
    )
    options.lengths = _numbers(parser, "--lengths", options.lengths, QUICK_LENGTHS if quick else LENGTHS)
    options.clients = _numbers(parser, "--clients", options.clients, QUICK_CLIENTS if quick else CLIENTS)
    options.tokens = options.tokens or (QUICK_TOKENS if quick else TOKENS)
    options.repeats = options.repeats or (1 if quick else 3)
    options.limit = options.limit or (QUICK_LIMIT if quick else None)
    options.cosine_texts = QUICK_COSINE_TEXTS if quick else COSINE_TEXTS
    options.windows = QUICK_WINDOWS if quick else WINDOWS
    least = (options.tokens, options.repeats, options.documents, options.document_tokens, options.limit or 1)
    if min(*least, *options.lengths, *options.clients) < 1:
        parser.error("numbers are at least 1")
    if quick and options.resume:
        parser.error("--quick has no --resume")
    return options


def _chosen(
    parser: argparse.ArgumentParser,
    flag: str,
    given: str | None,
    known: Sequence[str],
    default: Sequence[str],
) -> list[str]:
    names = list(dict.fromkeys(given.split(","))) if given else list(default)
    unknown = [name for name in names if name not in known]
    if unknown:
        parser.error(f"{flag}: found {', '.join(unknown)}, expected some of {', '.join(known)}")
    return names


def _numbers(
    parser: argparse.ArgumentParser, flag: str, given: str | None, default: Sequence[int]
) -> list[int]:
    try:
        return list(dict.fromkeys(map(int, given.split(",")))) if given else list(default)
    except ValueError:
        parser.error(f"{flag}: found {given}, expected numbers")


def leave_out(options: argparse.Namespace) -> list[str]:
    """Drop what cannot be measured here; what was dropped and why."""
    reasons = []
    for method in list(options.methods):
        if method != MINILM and servers.options_of(method, options.adapters) is None:
            options.methods.remove(method)
            reasons.append(f"{method}: no adapter; --adapters names a folder that has {method}/")
    if "perplexity" in options.only and servers.options_of("gem", options.adapters) is None:
        options.only.remove("perplexity")
        reasons.append("perplexity: no adapter of gem")
    for name, method in servers.SLOWER.items():
        if name in options.servers and servers.options_of(method, options.adapters) is None:
            options.servers.remove(name)
            reasons.append(f"{name}: no adapter")

    def ask(kept: list[str], name: str, peer: Callable[[], Any]) -> Any:
        if name not in kept:
            return None
        try:
            return peer()
        except PeerError as error:
            kept.remove(name)
            reasons.append(f"{name}: {error}")
            return None

    if "quality" in options.only:
        ask(options.methods, MINILM, lambda: minilm_folder(options.minilm))
    if "speed" in options.only:
        ask(options.servers, servers.IN_PROCESS, lambda: package_folder(SENTENCE_TRANSFORMERS))
        options.infinity_versions = ask(
            options.servers, servers.INFINITY, lambda: infinity_versions(infinity_python(options.infinity))
        )
    return reasons


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """All that cells depend on."""
    kept = ("tasks", "limit", "lengths", "clients", "tokens", "documents", "document_tokens", "alone_seconds")
    return {
        **{name: getattr(options, name) for name in (*kept, "only", "cosine_texts", "windows")},
        "adapters": str(options.adapters) if options.adapters else None,
        "infinity": getattr(options, "infinity_versions", None),
        "engines": {"speed": servers.SETTINGS, "quality": servers.QUALITY, "documents": servers.DOCUMENTS},
        "versions": versions(),
    }


def name_of(options: argparse.Namespace) -> str:
    """Of the file of results; a run of some parts has its own."""
    if options.quick:
        return "bench_embeddings.quick"
    return ".".join(["bench_embeddings", *(() if set(options.only) == set(PARTS) else options.only)])


def main() -> None:
    options = read_options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # servers end with their scopes
    name = name_of(options)
    try:
        folder = data_folder(options.data, os.environ)
        left_out = leave_out(options)
        settings = settings_of(options)
        path = None if options.quick else RESULTS / f"{name}.cells.jsonl"
        work = Work(path, settings, options.resume)
        steps = Bench(options, folder).steps()
    except (OSError, ValueError) as error:
        sys.exit(f"bench_embeddings: {error}")
    for reason in left_out:
        print(f"left out: {reason}", flush=True)
    named = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    report = Report(name, {**named, "data": folder.name})
    rows = work.do(steps)
    report.add("settings", settings)
    report.add("cells", {step.key: row for step, row in zip(steps, rows, strict=True)})
    report.add("left_out", {"reasons": left_out})
    table = markdown(rows)
    report.add("tables", {"markdown": table.splitlines()})
    print(table, flush=True)
    report.finish(figures_of(rows, options.only))
    work.remove()


if __name__ == "__main__":
    main()
