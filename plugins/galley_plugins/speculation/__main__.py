"""The command line `python -m galley_plugins.speculation`; results go to stdout, the rest to stderr."""

from __future__ import annotations

import os
import sys
from pathlib import Path  # noqa: TC003 -- typer reads the annotations
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from galley_plugins.models import ModelError, resolve
from galley_plugins.speculation.corpus import MOST_SUCCESSORS

app = typer.Typer(
    help="Tables of draft-verify speculation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def commands() -> None:
    """Tables of draft-verify speculation."""


@app.command("build-table")
def build_table_command(
    corpus: Annotated[
        Path,
        typer.Argument(
            metavar="CORPUS", help="A text file, a .jsonl file, or a folder of .txt and .jsonl files."
        ),
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="Where the table goes: the `corpus` of the configuration.")
    ],
    tokenizer: Annotated[
        str, typer.Option(help="The model: builtin:NAME, a folder or a hub id.", show_default=False)
    ],
    limit_successors: Annotated[
        int, typer.Option(min=1, max=MOST_SUCCESSORS, help="Successors kept of each bi-gram.")
    ] = 12,
    table_bytes: Annotated[
        int, typer.Option(min=1, help="Bound of the table; the rarest bi-grams are left out for it.")
    ] = 1 << 29,
    text_field: Annotated[str, typer.Option(help="Field of a JSON line that holds the text.")] = "text",
) -> None:
    """Count the tri-grams of CORPUS into the table OUT, for `speculation: {method: trigram}`."""
    from galley_plugins.speculation.build_table import build_table, files_of

    if not out.absolute().parent.is_dir() or out.is_dir():
        raise typer.BadParameter(
            f"{out.absolute()}: expected a file in a folder that exists", param_hint="OUT"
        )
    files = files_of(corpus)
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    model = _tokenizer(tokenizer)
    task = bar.add_task("counting", total=sum(file.stat().st_size for file in files))
    with bar:
        built = build_table(
            corpus,
            out.absolute(),
            model,
            successors=limit_successors,
            table_bytes=table_bytes,
            text_field=text_field,
            progress=lambda size: bar.advance(task, size),
        )
    if built.dropped:
        typer.echo(f"{built.dropped} bi-grams did not fit into {table_bytes} bytes", err=True)
    typer.echo(f"{out}: {built.trigrams} tri-grams of {built.bigrams} bi-grams, {built.size} bytes")


def _tokenizer(weights: str) -> object:
    from transformers import AutoTokenizer

    place = resolve(weights)
    try:
        return AutoTokenizer.from_pretrained(os.fspath(place))
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"no tokenizer in {place}: {error}", param_hint="--tokenizer") from None


def main() -> None:
    """Runs the command line; an error of the corpus, the model or a file ends it with status 2."""
    from galley_plugins.speculation.build_table import CorpusError
    from galley_plugins.speculation.store import TableFileError

    try:
        app(prog_name="python -m galley_plugins.speculation")
    except (CorpusError, ModelError, OSError, TableFileError) as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
