#!/usr/bin/env python
"""What weight-only quantization costs SmolLM2-135M and what it brings: perplexity, bits, seconds, and speed.

Perplexity is of WikiText-2's test text, over windows of 1024 tokens one behind the other. The weights of the
decoder layers' linear maps are quantized and put back as what they stand for; embeddings, norms and the
output layer stay. The model runs in transformers, in float32. Bits count codes, scales, and of outliers
values, columns and the starts of rows. llm-compressor's round to nearest and GPTQ stand beside Galley's ways;
GPTQ takes sequences of WikiText-2's validation text, and EasyQuant is timed before and after it.

Seconds are those of the command `galley quantize`, start and imports included, method by method in turn.

Likelihood is of answers that the full weights give to Spec-Bench's prompts as chats, greedily, under them and
under `finequant+easyquant` as `galley quantize` writes it, alone, with `--target-bits` and with
`--self-calibrate`; beside it stand the perplexity of WikiText-2's test text and the command's seconds.

Speed is tokens a second through servers (loadtest/quantization_speed.py), prompts of Spec-Bench, one chat
after the other (b1) and eight at once (c8): vLLM in bfloat16 (through torch.compile only where it is asked
for), llama.cpp with the model's own Q4_1 file, and Galley with 4-bit weights by FineQuant, quantized while
loading, without and with drafts. Where they are asked for, Galley with weights of `finequant+easyquant` and
`--self-calibrate`, and vLLM and Galley with plain weights in float32 too.

Starts are seconds from the command to readiness of Galley's worker in bfloat16: without torch.compile, with
it and an empty cache of compiled code, and with what that start left there, in turn.

Figures:
    ppl_*              perplexity; fp is of the weights as they came, served is of Galley's 4-bit server over
                       the first two windows, activations being integers and the output layer of 8 bits
    bits_*             bits per quantized weight
    seconds_*          to quantize all of them, without starting or loading
    seconds_over_easyquant_*  GPTQ's over EasyQuant's with the same groups, of the same minutes; cpu_ is of
                       the processor's seconds, all cores together, here and elsewhere
    command_seconds_*  of `galley quantize`, medians; per_billion is for each billion of weights quantized
    likelihood_*       mean log-probability of a token of the answers, in nats; loss is what quantizing takes,
                       ppl the perplexity of WikiText-2's test text under the same weights
    int4_speedup_*     Galley's 4-bit server over vLLM in bfloat16; int4_over_compiled_* over vLLM's compiled
    over_llamacpp_*    the same with drafts, over llama.cpp; calibrated_* of weights by --self-calibrate
    float32_*          Galley's float32 servers over vLLM's, and with drafts over without
    start_seconds_*    medians; start_warm_over_eager is their ratio
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from rich.progress import track

from galley_plugins.models import resolve
from galley_plugins.quantization.comparison import load
from galley_plugins.quantization.perplexity import perplexity, windows
from loadtest import likelihood, llmcompressor_peer, quantization_choices, quantize_seconds, turns
from loadtest import quantization_speed as speed
from loadtest import worker_starts as starts
from loadtest.harness import Report, console
from loadtest.llmcompressor_peer import PeerOptions
from loadtest.peer_environments import PeerError
from loadtest.perplexity import perplexity as served_perplexity
from loadtest.quantization_choices import CHOICES, QUICK_CHOICES
from loadtest.servers import MODEL
from loadtest.specbench import Prompt, in_turn, load_prompts

if TYPE_CHECKING:
    from collections.abc import Sequence

WIKITEXT, CALIBRATION = Path("lm") / "wikitext2_test.txt", Path("lm") / "wikitext2_valid.txt"
SPEC_BENCH = Path("spec") / "specbench.jsonl"
WINDOWS, QUICK_WINDOWS, WINDOW_TOKENS, QUICK_WINDOW_TOKENS = 16, 1, 1024, 512
SEQUENCES, SEQUENCE_TOKENS = 24, 512  # that GPTQ takes
ANSWERS, ANSWER_TOKENS, INT4 = 60, 64, "finequant+easyquant"
WAYS: dict[str, tuple[str, ...]] = {
    "int4": (),
    "5_bits": ("--target-bits", "5.0"),
    "5.5_bits": ("--target-bits", "5.5"),
    "6_bits": ("--target-bits", "6.0"),
    "calibrated": ("--self-calibrate",),
    "calibrated_4.5_bits": ("--self-calibrate", "--target-bits", "4.5"),
    "calibrated_5_bits": ("--self-calibrate", "--target-bits", "5.0"),
}
SECTIONS = ("perplexity", "seconds", "likelihood", "speed", "starts")
QUICK_SECTIONS = ("perplexity", "speed")
NEEDED = {"perplexity": (WIKITEXT,), "likelihood": (WIKITEXT, SPEC_BENCH), "speed": (WIKITEXT, SPEC_BENCH)}
PER_WAVE = {"b1": 3, "c8": 8}
REPEATS, MAX_TOKENS, QUICK_MAX_TOKENS = 3, 64, 24
QUICK_CHARACTERS = 300  # of a prompt: the longest take bfloat16 a minute to read


def read_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help=f"folder with {WIKITEXT}; default: $GALLEY_DATA")
    parser.add_argument("--windows", type=int, help=f"of {WINDOW_TOKENS} tokens; default {WINDOWS}")
    parser.add_argument("--choices", help=f"comma-separated; default {','.join(CHOICES)}")
    parser.add_argument("--only", help=f"comma-separated sections; default {','.join(SECTIONS)}")
    parser.add_argument(
        "--servers", help=f"comma-separated, of {','.join(speed.EVERY)}; default {','.join(speed.SERVERS)}"
    )
    parser.add_argument("--repeats", type=int, help=f"of loads and commands; default {REPEATS}")
    parser.add_argument("--quick", action="store_true", help="one short window, fewer choices, short chats")
    parser.add_argument("--record", help="how the file of results is called, after `bench_quantization.`")
    options = parser.parse_args(arguments)
    sections = QUICK_SECTIONS if options.quick else SECTIONS
    choices = QUICK_CHOICES if options.quick else tuple(CHOICES)
    for name, known, default in (
        ("only", SECTIONS, sections),
        ("servers", speed.EVERY, speed.SERVERS),
        ("choices", CHOICES, choices),
    ):
        given = getattr(options, name)
        setattr(options, name, list(default) if given is None else given.split(","))
        if unknown := sorted(set(getattr(options, name)) - set(known)):
            parser.error(f"--{name}: found {', '.join(unknown)}, expected some of {', '.join(known)}")
    if options.record is None and not options.quick and set(options.only) != set(SECTIONS):
        options.record = ".".join(options.only)
    options.record = options.record or ("quick" if options.quick else None)
    options.repeats = options.repeats or REPEATS
    options.windows = QUICK_WINDOWS if options.quick and options.windows is None else options.windows
    options.windows = WINDOWS if options.windows is None else options.windows
    if options.windows < 1:
        parser.error(f"--windows: found {options.windows}, expected at least 1")
    options.data = options.data or (Path(os.environ["GALLEY_DATA"]) if "GALLEY_DATA" in os.environ else None)
    peers = [CHOICES[choice] for choice in options.choices] if "perplexity" in options.only else []
    peers = [choice for choice in peers if isinstance(choice, PeerOptions)]
    needed = [path for section in options.only for path in NEEDED.get(section, ())]
    if any(choice.method == "gptq" for choice in peers):
        needed.append(CALIBRATION)
    for path in needed:
        if options.data is None or not (options.data / path).is_file():
            parser.error(f"--data: expected a folder with {path}, or GALLEY_DATA that names one")
    if peers:
        try:
            llmcompressor_peer.environment().python()
        except PeerError as error:
            parser.error(f"--choices: {error}")
    return options


def token_windows(path: Path, count: int, length: int) -> list[list[int]]:
    from transformers import AutoTokenizer

    text = path.read_text(encoding="utf-8")
    return windows(
        AutoTokenizer.from_pretrained(resolve(MODEL))(text, verbose=False)["input_ids"], count, length
    )


def spec_bench(data: Path) -> list[Prompt]:
    """First turns, of one task after the other in turn."""
    lines = (data / SPEC_BENCH).read_text(encoding="utf-8").splitlines()
    return in_turn(list(load_prompts(lines).values()))


def measure_choices(report: Report, options: argparse.Namespace) -> dict[str, Any]:
    """Perplexity, bits and seconds of each choice."""
    length = QUICK_WINDOW_TOKENS if options.quick else WINDOW_TOKENS
    texts = token_windows(options.data / WIKITEXT, options.windows, length)
    sequences: list[list[int]] = []
    if any(choice.startswith("gptq") for choice in options.choices):
        sequences = token_windows(options.data / CALIBRATION, SEQUENCES, SEQUENCE_TOKENS)
    figures: dict[str, Any] = {}
    rows = {}
    for choice, row in quantization_choices.measure_all(texts, sequences, options.choices):
        rows[choice] = row
        figures |= quantization_choices.figures_of(choice, row)
        console.print(f"{choice}: {row['perplexity']} at {row['bits']} bits, {row.get('seconds', 0)} s")
    report.add("choices", rows)
    return figures


def measure_seconds(report: Report, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of the command `galley quantize`."""
    runs = []
    for run in quantize_seconds.measure(options.repeats):
        runs.append(run)
        console.print(f"galley quantize --method {run['method']}: {run['seconds']} s")
    report.add("seconds", {"runs": runs})
    return quantize_seconds.figures_of(runs)


