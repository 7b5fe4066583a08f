from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from galley_plugins.worker import environment
from galley_plugins.worker.environment import (
    NoCompilerError,
    preloaded_libraries,
    runs_intel_openmp,
    worker_environment,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

CACHE = """217 libs found in cache `/etc/ld.so.cache'
\tlibtcmalloc_minimal_debug.so.4 (libc6,x86-64) => /lib/x86_64-linux-gnu/libtcmalloc_minimal_debug.so.4
\tlibtcmalloc_minimal.so.4.5.9 (libc6,x86-64) => /lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4.5.9
\tlibtcmalloc_minimal.so.4 (libc6) => /lib/i386-linux-gnu/libtcmalloc_minimal.so.4
\tlibtcmalloc_minimal.so.4 (libc6,x86-64) => /lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4
\tlibtcmalloc.so.4 (libc6,x86-64) => /lib/x86_64-linux-gnu/libtcmalloc.so.4
\tlibc.so.6 (libc6,x86-64) => /lib/x86_64-linux-gnu/libc.so.6
"""
MINIMAL = "/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4"
FULL = "/lib/x86_64-linux-gnu/libtcmalloc.so.4"


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes the system's libraries the listed ones, with or without Intel's OpenMP in the environment."""

    def become(cache: str, *, openmp: bool) -> str:
        """Gives the path of the OpenMP library."""
        library = tmp_path / "lib" / "libiomp5.so"
        library.parent.mkdir(exist_ok=True)
        if openmp:
            library.touch()
        monkeypatch.setattr(sys, "prefix", str(tmp_path))
        monkeypatch.setattr(os, "access", lambda path, mode: path == "/sbin/ldconfig")
        listing = SimpleNamespace(stdout=cache)
        monkeypatch.setattr(environment.subprocess, "run", lambda *_, **__: listing)
        return str(library)

    return become


def test_what_the_user_set_stays() -> None:
    own = {
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "5",
        "VLLM_NO_USAGE_STATS": "0",
        "VLLM_WORKER_MULTIPROC_METHOD": "fork",
        "TOKENIZERS_PARALLELISM": "true",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "1",
        "TORCH_COMPILE_DISABLE": "0",
        "HOME": "/home/cook",
    }
    result = worker_environment("cpu", own)
    assert {name: result[name] for name in own} == own


def test_the_environment_it_came_from_is_not_changed() -> None:
    own = {"VLLM_PLUGINS": "mine", "LD_PRELOAD": "/lib/mine.so"}
    worker_environment("cpu", own)
    assert own == {"VLLM_PLUGINS": "mine", "LD_PRELOAD": "/lib/mine.so"}


@pytest.mark.parametrize(
    ("own", "plugins"),
    [
        (None, "galley,galley_status"),
        ("", "galley,galley_status"),
        ("mine", "galley,galley_status,mine"),
        ("mine,galley", "galley,galley_status,mine"),
        ("galley_status,galley", "galley,galley_status"),
    ],
)
def test_galleys_plugins_are_loaded_beside_the_users(own: str | None, plugins: str) -> None:
    result = worker_environment("cuda", {} if own is None else {"VLLM_PLUGINS": own})
    assert result["VLLM_PLUGINS"] == plugins


def test_all_cores_and_the_faster_libraries_are_for_a_cpu(system: Any) -> None:
    openmp = system(CACHE, openmp=True)
    result = worker_environment("cpu", {})
    assert result["VLLM_CPU_NUM_OF_RESERVED_CPU"] == "0"
    assert result["LD_PRELOAD"] == f"{MINIMAL}:{openmp}"


@pytest.mark.parametrize("own", [{}, {"LD_PRELOAD": "/lib/mine.so"}])
def test_cuda_gets_nothing_that_is_meant_for_a_cpu(own: dict[str, str], system: Any) -> None:
    system(CACHE, openmp=True)
    result = worker_environment("cuda", own)
    assert result.get("LD_PRELOAD") == own.get("LD_PRELOAD")
    assert not [name for name in result if "CPU" in name or "COMPILE" in name]


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes these the only programs that can be found."""

    def become(*names: str) -> None:
        for name in names:
            (tmp_path / name).write_text("#!/bin/sh\n")
            (tmp_path / name).chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))

    return become


def test_a_cpu_that_runs_the_model_eagerly_compiles_nothing_else_either(tools: Callable[..., None]) -> None:
    tools()
    assert worker_environment("cpu", {}, compiled=False)["TORCH_COMPILE_DISABLE"] == "1"


