"""The command line `python -m galley_plugins.memory`; results go to stdout, the rest to stderr."""

from __future__ import annotations

import functools
import inspect
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from galley_plugins.models import ModelError, resolve

if TYPE_CHECKING:
    from collections.abc import Callable

    from galley_plugins.memory.building.build import BuildOptions, Built
    from galley_plugins.memory.building.mixture import Mixture

app = typer.Typer(
    help="MLP memories: from a corpus to a memory that is served beside a model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

BUILTIN = "builtin:smollm2-135m-instruct"
_TOLD_ROWS = 5  # wrong rows that are shown one by one


@app.callback()
def commands() -> None:
    """MLP memories: from a corpus to a memory that is served beside a model."""


def build_command(
    corpus: Annotated[
        Path,
        typer.Argument(metavar="CORPUS", help="A .txt, .md, .jsonl or .parquet file, or a folder of them."),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder of the build.")],
    model: Annotated[str, typer.Option(help="builtin:NAME, a folder or a hub id.")] = BUILTIN,
    layer: Annotated[int, typer.Option(help="Whose MLP's input is read; -1 is the last.")] = -1,
    context: Annotated[int, typer.Option(help="Tokens that the model reads at once.")] = 1024,
    held_out: Annotated[
        float, typer.Option(help="Share of the corpus, at its end, that the memory is weighed by.")
    ] = 0.1,
    held_out_text: Annotated[
        Path | None, typer.Option(help="Another text in place of that share.", show_default=False)
    ] = None,
    text_field: Annotated[str, typer.Option(help="Field or column that holds the text.")] = "text",
    most_bad: Annotated[int, typer.Option(min=0, help="Rows that may be wrong.")] = 100,
    index: Annotated[str, typer.Option(help="auto, flat or ivf-pq.")] = "auto",
    neighbours: Annotated[int, typer.Option(help="Of a place, for the teacher.")] = 1024,
    temperature: Annotated[
        float | None, typer.Option(help="Of the teacher; the best of several by default.", show_default=False)
    ] = None,
    blocks: Annotated[int, typer.Option(min=0, help="Of the network.")] = 1,
    hidden: Annotated[
        int | None, typer.Option(help="Inside a block; the model's own by default.", show_default=False)
    ] = None,
    head: Annotated[str, typer.Option(help="Output layer: its own, or tied to the model's.")] = "own",
    alpha: Annotated[float, typer.Option(help="Share of the teacher; with 0 none is made.")] = 0.2,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 5e-4,
    batch: Annotated[int, typer.Option(min=1, help="Places of a step.")] = 1024,
    epochs: Annotated[int, typer.Option(min=1, help="Readings of the corpus.")] = 2,
    scores: Annotated[int, typer.Option(min=1, help="How often an epoch is scored.")] = 4,
    patience: Annotated[int, typer.Option(min=1, help="Scores that may be no better.")] = 3,
    seed: Annotated[int, typer.Option(help="Of the network and of the order of places.")] = 0,
    weight: Annotated[
        float | None,
        typer.Option(help="Share of the mix; the best on the held-out text by default.", show_default=False),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    *,
    until: str,
) -> None:
    """Run a build up to the stage `until`."""
    from galley_plugins.memory.building.build import Build, BuildOptions
    from galley_plugins.memory.building.corpus import CorpusError
    from galley_plugins.memory.building.stages import StageError
    from galley_plugins.memory.building.training import Schedule, TrainingError
    from galley_plugins.memory.checkpoint import MemoryFileError
    from galley_plugins.quantization.source import CheckpointError
    from galley_plugins.training_checkpoint import CheckpointError as TrainingFileError

    console = Console(stderr=True)
    started = time.monotonic()
    try:
        options = BuildOptions(
            corpus,
            out.absolute(),
            _folder_of(model),
            layer,
            context,
            held_out_text if held_out_text is not None else held_out,
            text_field,
            most_bad,
            index,
            neighbours,
            temperature,
            blocks=blocks,
            hidden=hidden,
            head=head,
            weight=weight,
            device=device,
            schedule=Schedule(alpha, lr, batch, epochs, scores, patience, seed),
        )
        with Reporter(console) as reporter:
            built = Build(options, reporter).run(until)
    except (
        ModelError,
        CorpusError,
        StageError,
        TrainingError,
        TrainingFileError,
        MemoryFileError,
        CheckpointError,
        ValueError,
        OSError,
    ) as error:
        _fail(console, error)
    except KeyboardInterrupt:
        console.print(
            f"stopped; the same command goes on with {out}", highlight=False, soft_wrap=True, markup=False
        )
        raise typer.Exit(130) from None
    _show(console, options, built, time.monotonic() - started, as_json=as_json)


def _stage(name: str, until: str, text: str) -> None:
    """Register a command that takes what `build` takes."""

    @functools.wraps(build_command)
    def command(**named: Any) -> None:
        build_command(**named, until=until)

    signature = inspect.signature(build_command, eval_str=True)
    kept = [parameter for name, parameter in signature.parameters.items() if name != "until"]
    command.__signature__ = signature.replace(parameters=kept)  # type: ignore[attr-defined]
    command.__doc__ = text
    app.command(name)(command)


_stage(
    "build",
    "weigh",
    "Build a memory of CORPUS in the folder OUT, which `memory: {path: OUT}` serves. A run that was stopped "
    "goes on where it was; what fits is not made again.",
)
_stage("datastore", "datastore", "Only the states of the corpus and the tokens that follow them.")
_stage("index", "index", "So far as the index of the nearest states.")
_stage("teacher", "teacher", "So far as kNN-LM's distributions, which the memory learns from.")
_stage("train", "train", "So far as the trained network.")
_stage("weigh", "weigh", "All of it: also the memory's share of the mix, chosen on the held-out text.")


@app.command("eval")
def eval_command(
    path: Annotated[Path, typer.Argument(metavar="OUT", help="The folder of a build, or of a memory.")],
    text: Annotated[Path, typer.Argument(metavar="TEXT", help="A file or folder, as a corpus is.")],
    model: Annotated[str, typer.Option(help="builtin:NAME, a folder or a hub id.")] = BUILTIN,
    context: Annotated[int, typer.Option(help="Tokens that the model reads at once.")] = 1024,
    windows: Annotated[
        int | None, typer.Option(min=1, help="Only so many windows of that length.", show_default=False)
    ] = None,
    knn: Annotated[bool, typer.Option(help="kNN-LM over the build's datastore too.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Perplexity of TEXT under the model alone, and mixed with the memory."""
    from rich.table import Table

    from galley_plugins.memory.building.corpus import CorpusError
    from galley_plugins.memory.building.evaluation import evaluate
    from galley_plugins.memory.building.stages import StageError
    from galley_plugins.memory.checkpoint import MemoryFileError
    from galley_plugins.quantization.source import CheckpointError

    console = Console(stderr=True)
    try:
        with Reporter(console) as reporter:
            found = evaluate(
                path.absolute(),
                text,
                _folder_of(model),
                context=context,
                windows=windows,
                knn=knn,
                device=device,
                advance=lambda total: reporter.stage("eval", total),
            )
    except (
        ModelError,
        CorpusError,
        StageError,
        MemoryFileError,
        CheckpointError,
        ValueError,
        OSError,
    ) as error:
        _fail(console, error)
    if as_json:
        print(json.dumps(found))  # noqa: T201
        return
    table = Table("", "weight", "perplexity", "nats a token", "gain")
    for row in found["rows"]:
        weight = "" if row["weight"] is None else f"{row['weight']:.2f}"
        table.add_row(
            row["name"], weight, f"{row['perplexity']:.2f}", f"{row['nats']:.4f}", f"{row['gain']:.4f}"
        )
    Console().print(table)


class Reporter:
    """Progress bars on a terminal, a line for each stage elsewhere; a context manager."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bad = 0
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task: Any = None

    def __enter__(self) -> Reporter:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
        if self._bad > _TOLD_ROWS:
            self._say(f"{self._bad} rows of the corpus were left out")

    def stage(self, name: str, total: int | None) -> Callable[[int], None]:
        if not self._console.is_terminal:
            self._say(f"{name}: {total} to do")
        task = self._task = self._bar.add_task(name, total=total, note="")
        return lambda count: self._bar.advance(task, count)

    def reused(self, name: str) -> None:
        self._say(f"{name}: there already")

    def bad_row(self, what: str) -> None:
        self._bad += 1
        if self._bad <= _TOLD_ROWS:
            self._say(f"left out: {what}")

    def scored(self, step: int, mix: Mixture) -> None:
        note = f"held-out text {mix.plain:.3f} -> {mix.nats:.3f} nats at weight {mix.weight:.2f}"
        if self._console.is_terminal:
            self._bar.update(self._task, note=note)
        else:
            self._say(f"step {step}: {note}")

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True, markup=False)


def _show(console: Console, options: BuildOptions, built: Built, seconds: float, *, as_json: bool) -> None:
    memory = built.memory
    if as_json:
        from dataclasses import asdict

        values = {} if memory is None else {"memory": asdict(memory)}
        print(json.dumps({"out": str(options.out), "seconds": round(seconds, 1), **values}))  # noqa: T201
    if memory is None:
        console.print(
            f"done in {seconds:.0f} s: {options.out}", highlight=False, soft_wrap=True, markup=False
        )
        return
    mix = memory.training["mix"]
    console.print(
        f"{memory.corpus['entries']} places of {memory.corpus['documents']} documents, "
        f"{memory.corpus['bad_rows']} rows left out; held-out text {mix['plain']:.3f} -> {mix['nats']:.3f} "
        f"nats a token at weight {memory.weight:.2f}; in {seconds:.0f} s: {options.out}",
        highlight=False,
        soft_wrap=True,
        markup=False,
    )


def _folder_of(model: str) -> Path:
    found = resolve(model)
    if isinstance(found, Path):
        return found
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(found, allow_patterns=["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"])
    )


def _fail(console: Console, error: BaseException) -> Any:
    console.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
    raise typer.Exit(2) from None


if __name__ == "__main__":
    app()
