"""Builds this package's C++ files for the machine that runs them, and keeps the result in the user's cache.

A file is built by the compiler that `$CXX` names, or `c++`, the first time it is needed: a few seconds.
Without a compiler there is none, and callers fall back to torch.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)

FLAGS = (
    *("-O3", "-march=native", "-ffp-contract=fast", "-fopenmp", "-shared", "-fPIC", "-std=c++17"),
    "-fvisibility=hidden",  # else a process's libraries share what inline functions keep, tables of functions
)
BUILD_SECONDS = 120.0


def cache_folder() -> Path:
    """`kernels` in `$GALLEY_CACHE_DIR`, or in `galley` in `$XDG_CACHE_HOME` or `~/.cache`."""
    own = os.environ.get("GALLEY_CACHE_DIR")
    if own:
        return Path(own).expanduser().absolute() / "kernels"
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (xdg if xdg.is_absolute() else Path.home() / ".cache") / "galley" / "kernels"


@functools.cache
def load(source: Path, *headers: Path) -> ctypes.CDLL | None:
    """The built file; None, with a warning in the log, where it cannot be built or loaded.

    Only what the source makes visible (`#pragma GCC visibility push(default)`) is to be found in it.

    Args:
        headers: files that it includes; a change in one builds it anew.
    """
    compiler = shutil.which(os.environ.get("CXX") or "c++")
    if compiler is None:
        logger.warning("no C++ compiler: %s is left to torch, which is slower", source.stem)
        return None
    text = (file.read_text(encoding="utf-8") for file in (source, *headers))
    key = "\0".join((*text, compiler, *FLAGS, _processor()))
    built = cache_folder() / f"{source.stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    try:
        if not built.is_file():
            _build(compiler, source, built)
        return ctypes.CDLL(str(built))
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or error
        logger.warning("%s could not be built and is left to torch, which is slower: %s", source.stem, said)
        return None


def _build(compiler: str, source: Path, built: Path) -> None:
    built.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=built.parent) as folder:
        made = Path(folder) / built.name
        command = [compiler, *FLAGS, str(source), "-o", str(made)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=BUILD_SECONDS)
        made.replace(built)


def _processor() -> str:
    """Changes with what `-march=native` means; a cache may be shared between machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