@pytest.mark.parametrize("compiled", [False, True])
def test_an_engine_on_a_cpu_starts_from_one_import(compiled: bool, tools: Callable[..., None]) -> None:
    tools("c++")
    assert worker_environment("cpu", {}, compiled=compiled)["GALLEY_PRELOAD"] == "1"
    assert worker_environment("cpu", {"GALLEY_PRELOAD": "0"}, compiled=compiled)["GALLEY_PRELOAD"] == "0"
    assert "GALLEY_PRELOAD" not in worker_environment("cuda", {}, compiled=compiled)


@pytest.mark.parametrize("compiler", ["c++", "g++", "clang++"])
def test_a_cpu_with_a_compiler_may_compile(compiler: str, tools: Callable[..., None]) -> None:
    tools(compiler)
    assert "TORCH_COMPILE_DISABLE" not in worker_environment("cpu", {}, compiled=True)


def test_a_cpu_without_a_compiler_is_told_what_to_install(tools: Callable[..., None]) -> None:
    tools("gcc", "python")
    with pytest.raises(NoCompilerError, match=r"needs a C\+\+ compiler on a CPU: install g\+\+"):
        worker_environment("cpu", {}, compiled=True)


def test_cuda_needs_no_compiler_of_the_machine(tools: Callable[..., None]) -> None:
    tools()
    assert "TORCH_COMPILE_DISABLE" not in worker_environment("cuda", {}, compiled=True)


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ("/lib/mine.so", f"/lib/mine.so:{MINIMAL}:OPENMP"),
        (FULL, f"{FULL}:OPENMP"),  # two allocators would be one too many
        (f"{MINIMAL}:", f"{MINIMAL}:OPENMP"),
        ("/opt/intel/libiomp5.so", f"/opt/intel/libiomp5.so:{MINIMAL}"),
        ("/lib/libgomp.so.1", f"/lib/libgomp.so.1:{MINIMAL}"),  # vLLM refuses to start beside two
        ("/lib/libomp.so", f"/lib/libomp.so:{MINIMAL}"),
    ],
)
def test_a_library_that_the_user_preloads_is_not_added_again(own: str, expected: str, system: Any) -> None:
    openmp = system(CACHE, openmp=True)
    assert worker_environment("cpu", {"LD_PRELOAD": own})["LD_PRELOAD"] == expected.replace("OPENMP", openmp)


@pytest.mark.parametrize(
    ("own", "there", "expected"),
    [
        ("", True, True), ("", False, False), ("/lib/libiomp5.so", False, True), ("/lib/mine.so", True, True),
        ("/lib/libgomp.so.1", True, False), ("/lib/libomp.so", True, False),
    ],
)  # fmt: skip
def test_intels_openmp_runs_unless_another_is_preloaded(
    own: str, there: bool, expected: bool, system: Any
) -> None:
    system("", openmp=there)
    assert runs_intel_openmp({"LD_PRELOAD": own}) == expected


def test_libraries_that_are_not_there_are_not_preloaded(system: Any) -> None:
    openmp = system("1 libs found\n", openmp=False)
    assert "LD_PRELOAD" not in worker_environment("cpu", {})
    system("\tlibtcmalloc.so.4 (libc6,x86-64) => " + FULL, openmp=False)
    assert worker_environment("cpu", {})["LD_PRELOAD"] == FULL
    system("", openmp=True)
    assert worker_environment("cpu", {})["LD_PRELOAD"] == openmp


def test_what_is_preloaded_here_is_really_mapped_into_the_process() -> None:
    libraries = preloaded_libraries()
    if not libraries:
        pytest.skip("neither intel-openmp nor tcmalloc is installed")
    maps = [sys.executable, "-c", "print(open('/proc/self/maps').read())"]
    # vLLM, once imported by another test of this process, names its own OpenMP runtime as the user's.
    current = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    run = subprocess.run(
        maps,
        env=worker_environment("cpu", current),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert run.stderr == ""
    for library in libraries:
        assert str(library.resolve()) in run.stdout


def test_vllm_reads_what_the_environment_says(own_environment: None) -> None:
    from vllm import envs

    result = worker_environment("cpu", {})
    os.environ.update({name: value for name, value in result.items() if name.startswith("VLLM")})
    assert envs.VLLM_PLUGINS == ["galley", "galley_status"]
    assert envs.VLLM_HTTP_TIMEOUT_KEEP_ALIVE > 60  # longer than usual clients keep an idle connection
    assert envs.VLLM_WORKER_MULTIPROC_METHOD == "spawn"
    assert envs.VLLM_CPU_NUM_OF_RESERVED_CPU == 0
    assert envs.VLLM_NO_USAGE_STATS
