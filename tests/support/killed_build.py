"""The builder's command line in a process that ends by SIGKILL at a given place of a given stage.

Processes are forked from a server that has imported torch: a build of a small model takes a second then.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["tests.support.killed_build"])

import faiss  # noqa: E402
import torch  # noqa: E402
from transformers import (  # noqa: E402, F401 -- loaded once, by the server
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from galley_plugins.memory import __main__ as commands  # noqa: E402
from galley_plugins.memory.building import build, datastore, stages, teacher  # noqa: E402


def run_command(arguments: list[str], kill: tuple[str, str, int] | None = None) -> int:
    """Exit code of the command; -9 where it was killed.

    Args:
        kill: name of a stage's folder, an event there (`note` of how far it is, `rename` of a file, `checkpoint`
            of the training), and the number of such events that are left to happen.
    """
    process = _SERVER.Process(target=_run, args=(arguments, kill))
    process.start()
    process.join(120)
    if process.exitcode is None:
        process.kill()
    assert process.exitcode is not None
    return process.exitcode


def _run(arguments: list[str], kill: tuple[str, str, int] | None) -> None:
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    # Small enough for several notes in a stage
    datastore.NOTED, teacher.QUERIES = 100, 100
    if kill is not None:
        _kill_at(*kill)
    commands.app(arguments)


def _kill_at(stage: str, event: str, left: int) -> None:
    def count(folder: Path) -> None:
        nonlocal left
        if folder.name == stage:
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    note, rename, save = stages.Stage.note, Path.rename, build.Checkpoint.save

    def counted_note(self: stages.Stage, *given: Any) -> None:
        note(self, *given)
        count(self.folder)

    def counted_rename(self: Path, target: Path) -> Path:
        count(self.parent)
        return rename(self, target)

    def counted_save(self: Any, *given: Any) -> None:
        save(self, *given)
        count(self._folder.parent)

    if event == "note":
        stages.Stage.note = counted_note  # type: ignore[method-assign]
    elif event == "rename":
        Path.rename = counted_rename  # type: ignore[method-assign]
    else:
        build.Checkpoint.save = counted_save  # type: ignore[method-assign]
