"""The command line `python -m galley_plugins.quantization`; reports go to stdout, the rest to stderr."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from galley_plugins.models import ModelError, resolve
from galley_plugins.quantization.options import METHODS

app = typer.Typer(
    help="Weight-only quantization.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def commands() -> None:
    """Weight-only quantization."""


@app.command("quantize")
def quantize_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="builtin:NAME, a folder or a hub id.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The new folder.")],
    method: Annotated[str, typer.Option(help=", ".join(METHODS))] = "finequant+easyquant",
    bits: Annotated[int, typer.Option(help="Of a code: 4 or 8.")] = 4,
    group_size: Annotated[
        int | None, typer.Option(help="Inputs that share a scale, where the method does not choose.")
    ] = None,
    sigma: Annotated[float | None, typer.Option(help="Where outliers begin, in standard deviations.")] = None,
    shrink: Annotated[
        float | None, typer.Option(help="What a smaller group must bring; more gives larger groups.")
    ] = None,
    target_bits: Annotated[
        float | None,
        typer.Option(help="Bits per weight to spread over the matrices by what they bring; slower."),
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Modules to leave as they are; repeatable. *.down_proj"),
    ] = None,
    rule: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN=JSON", help='Other options for some: *.layers.0.*={"bits": 8}'),
    ] = None,
    output_layer: Annotated[bool, typer.Option(help="Quantize the output layer too.")] = False,
    self_calibrate: Annotated[
        bool,
        typer.Option(
            "--self-calibrate", help="Weigh errors by text that MODEL writes itself; holds it in float32."
        ),
    ] = False,
    report: Annotated[bool, typer.Option(help="Print each matrix: error, bits, outliers.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Quantize MODEL's matrices without data, into the folder OUT, which `galley serve` takes as weights.

    A run that was stopped goes on where it was. Leftovers are in OUT.partial and OUT.calibration.
    """
    from galley_plugins.quantization.checkpoint import matrices_together, quantize_checkpoint, values_of
    from galley_plugins.quantization.plan import SUFFIX, Plan
    from galley_plugins.quantization.source import CheckpointError, Source

    console = Console(stderr=True)
    given = {"group_size": group_size, "sigma": sigma, "shrink": shrink}
    values: dict[str, Any] = {"method": method, "bits": bits}
    values |= {name: value for name, value in given.items() if value is not None}
    started = time.monotonic()
    try:
        rules = [(pattern, None) for pattern in keep or []] + [_rule(text) for text in rule or []]
        plan = Plan.from_values(values, rules, output_layer=output_layer)
        source = _folder_of(model)
        with Source(source) as weights, _progress(console) as progress:
            groups = matrices_together(weights, plan)
            sizes = {name: _size(weights.shape(name)) for name in weights.names}
            known, kept = None, out.absolute().with_name(out.name + ".calibration")
            if self_calibrate:
                modules = [name.removesuffix(SUFFIX) for names in groups for name in names]
                known = _sensitivities(source, modules, plan, out, kept, progress, target_bits is not None)
            if target_bits is not None:
                from galley_plugins.quantization.budget import plan_for

                total = sum(sizes[name] for names in groups for name in names)
                task = progress.add_task("weighing", total=total)
                plan = plan_for(
                    groups,
                    weights.tensor,
                    plan,
                    target_bits,
                    sensitivities=known,
                    advance=lambda name, size: progress.update(
                        task, advance=size, description=f"weighing {name}"
                    ),
                )
            bar = progress.add_task("quantizing", total=sum(sizes.values()))
            rows = quantize_checkpoint(
                source,
                out.absolute(),
                plan,
                sensitivities=known,
                advance=lambda name, size: progress.update(
                    bar, advance=size, description=f"quantizing {name}"
                ),
            )
            kept.unlink(missing_ok=True)
    except (ModelError, CheckpointError, ValueError, OSError) as error:
        _fail(console, str(error))
    weights_total = sum(row.weights for row in rows)
    average = sum(row.bits_per_weight * row.weights for row in rows) / max(weights_total, 1)
    if as_json:
        print(json.dumps({"bits_per_weight": average, "matrices": [values_of(row) for row in rows]}))  # noqa: T201
    elif report:
        printed = Console()
        Console(width=None if printed.is_terminal else 120).print(_table(rows))
    console.print(
        f"{len(rows)} matrices of {weights_total / 1e6:.1f} million weights, {average:.2f} bits each, "
        f"in {time.monotonic() - started:.1f} s: {out}",
        highlight=False,
        soft_wrap=True,
    )


