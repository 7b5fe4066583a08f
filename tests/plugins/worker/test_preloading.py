"""Real processes from a real fork server, which imports vLLM once for all of them."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from multiprocessing import forkserver
from typing import TYPE_CHECKING

import pytest

from galley_plugins.worker import preloading

if TYPE_CHECKING:
    from pathlib import Path

SECONDS = 240

# Forks a process, which forks another; both say what they are and wait, as their starter does, to be killed.
STARTER = """
import json, os, signal, sys
from multiprocessing.connection import Connection
from galley_plugins.worker import preloading

def say(pipe, name):
    mine = {
        "name": name, "pid": os.getpid(), "parent": os.getppid(), "forked": preloading.forked(),
        "marks": os.environ["MARK"], "cores": sorted(os.sched_getaffinity(0)),
        "imported": "vllm.v1.worker.cpu_worker" in sys.modules,
    }
    os.write(pipe.fileno(), json.dumps(mine).encode() + b"\\n")

def worker(pipe):
    say(pipe, "worker")
    signal.pause()

def core(pipe):
    say(pipe, "core")
    os.environ["MARK"] = "the core's"
    preloading.PreloadedContext().Process(target=worker, args=(pipe,)).start()
    signal.pause()

if __name__ == "__main__":
    preloading.start()
    os.environ["MARK"] = "the starter's"
    pipe = Connection(int(sys.argv[1]), readable=False)
    preloading.PreloadedContext().Process(target=core, args=(pipe,)).start()
    signal.pause()
"""


@pytest.mark.engine
@pytest.mark.timeout(2 * SECONDS)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's signal is Linux's")
def test_processes_come_from_one_import_with_their_starters_environment_and_end_with_it(
    tmp_path: Path,
) -> None:
    script = tmp_path / "starter.py"
    script.write_text(STARTER)
    outer, inner = os.pipe()
    starter = subprocess.Popen([sys.executable, str(script), str(inner)], pass_fds=[inner])
    os.close(inner)
    try:
        lines = b""
        while lines.count(b"\n") < 2:
            assert select.select([outer], [], [], SECONDS)[0]
            part = os.read(outer, 4096)
            assert part, "a process ended without a word"
            lines += part
        core, worker = map(json.loads, lines.splitlines())
        assert (core["name"], worker["name"]) == ("core", "worker")
        assert core["marks"] == "the starter's"
        assert worker["marks"] == "the core's"
        assert core["parent"] == worker["parent"] != starter.pid
        for process in (core, worker):
            assert process["forked"]
            assert process["imported"]
            assert process["cores"] == sorted(os.sched_getaffinity(0))
        starter.kill()
        assert select.select([outer], [], [], SECONDS)[0], "a process outlived the starter"
        assert os.read(outer, 100) == b""
    finally:
        starter.kill()
        starter.wait(30)
        os.close(outer)


def test_without_a_fork_server_of_its_own_vllm_starts_its_processes_itself() -> None:
    from vllm.v1.engine import utils as engine

    before = engine.get_mp_context
    assert not preloading.forked()
    preloading.adopt()
    assert engine.get_mp_context is before
    forkserver.ensure_running()  # as any user of the standard library's fork servers would
    preloading.adopt()
    assert engine.get_mp_context is before
