"""What `galley serve` shows while workers start, and a command that works once they are ready."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from galley.workers import State

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from galley.config import Config, ModelConfig
    from galley.supervisor import Stage
    from galley.workers import Worker, WorkerPool

_HIDDEN_STAGES = {"plugins loaded"}


@dataclass
class _Progress:
    stage: str
    percent: int | None = None
    since: float = field(default_factory=time.monotonic)


class StartupView:
    """Follows every worker until all are ready; a moving picture on a terminal, plain lines elsewhere."""

    def __init__(self, console: Console, config: Config, pool: WorkerPool) -> None:
        self._console = console
        self._config = config
        self._pool = pool
        self._progress: dict[str, _Progress] = {}
        self._live: Live | None = None
        self._spinner = Spinner("dots")

    def on_stage(self, worker: Worker, stage: Stage) -> None:
        if stage.name in _HIDDEN_STAGES:
            return
        percent = stage.detail.get("percent")
        known = self._progress.get(worker.id)
        if known is not None and known.stage == stage.name:
            known.percent = percent
            return
        self._progress[worker.id] = _Progress(stage.name, percent)
        if self._live is None:
            self._console.print(f"{worker.id}: {stage.name}", highlight=False)

    async def follow(self, base_url: str) -> None:
        """Show progress until every model has a ready worker, then say how to use the server."""
        started = time.monotonic()
        if self._console.is_terminal:
            with Live(get_renderable=self._picture, console=self._console, transient=True) as self._live:
                await self._all_ready()
            self._live = None
        else:
            await self._all_ready()
        self._console.print(self._welcome(base_url, time.monotonic() - started), soft_wrap=True)

    async def _all_ready(self) -> None:
        while not self._pool.is_ready():
            for worker in self._pool.workers:
                if worker.state is not State.READY:
                    await worker.wait_for(State.READY)

    def _picture(self) -> RenderableType:
        table = Table.grid(padding=(0, 2))
        for worker in self._pool.workers:
            if worker.state is State.READY:
                table.add_row(Text("✓", style="green"), worker.id, "ready")
                continue
            progress = self._progress.get(worker.id) or _Progress("starting")
            percent = "" if progress.percent is None else f"{progress.percent} %"
            seconds = f"{time.monotonic() - progress.since:.0f} s"
            table.add_row(self._spinner, worker.id, progress.stage, percent, Text(seconds, style="dim"))
        return table

    def _welcome(self, base_url: str, seconds: float) -> Text:
        names = ", ".join(model.name for model in self._config.models)
        text = Text(f"\nGalley serves {names} at {base_url} (ready in {seconds:.0f} s). Try:\n\n")
        text.append(example_request(self._config.models[0], base_url), style="bold")
        text.append("\n\nCtrl-C stops it after running requests have finished.\n")
        return text


def example_request(model: ModelConfig, base_url: str) -> str:
    """A shell command that asks the model something it can do."""
    question = "What is the capital of France?"
    body: dict[str, Any] = {"model": model.name, "input": question}
    path = "embeddings"
    if "generate" in model.tasks:
        body = {"model": model.name, "temperature": 0, "messages": [{"role": "user", "content": question}]}
        path = "chat/completions"
    return f"curl {base_url}/v1/{path} -H 'Content-Type: application/json' -d '{json.dumps(body)}'"
