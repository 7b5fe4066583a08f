#!/usr/bin/env python
"""What an MLP memory brings and costs beside SmolLM2-135M.

quality    perplexity of WikiText-2's test text: the model alone, mixed with kNN-LM over the datastore of nine
           tenths of the validation text, and mixed with the memory that was trained on it. Shares of the mix,
           the teacher's temperature and the step of training that is kept are chosen on the last tenth.
           `detokenized` is the same without WikiText's conventions, `layer20` reads layer 20 of 30.
search     milliseconds of a token: the memory's network against an exact search of 200 thousand to 5 million
           keys, and against an IVF-PQ index
speed      tokens a second through servers with the memory and without, Spec-Bench's prompts
knowledge  made-up facts planted in a corpus: right answers and seconds of the model, its memory and plain RAG

Builds stay in the folder of --work, and another run goes on with them.

Figures:
    ppl_*              of the test text
    gain_share_*       the memory's gain over the model alone, as a share of kNN-LM's, in nats
    over_knn_*         kNN-LM's milliseconds (exact search) over the memory's, for one row
    speed_*            tokens a second over those of a server without memory
    identical_at_zero  weight 0 writes what a server without memory writes, in float32
    facts_*            right answers of all, and RAG's seconds over the memory's
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from galley_plugins.models import resolve
from loadtest.harness import Report, console

if TYPE_CHECKING:
    from collections.abc import Sequence

CORPUS, TEST = Path("lm") / "wikitext2_valid.txt", Path("lm") / "wikitext2_test.txt"
SPEC_BENCH = Path("spec") / "specbench.jsonl"
MODEL = "builtin:smollm2-135m-instruct"
SECTIONS = ("quality", "search", "speed", "knowledge")
ROWS = ("wikitext", "detokenized", "layer20")
QUICK = {"only": ("quality", "search", "speed"), "rows": ("wikitext",)}
ENTRIES, QUICK_ENTRIES = (200_000, 1_000_000, 5_000_000), (5_000_000,)
FACTS, QUICK_FACTS = 60, 12
QUICK_CHARACTERS, QUICK_WINDOWS = 20_000, 1
REPEATS, MAX_TOKENS, QUICK_MAX_TOKENS = 3, 64, 8


def read_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help=f"folder with {CORPUS} and so on; default: $GALLEY_DATA")
    parser.add_argument("--work", type=Path, help="where builds are kept; default: a temporary folder")
    parser.add_argument("--model", default=MODEL, help="builtin:NAME or a folder")
    parser.add_argument("--only", help=f"comma-separated sections; default {','.join(SECTIONS)}")
    parser.add_argument("--rows", help=f"comma-separated, of quality; default {','.join(ROWS)}")
    parser.add_argument("--windows", type=int, help="of 1024 tokens of the test text; default all")
    parser.add_argument("--entries", help="of datastores, comma-separated; default 200000,1000000,5000000")
    parser.add_argument("--memory", type=Path, help="for speed: a memory that is there, in place of a build")
    parser.add_argument("--ivf-pq", action="store_true", help="IVF-PQ indexes too, which take minutes")
    parser.add_argument("--repeats", type=int, help=f"default {REPEATS}")
    parser.add_argument("--dtype", default="float32", help="of the servers")
    parser.add_argument("--device", default="auto", help="of builds: auto, cpu or cuda")
    parser.add_argument("--name", help="of the file of results; default bench_memory")
    parser.add_argument("--quick", action="store_true", help="a small corpus, few prompts")
    options = parser.parse_args(arguments)
    for name, known in (("only", SECTIONS), ("rows", ROWS)):
        given = getattr(options, name)
        default = QUICK[name] if options.quick else known
        setattr(options, name, list(default) if given is None else given.split(","))
        if unknown := sorted(set(getattr(options, name)) - set(known)):
            parser.error(f"--{name}: found {', '.join(unknown)}, expected some of {', '.join(known)}")
    try:
        default = QUICK_ENTRIES if options.quick else ENTRIES
        options.entries = [int(part) for part in options.entries.split(",")] if options.entries else default
    except ValueError:
        parser.error(f"--entries: found {options.entries!r}, expected numbers")
    options.repeats = options.repeats or (1 if options.quick else REPEATS)
    if options.quick:
        options.windows = options.windows or QUICK_WINDOWS
    options.data = options.data or (Path(os.environ["GALLEY_DATA"]) if "GALLEY_DATA" in os.environ else None)
    needed = {"quality": (CORPUS, TEST), "speed": (SPEC_BENCH,)}
    if options.memory is None:
        needed["speed"] = (CORPUS, TEST, SPEC_BENCH)
    for path in dict.fromkeys(path for section in options.only for path in needed.get(section, ())):
        if options.data is None or not (options.data / path).is_file():
            parser.error(f"--data: expected a folder with {path}, or GALLEY_DATA that names one")
    return options


def measure_quality(
    options: argparse.Namespace, work: Path, model: Path, rows: Sequence[str]
) -> dict[str, Any]:
    """Each row's builds and perplexities."""
    from loadtest.memory_quality import detokenized, measure

    corpus, test = ((options.data / path).read_text(encoding="utf-8") for path in (CORPUS, TEST))
    if options.quick:
        corpus = corpus[:QUICK_CHARACTERS]
    found = {}
    for row in rows:
        texts = (detokenized(corpus), detokenized(test)) if row == "detokenized" else (corpus, test)
        more = {"layer": 20} if row == "layer20" else {}
        name = f"{row}{'.quick' if options.quick else ''}"
        found[row] = measure(
            name, work, *texts, model, windows=options.windows, device=options.device, **more
        )
    return found


