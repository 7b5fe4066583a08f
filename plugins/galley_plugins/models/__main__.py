"""The command line `python -m galley_plugins.models`; results go to stdout, everything else to stderr."""

from __future__ import annotations

import json
import logging
import sys
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

from galley_plugins.models.builtin import BUILTIN_MODELS, find, folder_of, unpack
from galley_plugins.models.errors import ModelError

if TYPE_CHECKING:
    from pathlib import Path

    from galley_plugins.models.builtin import BuiltinModel

app = typer.Typer(
    help="The models that come with Galley: which there are, and unpacking them into the cache folder.",
    epilog="The cache folder is $GALLEY_CACHE_DIR, or galley in $XDG_CACHE_HOME or ~/.cache.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command("list")
def list_models(
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON array.")] = False,
) -> None:
    """Show each model's name, licence, size, state (ready, absent or damaged) and path; sizes in bytes."""
    rows = [
        {
            "name": model.weights,
            "licence": model.licence,
            "size": model.size,
            "state": str(folder_of(model).state()),
            "path": str(folder_of(model).path),
        }
        for model in BUILTIN_MODELS.values()
    ]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    for row in rows:
        typer.echo("  ".join(map(str, row.values())))


@app.command("unpack")
def unpack_model(
    name: Annotated[str, typer.Argument(help="A name that `list` shows, with or without builtin:.")],
) -> None:
    """Unpack a model, or verify it if it is unpacked, and print its folder."""
    typer.echo(_unpack_with_bar(find(name)))


def _unpack_with_bar(model: BuiltinModel) -> Path:
    console = Console(stderr=True)
    if not console.is_terminal:
        return unpack(model)
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), console=console, transient=True
    )
    task = bar.add_task(model.name, total=None)

    def show(done: int, total: int) -> None:
        bar.start()  # at the first call, so that what is logged before does not run into the bar
        bar.update(task, completed=done, total=total)

    try:
        return unpack(model, show)
    finally:
        bar.stop()


def main() -> None:
    """Runs the command line; a ModelError ends it with its message and status 2."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        app(prog_name="python -m galley_plugins.models")
    except ModelError as error:
        typer.echo(f"error: {error}", err=True)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
