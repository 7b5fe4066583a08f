"""Environment variables of a worker; some only take effect before the interpreter starts."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from galley_plugins.models.store import cache_root
from galley_plugins.worker import preloading

if TYPE_CHECKING:
    from collections.abc import Mapping

    from galley_plugins.worker.device import Device

PLUGINS = ("galley", "galley_status")
OPENMP = ("libiomp", "libomp", "libgomp")
"""Runtimes of which vLLM takes one: whoever preloads another keeps it."""
KEEP_ALIVE_SECONDS = 120  # longer than the gateway keeps an idle connection, so that it never races a close


class NoCompilerError(RuntimeError):
    """torch.compile was asked for on a machine that has no C++ compiler."""


def worker_environment(
    device: Device, current: Mapping[str, str], *, compiled: bool = False
) -> dict[str, str]:
    """The whole environment of the server; what the user set stays, and Galley's plugins are added.

    Args:
        compiled: the model runs through torch.compile.

    Raises:
        NoCompilerError: `compiled` on a CPU without a C++ compiler.
    """
    environment = dict(current)
    named = [name for name in environment.get("VLLM_PLUGINS", "").split(",") if name]
    environment["VLLM_PLUGINS"] = ",".join(dict.fromkeys([*PLUGINS, *named]))
    defaults = {
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": str(KEEP_ALIVE_SECONDS),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "TOKENIZERS_PARALLELISM": "false",
        "NUMBA_CACHE_DIR": str(cache_root() / "numba"),  # the packages' own folders may be read-only
    }
    if device == "cpu":
        # vLLM keeps one core back per worker by default; on small machines that halves the speed.
        defaults["VLLM_CPU_NUM_OF_RESERVED_CPU"] = "0"
        if compiled and not any(map(shutil.which, ("c++", "g++", "clang++"))):
            raise NoCompilerError("torch.compile needs a C++ compiler on a CPU: install g++, or leave it off")
        if not compiled:
            # vLLM's sampler compiles two small functions when a request first needs them, and everyone waits.
            defaults["TORCH_COMPILE_DISABLE"] = "1"
        defaults[preloading.VARIABLE] = "1"
    for name, value in defaults.items():
        environment.setdefault(name, value)
    if device == "cpu":
        preload = [path for path in environment.get("LD_PRELOAD", "").split(":") if path]
        for library in preloaded_libraries():
            family = (
                OPENMP if library == _openmp() else (library.name.split(".")[0].removesuffix("_minimal"),)
            )
            if not any(name in path for path in preload for name in family):
                preload.append(str(library))
        if preload:
            environment["LD_PRELOAD"] = ":".join(preload)
    return environment


def preloaded_libraries() -> list[Path]:
    """Intel's OpenMP runtime (package intel-openmp) and the system's tcmalloc, as far as they are there."""
    libraries = []
    tcmalloc = _system_library("libtcmalloc_minimal.so.4") or _system_library("libtcmalloc.so.4")
    if tcmalloc is not None:
        libraries.append(tcmalloc)
    if _openmp().is_file():
        libraries.append(_openmp())
    return libraries


def runs_intel_openmp(current: Mapping[str, str]) -> bool:
    """Whether a worker on a CPU, started from this environment, has Intel's OpenMP runtime."""
    own = current.get("LD_PRELOAD", "")
    return "libiomp" in own or (not any(name in own for name in OPENMP) and _openmp().is_file())


def _openmp() -> Path:
    return Path(sys.prefix) / "lib" / "libiomp5.so"


def _system_library(name: str) -> Path | None:
    loader = next(
        (path for path in ("/sbin/ldconfig", "/usr/sbin/ldconfig") if os.access(path, os.X_OK)), None
    )
    if loader is None:
        return None
    listing = subprocess.run([loader, "-p"], capture_output=True, text=True, check=False, timeout=10).stdout
    for line in listing.splitlines():
        if line.strip().startswith(name + " ") and "x86-64" in line:
            return Path(line.rsplit("=> ", 1)[1].strip())
    return None