def quality_figures(found: dict[str, Any]) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for name, row in found.items():
        end = "" if name == "wikitext" else f"_{name}"
        for key, column in (("plain", "plain"), ("kNN-LM", "knn"), ("memory", "memory")):
            figures[f"ppl_{column}{end}"] = round(row["test"][key]["perplexity"], 3)
        figures |= {f"{key}{end}": row[key] for key in ("gain_share_test", "gain_share_heldout")}
        figures[f"seconds_build{end}"] = round(sum(row["seconds"].values()), 1)
        entries = row["corpus"]["entries"]
        for key in ("datastore_and_index", "memory"):
            figures[f"bytes_a_token_{key}{end}"] = round(row["bytes"][key] / entries, 1)
    return figures


def main() -> None:
    options = read_options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    name = options.name or ("bench_memory.quick" if options.quick else "bench_memory")
    shown = {
        **vars(options),
        "data": options.data and options.data.name,
        "work": None,
        "model": None,
        "memory": None,
    }
    report = Report(name, shown)
    model = Path(str(resolve(options.model)))
    with tempfile.TemporaryDirectory(prefix="bench-memory-") as temporary:
        work = (options.work or Path(temporary)).absolute()
        figures: dict[str, Any] = {}
        quality: dict[str, Any] = {}
        builds = "speed" in options.only and options.memory is None
        if "quality" in options.only or builds:
            rows = options.rows if "quality" in options.only else ["wikitext"]
            quality = measure_quality(options, work, model, rows)
            report.add("quality", quality)
            figures |= quality_figures(quality)
        if "search" in options.only:
            figures |= _search(report, options, quality)
        if "speed" in options.only:
            figures |= _speed(report, options, work)
        if "knowledge" in options.only:
            figures |= _knowledge(report, options, work, model)
    report.finish(figures)


def _search(report: Report, options: argparse.Namespace, quality: dict[str, Any]) -> dict[str, float]:
    from galley_plugins.memory.network import Sizes
    from loadtest.memory_search import figures_of, measure

    # The memory that the whole validation text gives, whatever was built here.
    sizes = Sizes("llama", 576, 576, 1536, 1, 12_499)
    if "wikitext" in quality and not options.quick:
        sizes = Sizes(**quality["wikitext"]["sizes"])
    found = measure(options.entries, options.repeats, sizes, 49_152, quantized=options.ivf_pq)
    report.add("search", found)
    return figures_of(found)


def _speed(report: Report, options: argparse.Namespace, work: Path) -> dict[str, Any]:
    from loadtest.memory_servers import compare
    from loadtest.specbench import in_turn, load_prompts

    lines = (options.data / SPEC_BENCH).read_text(encoding="utf-8").splitlines()
    prompts = in_turn(list(load_prompts(lines).values()))
    short = [prompt for prompt in prompts if len(prompt.text) < 2000]
    tokens = QUICK_MAX_TOKENS if options.quick else MAX_TOKENS
    memory = options.memory or work / f"wikitext{'.quick' if options.quick else ''}"
    raw, figures = compare(memory, short, options.dtype, options.repeats, tokens, quick=options.quick)
    report.add("speed", raw)
    return figures


def _knowledge(report: Report, options: argparse.Namespace, work: Path, model: Path) -> dict[str, Any]:
    from galley_plugins.memory.examples.gazetteer import make_facts
    from loadtest.memory_facts import ask, build

    facts = make_facts(QUICK_FACTS if options.quick else FACTS)
    folder, seconds = build(
        facts, work / f"knowledge{'.quick' if options.quick else ''}", model, options.device
    )
    rows = ask(facts, folder, options.repeats)
    report.add("knowledge", {"facts": len(facts), "seconds_build": seconds, "ways": rows})
    console.print({way: row["right"] for way, row in rows.items()})
    figures: dict[str, Any] = {
        f"facts_{way}": round(row["right"] / len(facts), 3) for way, row in rows.items()
    }
    figures["facts_retrieved"] = round(rows["rag"]["found"] / len(facts), 3)
    pairs = zip(rows["rag"]["seconds"], rows["memory"]["seconds"], strict=True)
    figures["facts_rag_over_memory_seconds"] = round(median(rag / own for rag, own in pairs), 3)
    return figures


if __name__ == "__main__":
    main()
