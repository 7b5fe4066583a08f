#!/usr/bin/env python
"""Does a GPU serve what a CPU does? Galley on vLLM's runner V2 under CUDA graphs, beside plain vLLM.

All servers run at once on one GPU. In float32, greedy answers of every drafter, of a memory at a weight of 0,
and of an engine that also embeds are compared with plain vLLM's, token for token; answers mixed with a memory
under CUDA graphs with those of an engine without any graph. In bfloat16, tokens a second on Spec-Bench with
and without drafts, in turn. A server that does not start is named, with the end of its log, and left out.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from loadtest.check_lossless import REFERENCE, chosen, compare
from loadtest.check_lossless import ask as ids_of
from loadtest.harness import Report
from loadtest.servers import MODEL, Server, galley_worker, plain_vllm
from loadtest.specbench import Prompt, data_path, in_turn, load_prompts
from loadtest.speculation_cells import wave

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

ENGINE: dict[str, Any] = {
    "max-model-len": 4096,
    "max-num-seqs": 64,
    "kv-cache-memory-bytes": 2 * 1024**3,
    "gpu-memory-utilization": 0.04,
}
GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}  # captured, without torch.compile
DRAFTERS = ("trigram", "recycling", "prompt-lookup", "hybrid")
PLAIN = "plain"
SAMPLED = 8  # prompts that are asked alone, and through a memory
TEXTS = ("A red fox crosses the road.", "Rust prevents data races at compile time.", "Wie spät ist es?")


def starters(options: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """How to start each server, by name; those in bfloat16 end so."""
    graphs = {} if options.compile else {"compilation-config": GRAPHS}
    attention = {"attention-backend": options.attention} if options.attention else {}
    exact = {**ENGINE, **graphs, **attention, "dtype": "float32"}
    fast = {**ENGINE, **graphs, **attention, "dtype": "bfloat16"}
    found: dict[str, Callable[[], Any]] = {}

    def worker(name: str, engine: dict[str, Any], *flags: str) -> None:
        found[name] = lambda: galley_worker(engine, "--tasks", "generate", *flags, weights=options.model)

    found[PLAIN] = lambda: plain_vllm(exact, weights=options.model)
    for method in DRAFTERS:
        worker(method, exact, "--speculation", json.dumps({"method": method}))
    both = ("--tasks", "generate,embed", "--speculation", json.dumps({"method": "hybrid"}))
    found["dual"] = lambda: galley_worker(exact, *both, weights=options.model)
    if options.memory:
        memory = ("--memory", json.dumps({"path": str(options.memory)}))
        worker("memory", exact, *memory)
        found["memory eager"] = lambda: galley_worker(
            {name: value for name, value in exact.items() if name != "compilation-config"},
            "--tasks", "generate", *memory, "--compile", "off", weights=options.model,
        )  # fmt: skip
    found["plain bf16"] = lambda: plain_vllm(fast, weights=options.model)
    peer = {
        "method": "ngram_gpu",
        "num_speculative_tokens": 4,
        "prompt_lookup_min": 2,
        "prompt_lookup_max": 4,
    }
    found["ngram bf16"] = lambda: plain_vllm({**fast, "speculative-config": peer}, weights=options.model)
    worker("hybrid bf16", fast, "--speculation", json.dumps({"method": "hybrid"}))
    names = options.servers.split(",") if options.servers else list(found)
    if unknown := [name for name in names if name not in found]:
        sys.exit(f"bench_gpu: --servers: found {', '.join(unknown)}, expected some of {', '.join(found)}")
    return {name: found[name] for name in names}


@contextlib.contextmanager
def all_running(
    starts: dict[str, Callable[[], Any]], at_once: int
) -> Iterator[tuple[dict[str, Server], dict[str, str]]]:
    """The servers that came up, and why the others did not."""
    running: dict[str, Server] = {}
    failed: dict[str, str] = {}
    with contextlib.ExitStack() as scopes:

        def start(name: str, make: Callable[[], Any]) -> None:
            begun = time.monotonic()
            try:
                running[name] = scopes.enter_context(make())
                print(f"{name}: ready after {time.monotonic() - begun:.0f} s", flush=True)
            except AssertionError as error:
                failed[name] = str(error)[-6000:]
                print(f"{name}: {failed[name]}", flush=True)

        with ThreadPoolExecutor(at_once) as pool:
            tries = [pool.submit(start, name, make) for name, make in starts.items()]
            for each in tries:
                each.result()
        yield running, failed


def answers_of(
    server: Server, prompts: Sequence[Prompt], batch: int, tokens: int, **fields: Any
) -> dict[int, list[int]]:
    with ThreadPoolExecutor(batch) as pool:
        found = pool.map(lambda prompt: ids_of(server, prompt, tokens, **fields), prompts)
        return {prompt.question: ids for prompt, ids in zip(prompts, found, strict=True)}


def identical(
    servers: dict[str, Server], prompts: Sequence[Prompt], batch: int, tokens: int
) -> dict[str, dict[str, Any]]:
    """Every float32 server's answers beside plain vLLM's, at `batch` and, for some prompts, alone."""
    exact = {name: each for name, each in servers.items() if "bf16" not in name and "memory" not in name}
    found = {REFERENCE: answers_of(servers[PLAIN], prompts, batch, tokens)}
    for name, server in exact.items():
        if name != PLAIN:
            found[name, batch] = answers_of(server, prompts, batch, tokens)
        found[name, 1] = answers_of(server, prompts[:SAMPLED], 1, tokens)
    if "memory" in servers:
        zero = {"vllm_xargs": {"memory_weight": 0.0}}
        found["memory at zero", batch] = answers_of(servers["memory"], prompts, batch, tokens, **zero)
    return compare(found)


def mixed(servers: dict[str, Server], prompts: Sequence[Prompt], tokens: int) -> dict[str, Any]:
    """Answers through a memory, under graphs and without, one at a time."""
    one, other, plain = (
        answers_of(servers[name], prompts, 1, tokens) for name in ("memory", "memory eager", PLAIN)
    )
    return {
        "compared": len(one),
        "graphs_as_eager": sum(one[each] == other[each] for each in one),
        "unlike_plain": sum(one[each] != plain[each] for each in one),
    }


def speeds(
    servers: dict[str, Server],
    prompts: Sequence[Prompt],
    batches: Sequence[int],
    repeats: int,
    tokens: int,
    found: list[dict[str, Any]],
) -> None:
    """Waves of new prompts for each repeat, the same for each server in turn, added to `found`."""
    rivals = {name: server for name, server in servers.items() if name.endswith("bf16")}
    for name, server in rivals.items():
        wave(server, list(prompts[:16]), 16, 16)
        print(f"{name}: warm", flush=True)
    start = 16
    for repeat in range(repeats):
        for batch in batches:
            count = 12 if batch == 1 else 2 * batch
            chunk = [prompts[(start + place) % len(prompts)] for place in range(count)]
            start += count
            for name, server in rivals.items():
                each = wave(server, chunk, batch, tokens)
                row = {
                    "server": name,
                    "batch": batch,
                    "repeat": repeat,
                    "tokens_per_second": each.tokens_per_second,
                    "tokens_per_step": each.generated / each.steps,
                    "seconds": each.seconds,
                    "counters": each.counters,
                }
                found.append(row)
                print(name, batch, f"{row['tokens_per_second']:.0f} tokens/s", flush=True)


def figures_of(waves: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Medians over the repeats: of ratios to plain vLLM, and of tokens per step."""
    found = {}
    by_key = {(each["server"], each["batch"], each["repeat"]): each for each in waves}
    for name, batch in dict.fromkeys((each["server"], each["batch"]) for each in waves):
        cells = {key[2]: each for key, each in by_key.items() if key[:2] == (name, batch)}
        label = name.removesuffix(" bf16")
        speed = statistics.median(each["tokens_per_second"] for each in cells.values())
        found[f"tokens_per_second_{label}_b{batch}"] = round(speed, 1)
        if name != "plain bf16" and ("plain bf16", batch, 0) in by_key:
            ratios = [
                each["tokens_per_second"] / by_key["plain bf16", batch, repeat]["tokens_per_second"]
                for repeat, each in cells.items()
            ]
            found[f"speedup_{label}_b{batch}"] = round(statistics.median(ratios), 3)
            steps = statistics.median(each["tokens_per_step"] for each in cells.values())
            found[f"tokens_per_step_{label}_b{batch}"] = round(steps, 3)
    return found


