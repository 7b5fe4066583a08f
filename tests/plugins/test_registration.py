from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from importlib import metadata
from typing import TYPE_CHECKING

import pytest

from galley_plugins import progress, registration, status, vllm_compat

if TYPE_CHECKING:
    from pathlib import Path

# Starts a process as vLLM starts those of an engine; both then wait to be killed.
ENGINE = """
import multiprocessing, os, signal, sys
from multiprocessing.connection import Connection
from galley_plugins import registration

def core(pipe):
    registration.register()
    os.write(pipe.fileno(), b"%d\\n" % os.getpid())
    signal.pause()

if __name__ == "__main__":
    pipe = Connection(int(sys.argv[1]), readable=False)
    process = multiprocessing.get_context("spawn").Process(target=core, name="EngineCore", args=(pipe,))
    process.start()
    process.join()
"""


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if vLLM had not called `register` in this process yet."""
    monkeypatch.setattr(registration, "_registered", False)


def entry(group: str, name: str) -> object:
    (found,) = metadata.entry_points(group=group, name=name)
    return found.load()


def test_vllm_finds_the_plugins_by_their_entry_points() -> None:
    assert entry("vllm.general_plugins", "galley") is registration.register
    assert entry("vllm.endpoint_plugins", "galley_status") is status.StatusEndpoint


@pytest.mark.usefixtures("fresh")
def test_a_process_reports_its_name_and_versions_once(status_file: Path) -> None:
    for _ in range(3):
        registration.register()
    (line,) = progress.read()
    assert line["stage"] == "plugins loaded"
    assert line["process"] == "MainProcess"
    assert line["pid"] == os.getpid()
    assert line["galley"] == metadata.version("galley-serve")
    assert line["vllm"].startswith("0.32.")


@pytest.mark.usefixtures("fresh")
def test_another_vllm_is_refused_every_time_and_nothing_is_reported(
    status_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_compat, "vllm_version", lambda: "0.33.1")
    for _ in range(2):
        with pytest.raises(
            vllm_compat.IncompatibleVllmError, match=r"found vLLM 0\.33\.1, expected 0\.32\.\*"
        ):
            registration.register()
    assert progress.read() == []


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's signal is Linux's")
def test_a_process_of_the_engine_ends_with_the_one_that_started_it(tmp_path: Path, status_file: Path) -> None:
    script = tmp_path / "engine.py"
    script.write_text(ENGINE)
    outer, inner = os.pipe()
    server = subprocess.Popen([sys.executable, str(script), str(inner)], pass_fds=[inner])
    os.close(inner)
    core = 0
    try:
        assert select.select([outer], [], [], 240)[0]  # two imports of vLLM
        core = int(os.read(outer, 100))
        (line,) = progress.read()
        assert (line["process"], line["pid"]) == ("EngineCore", core)
        server.kill()
        assert select.select([outer], [], [], 240)[
            0
        ]  # two imports of vLLM, "the process outlived its parent"
        assert os.read(outer, 100) == b""
        core = 0
    finally:
        server.kill()
        server.wait(30)
        os.close(outer)
        if core:
            os.kill(core, signal.SIGKILL)