def measure_likelihood(report: Report, options: argparse.Namespace) -> dict[str, Any]:
    """What weights of 4 bits, and of more by `--target-bits`, think of the answers of full ones."""
    from transformers import AutoTokenizer

    prompts, folder = spec_bench(options.data)[:ANSWERS], resolve(MODEL)
    texts = token_windows(options.data / WIKITEXT, options.windows, WINDOW_TOKENS)
    assert isinstance(folder, Path)
    model, tokenizer = load(folder).model, AutoTokenizer.from_pretrained(folder)
    answers = likelihood.greedy_answers(
        model,
        tokenizer,
        [prompt.text for prompt in prompts],
        ANSWER_TOKENS,
        advance=lambda count: console.print(f"{count} answers"),
    )
    own = likelihood.scores(model, track(answers, "full weights", console=console))
    del model
    rows = [
        {"question": prompt.question, "category": prompt.category, "tokens": len(answer.written)}
        | {"bf16": round(sum(full), 4)}
        for prompt, answer, full in zip(prompts, answers, own, strict=True)
    ]
    figures: dict[str, Any] = {
        "likelihood_bf16": round(likelihood.mean(own), 4),
        "likelihood_tokens": sum(map(len, own)),
    }
    for column, more in WAYS.items():
        with tempfile.TemporaryDirectory(prefix="galley-quantize-") as place:
            out = Path(place) / column
            run = quantize_seconds.quantize(INT4, out, *more)
            loaded = load(out)
            four = likelihood.scores(loaded.model, track(answers, column, console=console))
            wikitext = perplexity(loaded.model, texts)
        for row, low in zip(rows, four, strict=True):
            row[column] = round(sum(low), 4)
        ending = f"_{column}" if more else ""
        figures |= {
            f"likelihood_{column}": round(likelihood.mean(four), 4),
            f"likelihood_loss{ending}": round(likelihood.mean(own) - likelihood.mean(four), 4),
            f"likelihood_bits{ending}": round(loaded.bits_per_weight, 4),
            f"likelihood_ppl{ending}": round(wikitext, 4),
            f"likelihood_seconds{ending}": run["seconds"],
        }
        console.print(f"{column}: {figures[f'likelihood_loss{ending}']} nats less")
    report.add("likelihood", {"method": INT4, "options": WAYS, "max_tokens": ANSWER_TOKENS, "answers": rows})
    return figures