def similarity(server: Server, expected: Path | None) -> dict[str, Any]:
    """Cosines of embeddings with those of another machine, if there are any."""
    vectors = torch.tensor(server.embed(list(TEXTS)))
    found: dict[str, Any] = {"norms": vectors.norm(dim=1).tolist()}
    if expected:
        others = torch.tensor(json.loads(expected.read_text(encoding="utf-8")))
        found["cosine"] = torch.nn.functional.cosine_similarity(vectors, others).min().item()
    return found


def read_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="Spec-Bench's JSONL; default: below $GALLEY_DATA")
    parser.add_argument("--model", default=MODEL, help="default %(default)s")
    parser.add_argument(
        "--memory", type=Path, help="folder of a memory of that model; default: none is served"
    )
    parser.add_argument("--embeddings", type=Path, help="JSON of vectors that another machine gave")
    parser.add_argument("--attention", help="vLLM's attention backend; default: its choice")
    parser.add_argument("--compile", action="store_true", help="vLLM's default compilation, not graphs alone")
    parser.add_argument("--servers", help="comma-separated names; default: all")
    parser.add_argument("--at-once", type=int, default=6, help="servers that start together; default 6")
    parser.add_argument("--prompts", type=int, default=10, help="of each task, compared; default 10")
    parser.add_argument("--tokens", type=int, default=128, help="of an answer; default 128")
    parser.add_argument("--batches", default="1,8,32", help="whose speed is measured; default %(default)s")
    parser.add_argument("--repeats", type=int, default=3, help="default 3")
    parser.add_argument("--name", default="bench_gpu", help="of the record; default %(default)s")
    parser.add_argument("--quick", action="store_true", help="2 prompts of each task, 1 repeat")
    options = parser.parse_args(arguments)
    if options.quick:
        options.prompts, options.repeats = 2, 1
    return options


