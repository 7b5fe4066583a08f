"""The command line `python -m galley_plugins.embedding`; results go to stdout, the rest to stderr."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from galley_plugins.embedding.evaluation.data import DataError, data_folder
from galley_plugins.embedding.training.commands import app as train_app
from galley_plugins.models import ModelError, resolve

if TYPE_CHECKING:
    from collections.abc import Callable

app = typer.Typer(
    help="Measure, tune and train embeddings.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(train_app, name="train")
err = Console(stderr=True)

Data = Annotated[
    Path | None,
    typer.Option(help="Folder with sts/, retrieval/ and cls/.", envvar="GALLEY_DATA", show_default=False),
]


@app.callback()
def commands() -> None:
    """Measure, tune and train embeddings."""


@app.command("eval")
def eval_command(
    model: Annotated[str, typer.Option(help="A model that the server serves.")],
    url: Annotated[str, typer.Option(help="The server.")] = "http://127.0.0.1:8000",
    data: Data = None,
    tasks: Annotated[str, typer.Option(help="Comma-separated.")] = "sts,cranfield,banking77",
    limit: Annotated[
        int | None, typer.Option(min=2, help="Pairs, queries or texts of a task at the most.")
    ] = None,
    split: Annotated[str, typer.Option(help="Of STS-B: dev or test.")] = "test",
    out: Annotated[Path | None, typer.Option(help="Write the figures there as JSON.")] = None,
    key: Annotated[
        str | None, typer.Option(help="An API key.", envvar="GALLEY_API_KEY", show_default=False)
    ] = None,
) -> None:
    """Embed public data sets through a running server and print how good the vectors are."""
    from galley_plugins.embedding.evaluation.encoder import EndpointEncoder
    from galley_plugins.embedding.evaluation.run import TASKS, evaluate

    names = tasks.split(",")
    unknown = sorted(set(names) - set(TASKS))
    if unknown:
        raise typer.BadParameter(f"found {', '.join(unknown)}, expected some of {', '.join(TASKS)}")
    if split not in ("dev", "test"):
        raise typer.BadParameter(f"--split: found {split!r}, expected dev or test")
    folder = data_folder(data)
    encoder = EndpointEncoder(url, model, key=key)
    table = Table("task", "figure", "texts", "value", title=model)
    figures = []
    with _bar() as bar:
        for result in evaluate(folder, encoder, _Tasks(bar), tasks=names, limit=limit, split=split):
            table.add_row(result.task, result.metric, str(result.texts), f"{result.value:.2f}")
            figures.append({**vars(result), "value": round(result.value, 3)})
    Console().print(table)
    if out is not None:
        _write(out, {"model": model, "limit": limit, "figures": figures})


@app.command("mteb")
def mteb_command(
    model: Annotated[str, typer.Option(help="A model that the server serves.")],
    url: Annotated[str, typer.Option(help="The server.")] = "http://127.0.0.1:8000",
    data: Data = None,
    tasks: Annotated[str, typer.Option(help="Comma-separated.")] = "sts,cranfield,banking77",
    out: Annotated[Path | None, typer.Option(help="Write MTEB's results there as JSON.")] = None,
    key: Annotated[
        str | None, typer.Option(help="An API key.", envvar="GALLEY_API_KEY", show_default=False)
    ] = None,
) -> None:
    """Let the package mteb evaluate a running server on the same data sets, from local files only."""
    if importlib.util.find_spec("mteb") is None:
        raise ValueError(
            "found no package mteb, expected it beside Galley's: .venv/bin/pip install -c requirements.lock "
            "'mteb>=2.26,<3'"
        )
    folder = data_folder(data)
    os.environ["HF_HUB_OFFLINE"] = "1"  # before mteb is imported
    from galley_plugins.embedding.evaluation.encoder import EndpointEncoder
    from galley_plugins.embedding.evaluation.mteb_encoder import ServerEncoder
    from galley_plugins.embedding.evaluation.mteb_tasks import TASKS, evaluate

    names = tasks.split(",")
    unknown = sorted(set(names) - set(TASKS))
    if unknown:
        raise typer.BadParameter(f"found {', '.join(unknown)}, expected some of {', '.join(TASKS)}")
    table = Table("task", "figure", "value", title=model)
    results = []
    with _bar() as bar, EndpointEncoder(url, model, key=key) as endpoint:
        encoder = ServerEncoder(endpoint, model, begin=_Tasks(bar).begin)
        for name, result in zip(names, evaluate(folder, encoder, names), strict=True):
            (scores,) = result.scores["test"]
            table.add_row(name, TASKS[name].metadata.main_score, f"{100 * scores['main_score']:.2f}")
            results.append(result.model_dump(mode="json"))
    Console().print(table)
    if out is not None:
        _write(out, {"model": model, "results": results})


@app.command("tune-tp")
def tune_command(
    model: Annotated[str, typer.Option(help="builtin:NAME, a folder or a hub id.")],
    dev: Annotated[
        Path, typer.Argument(metavar="DEV.CSV", help="Labelled pairs: sentence,sentence,score, no header.")
    ],
    prompt: Annotated[str, typer.Option(help="A template's name, or a template.")] = "prompt-eol",
    pairs: Annotated[int, typer.Option(min=10, help="Of them, how many, spread over the file.")] = 1500,
    start: Annotated[int, typer.Option(min=1, help="First layer of copying.")] = 1,
    longest: Annotated[int, typer.Option(min=1, help="Most layers of copying to try.")] = 10,
    out: Annotated[Path | None, typer.Option(help="Write every trial there as JSON.")] = None,
) -> None:
    """Pick Token Prepending's layers for a model on labelled pairs and print the configuration."""
    from transformers import AutoModel, AutoTokenizer

    from galley_plugins.embedding.evaluation.data import sts_pairs
    from galley_plugins.embedding.placeholder import placeholder_of
    from galley_plugins.embedding.templates import PLACEHOLDER, Template
    from galley_plugins.embedding.tuning import LayerStates, ranges, trials

    labelled = sts_pairs(dev).spread(pairs)
    template = Template.named(prompt)
    if PLACEHOLDER not in template.pieces:
        raise typer.BadParameter(f"--prompt: found {prompt!r}, expected {PLACEHOLDER} in it")
    place = os.fspath(resolve(model))
    tokenizer = AutoTokenizer.from_pretrained(place)
    decoder = AutoModel.from_pretrained(place, dtype="float32").eval()
    tried = ranges(len(decoder.layers), start, longest)
    found = []
    with _bar() as bar:
        task = bar.add_task("sentences", total=2 * len(labelled) * len(tried))
        states = LayerStates(decoder, tokenizer.eos_token_id or 0)
        for scored in trials(
            states, tokenizer, template, placeholder_of(tokenizer), labelled, tried,
            done=lambda count: bar.advance(task, count),
        ):  # fmt: skip
            found += scored
    plain = max(trial for trial in found if not trial.exit_layer)
    best = max(trial for trial in found if trial.exit_layer)
    table = Table("exit layer", "best output layer", "Spearman", title=f"{len(labelled)} pairs of {dev.name}")
    for layers in tried:
        top = max(trial for trial in found if trial.exit_layer == layers.stop)
        table.add_row(str(layers.stop or "no copying"), str(top.output_layer), f"{top.spearman:.2f}")
    Console().print(table)
    typer.echo(
        f"embedding: {{method: token-prepending, prompt: {json.dumps(prompt)}, "
        f"start_layer: {best.start_layer}, exit_layer: {best.exit_layer}, output_layer: {best.output_layer}}}"
    )
    typer.echo(
        f"{best.spearman:.2f}; without copying {plain.spearman:.2f} at layer {plain.output_layer}", err=True
    )
    if out is not None:
        _write(
            out,
            {"model": model, "prompt": prompt, "pairs": len(labelled), "trials": [vars(t) for t in found]},
        )


def _write(path: Path, value: Any) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def _bar() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=err, transient=True, disable=not err.is_terminal)


class _Tasks:
    """A bar for each task."""

    def __init__(self, bar: Progress) -> None:
        self._bar = bar

    def begin(self, task: str, texts: int) -> Callable[[int], None]:
        row = self._bar.add_task(task, total=texts)
        return lambda count: self._bar.advance(row, count)


def main() -> None:
    """Runs the command line; an error of the data, the model or the server ends it with status 2."""
    from galley_plugins.embedding.evaluation.encoder import ServerError

    try:
        app(prog_name="python -m galley_plugins.embedding")
    except (DataError, ModelError, OSError, ServerError, ValueError) as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