def measure_speed(report: Report, options: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second through servers, and the perplexity of Galley's."""
    prompts = spec_bench(options.data)
    tokens = MAX_TOKENS
    if options.quick:
        prompts = [prompt for prompt in prompts if len(prompt.text) <= QUICK_CHARACTERS]
        tokens = QUICK_MAX_TOKENS
    waves, figures = [], {}
    with turns.all_serving({name: speed.serving(name) for name in options.servers}) as servers:
        if speed.OURS in servers and not options.quick:
            texts = token_windows(options.data / WIKITEXT, 2, WINDOW_TOKENS)
            with turns.awake(servers[speed.OURS]):
                figures["ppl_served"] = round(served_perplexity(servers[speed.OURS], texts), 4)
        for wave in turns.measure(servers, prompts, PER_WAVE, options.repeats, tokens):
            waves.append(wave)
            console.print(f"{wave.server}, {wave.load}: {wave.speed:.1f} tokens/s")
    report.add("speed", {"settings": speed.settings(tokens), "waves": turns.values_of(waves)})
    return figures | speed.figures_of(waves)


def measure_starts(report: Report, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds to readiness, without torch.compile, and with it from an empty cache and from a full one."""
    runs = []
    for run in starts.measure(options.repeats):
        runs.append(run)
        console.print(
            f"{run['start']}: ready after {run['seconds']} s, first answer {run['answer_seconds']} s later"
        )
    report.add("starts", {"settings": starts.SETTINGS, "runs": runs})
    return starts.figures_of(runs)


MEASURES = {
    "perplexity": measure_choices,
    "seconds": measure_seconds,
    "likelihood": measure_likelihood,
    "speed": measure_speed,
    "starts": measure_starts,
}


def main() -> None:
    options = read_options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    name = "bench_quantization" + (f".{options.record}" if options.record else "")
    data = options.data and options.data.name
    report = Report(name, {**vars(options), "data": data})
    figures: dict[str, Any] = {}
    try:
        for section in options.only:
            figures |= MEASURES[section](report, options)
    except (PeerError, quantize_seconds.CommandError) as error:
        sys.exit(f"bench_quantization: {error}")
    report.finish(figures)


if __name__ == "__main__":
    main()