def main() -> None:
    options = read_options()
    if not torch.cuda.is_available():
        sys.exit("bench_gpu: found no GPU, expected one; nothing was measured")
    try:
        lines = data_path(options.data, os.environ).read_text(encoding="utf-8").splitlines()
        prompts = load_prompts(lines)
    except (OSError, ValueError) as error:
        sys.exit(f"bench_gpu: {error}")
    compared = list(chosen(prompts, options.prompts))
    others = in_turn([each[options.prompts :] for each in prompts.values()])
    named = {key: value.name if isinstance(value, Path) else value for key, value in vars(options).items()}
    report = Report(options.name, named)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was measured until then is kept
    result: dict[str, Any] = {}
    waves: list[dict[str, Any]] = []
    try:
        with all_running(starters(options), options.at_once) as (servers, failed):
            report.add("not_started", failed)
            result |= {"served": sorted(servers), "not_started": sorted(failed)}
            if PLAIN in servers:
                cells = identical(servers, compared, 8, options.tokens)
                report.add("cells", cells)
                result["cells"] = {
                    key: f"{cell['identical']}/{cell['compared']}" for key, cell in cells.items()
                }
                print(result["cells"], flush=True)
                if {"memory", "memory eager"} <= servers.keys():
                    result["memory"] = mixed(servers, compared[:SAMPLED], options.tokens)
                    print(result["memory"], flush=True)
            if "dual" in servers:
                result["embeddings"] = similarity(servers["dual"], options.embeddings)
                print(result["embeddings"], flush=True)
            batches = [int(each) for each in options.batches.split(",")]
            speeds(servers, others, batches, options.repeats, options.tokens, waves)
    finally:
        report.add("waves", {"waves": waves})
        report.finish({**result, **figures_of(waves)})


if __name__ == "__main__":
    main()
