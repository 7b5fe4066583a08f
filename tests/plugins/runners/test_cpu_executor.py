"""A worker in the engine core's process: its threads are bound to cores, whatever has used their runtime before."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from galley_plugins.worker.environment import preloaded_libraries, runs_intel_openmp
from tests.support.cores import needs_binding

pytestmark = pytest.mark.skipif(
    not runs_intel_openmp({}), reason="no Intel OpenMP runtime (package intel-openmp)"
)

PROGRAM = """
import json, os, sys, torch
from galley_plugins.runners.cpu_executor import bind_threads

cores = json.loads(sys.argv[1])
torch.set_num_threads(2)
torch.ones(10**6).sum()  # the runtime is in use, and has read its variables
bind_threads(cores)
torch.ones(10**7).sum()
threads = [os.sched_getaffinity(int(thread)) for thread in os.listdir("/proc/self/task")]
print(json.dumps([torch.get_num_threads(), sorted(os.sched_getaffinity(0)), sorted(map(sorted, threads))]))
"""


def bound(cores: list[int]) -> tuple[int, list[int], list[list[int]], str]:
    """Threads of a region, the first thread's cores, every thread's cores, and what was logged."""
    environment = {**os.environ, "LD_PRELOAD": ":".join(map(str, preloaded_libraries()))}
    command = [sys.executable, "-c", PROGRAM, json.dumps(cores)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    threads, own, every = json.loads(ran.stdout.splitlines()[-1])
    return threads, own, every, ran.stderr


@needs_binding
def test_every_thread_has_a_core_of_its_own() -> None:
    cores = sorted(os.sched_getaffinity(0))[:2]
    threads, own, every, _ = bound(cores)
    assert threads == len(cores)
    assert own == [cores[0]]
    assert [each for each in every if each == [cores[-1]]]


def test_threads_that_cannot_be_bound_stay_where_they_were_and_it_is_said() -> None:
    threads, own, _, said = bound([100_000])
    assert threads == 1
    assert own == sorted(os.sched_getaffinity(0))
    assert "threads could not be bound to cores [100000]" in said