@app.command("perplexity")
def perplexity_command(
    text: Annotated[Path, typer.Argument(metavar="TEXT", help="A text file.")],
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="builtin:NAME, folders (quantized ones too) or hub ids."),
    ],
    context: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 1024,
    windows: Annotated[
        int | None, typer.Option(min=1, help="How many; default: all that the text fills.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare checkpoints by the perplexity of TEXT: windows of tokens one behind the other.

    Bits count codes, scales and weights kept apart of the matrices that `galley quantize` takes by default;
    the ratio is to the first MODEL's perplexity. All run in transformers, in float32, with weights as they
    are stored; what a server rounds besides (activations, the output layer) is not in it.
    """
    from galley_plugins.quantization.comparison import compare
    from galley_plugins.quantization.source import CheckpointError

    console = Console(stderr=True)
    table = Table(title=f"{text.name}, windows of {context} tokens")
    table.add_column("model", overflow="fold")
    for heading in ("bits a weight", "perplexity", "ratio"):
        table.add_column(heading, justify="right")
    rows = []
    try:
        content = text.read_text(encoding="utf-8")
        with _progress(console) as progress:
            folders = [(model, _folder_of(model)) for model in models]
            bar = progress.add_task("reading", total=None)

            def started(name: str, count: int) -> None:
                progress.reset(bar, total=count, description=name)

            for row in compare(
                content,
                folders,
                context=context,
                count=windows,
                started=started,
                advance=lambda: progress.advance(bar),
            ):
                rows.append(row)
                table.add_row(
                    row.name, f"{row.bits_per_weight:.2f}", f"{row.perplexity:.3f}", f"{row.ratio:.4f}"
                )
    except UnicodeDecodeError as error:
        _fail(console, f"{text}: found {error.reason} at byte {error.start}, expected UTF-8 text")
    except (ModelError, CheckpointError, ValueError, OSError) as error:
        _fail(console, str(error))
    if as_json:
        print(json.dumps({"text": text.name, "context": context, "models": [asdict(row) for row in rows]}))  # noqa: T201
    else:
        Console().print(table)


def _sensitivities(
    source: Path, modules: list[str], plan: Any, out: Path, kept: Path, progress: Progress, by_budget: bool
) -> Any:
    """Of the modules; refused, before long work begins, where nothing would be done with them."""
    from galley_plugins.quantization.sensitivity import sensitivities

    if out.exists():
        raise FileExistsError(f"{out} exists, expected a new folder")
    used = [options for module in modules if (options := plan.options_of(module)) is not None]
    if not by_budget and not any(options.keeps_outliers for options in used):
        raise ValueError(
            f"--self-calibrate: found {', '.join(sorted({options.method for options in used}))}, expected "
            "easyquant, finequant+easyquant or --target-bits, which choose by what errors cost"
        )
    bars: list[Any] = []
    return sensitivities(
        source,
        modules,
        kept,
        started=lambda stage, steps: bars.append(progress.add_task(stage, total=steps)),
        advance=lambda: progress.advance(bars[-1]),
    )


def _fail(console: Console, message: str) -> NoReturn:
    console.print(f"[bold red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)
    raise typer.Exit(2) from None


def _rule(text: str) -> tuple[str, dict[str, Any]]:
    pattern, found, options = text.partition("=")
    try:
        values = json.loads(options)
    except ValueError:
        values = None
    if not found or not isinstance(values, dict):
        raise ValueError(f'--rule: found {text!r}, expected PATTERN=JSON, as in *.layers.0.*={{"bits": 8}}')
    return pattern, values


def _folder_of(model: str) -> Path:
    found = resolve(model)
    if isinstance(found, Path):
        return found
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(found, allow_patterns=["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"])
    )


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for each in shape:
        size *= each
    return size


def _table(rows: list[Any]) -> Table:
    table = Table()
    for heading in ("matrix", "shape", "bits", "group", "bits a weight", "outliers %", "error %"):
        left = heading == "matrix"
        table.add_column(
            heading, justify="left" if left else "right", overflow="fold" if left else "ellipsis"
        )
    for row in sorted(
        rows, key=lambda row: [int(part) if part.isdigit() else -1 for part in row.name.split(".")]
    ):
        table.add_row(
            row.name,
            f"{row.shape[0]} x {row.shape[1]}",
            str(row.bits),
            str(row.group_size),
            f"{row.bits_per_weight:.2f}",
            f"{100 * row.outlier_share:.2f}",
            f"{100 * row.error:.2f}",
        )
    return table


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


if __name__ == "__main__":
    app()
